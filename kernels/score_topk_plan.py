"""The sizes of a call of score_topk in Triton, worked out from shapes alone, and the blocks that its scan may take.

Few queries are a stream: the table is read once and hardly anything computed, so what counts is how many bytes are on
their way. An H200 reads 4.8 TB/s at a latency of some 0.7 us: 3.4 MB in flight, 26 KB for each of its 132 processors.
A tile is 16 or 32 KB; with 3 or 4 stages two or three of them are on their way while one is multiplied, and two
programs share a processor: 96 KB or more in flight. What a processor computes meanwhile it has time for: at 4.3 TB/s 32
KB come in 1,760 clocks, the products of 64 queries, filled up or not, take 512 of them (256 rows of 64 numbers of 16
bits), and some 370 instructions of each of 4 warps another 370.

Many queries are a product of matrices: 256 queries stay in shared memory, and rows are streamed past them. At D = 64,
64 rows take 512 clocks of the matrix units in bfloat16, and 264 instructions of each of 8 warps 528 of the schedulers;
two programs share a processor, so that one multiplies while the other one compares. All programs are there at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fastdiff.kernels.runtime import INTERPRETED
from fastdiff.kernels.tuning import Config

LARGEST_K = 4096
"""Beyond it, and in tables of fewer rows than `FEWEST_ROWS`, every row is scored by the definition."""
FEWEST_ROWS = 1024
WIDEST = 1 << 16
"""Wider vectors too: their bounds would be loose."""
RESCANNED = 1 << 22
"""Tables of this many numbers have a second scan for queries of whom the first one keeps too much; smaller ones are
scored by the definition sooner than five more kernels start."""
PROGRAMS = 2
"""Of a scan, that share a processor: no block has more registers or shared memory than lets them."""
BUDGET = 640 << 20
"""Bytes of the buffers of one slice of the queries: 1,024 of them over 10^7 rows, for k of 100, are one slice."""
USERS = 2048
"""Queries of a slice at most."""
FOUND = 4096
"""Keys of a query, or k, that there is room for where it is forced to the definition, in parts with k keys each; of few
queries eight times that, so that one of them can have all processors."""
FEW = 32
"""Queries of a call that opens large groups, of 64 rows: there are fewer of them to keep."""
WIDER = 8 if INTERPRETED else 1
"""Interpreted, an operation costs the same for few numbers and for many, so blocks are wider there."""

RESCAN_QUERIES, RESCAN_ROWS, RESCAN_DIMS = 16, 64 * WIDER, 16
"""The blocks of the second scan: float32 products need no matrix units, and a thread holds 16 numbers of each row."""


@dataclass(frozen=True)
class Sweep:
    """How a scan goes over the table, first over a sample of its tiles, then over all.

    rows       of a tile
    programs   that share the tiles out, of each block of queries
    tiles, visited, step, start   of the table; of the sample, how far apart, and which is its first
    places     where entries are written, of each query: one for each group of a tile in each program
    sample_slots, slots   entries that each place has room for: of the sample all its groups, of the table so many
    """

    rows: int
    programs: int
    places: int
    tiles: int
    visited: int
    step: int
    start: int
    sample_slots: int
    slots: int

    def passes(self) -> Iterator[tuple[bool, int, int, int, int]]:
        """(last, how many tiles, how far apart, the first, slots) of the sample and of the whole table."""
        yield False, self.visited, self.step, self.start, self.sample_slots
        yield True, self.tiles, 1, 0, self.slots

    @property
    def entries(self) -> int:
        """Room for the entries of a query."""
        return self.places * max(self.slots, self.sample_slots)


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from shapes alone.

    group      rows of which the scan keeps one number; 0: no scan
    scan       the first scan
    rescan     the second one, or None; then every query that the first cannot serve is forced to the definition
    gathered, opened, sifted, keys   room per query for entries, groups, and (per part) rows and keys
    parts      programs per query that score by the definition
    forced     (queries at once, parts of each) where whole tables are, after the second scan
    users      queries at a time
    """

    group: int
    scan: Sweep
    rescan: Sweep | None
    gathered: int
    opened: int
    sifted: int
    keys: int
    parts: int
    forced: tuple[int, int]
    users: int


def plan(
    n_users: int,
    n_rows: int,
    dim: int,
    k: int,
    excluded: int,
    processors: int,
    block_q: int,
    block_n: int,
    listed: int | None = None,
) -> Plan:
    """excluded: how many rows a user may not be given, on average; processors: of the device; block_q, block_n: of the
    scan, queries and rows; listed: how many candidates all users have together, or None."""
    here = min(n_users, USERS)
    while True:
        found = _plan(here, n_users, n_rows, dim, k, excluded, processors, block_q, block_n, listed)
        if found.users >= here:
            return found
        # slices of about the same size, of whole blocks, which share all processors out
        even = -(-n_users // -(-n_users // found.users))
        here = min(-(-even // block_q) * block_q, found.users // block_q * block_q) or found.users


def _plan(
    here: int,
    n_users: int,
    n_rows: int,
    dim: int,
    k: int,
    excluded: int,
    processors: int,
    block_q: int,
    block_n: int,
    listed: int | None,
) -> Plan:
    """The plan of slices of `here` users; where these need too much memory, its `users` are fewer."""
    rank = k + 2 * excluded
    group = widest_group(n_users, block_n)
    while group >= 8 and 8 * rank * group > n_rows:
        group //= 2
    if group < 8 or k > LARGEST_K or n_rows < FEWEST_ROWS or dim > WIDEST:
        group = 0
    scan, most = _sweep(n_rows, rank, max(1, group), block_n, PROGRAMS * processors // -(-here // block_q), 0)
    rescan = None
    if group and n_rows * dim >= RESCANNED:
        rescan, more = _sweep(n_rows, rank, group, RESCAN_ROWS, 2 * processors, 1)
        most = max(most, more)
    forced_parts = max(1, min(2 * processors, FOUND * (8 if here <= 8 else 1) // k))
    sizes = {
        "gathered": most,
        "opened": 4 * rank + 256,
        "sifted": 2 * rank + 512,
        "keys": 2 * k + 512 * WIDER,
    }
    per_part = 16 * sizes["keys"] + 4 * sizes["sifted"]
    enough = -(-listed // 256) if listed is not None else 32 if group else -(-n_rows // 2048)
    parts = max(1, min(2 * processors // here, enough, BUDGET // per_part))
    entries = max(scan.entries, 0 if rescan is None else rescan.entries)
    per_user = 8 * (entries + sizes["gathered"]) + 4 * sizes["opened"] if group else 0
    per_user += 0 if rescan is None else 8 * forced_parts * k
    users = max(1, min(here, BUDGET // (per_user + parts * per_part)))
    forced = (max(1, min(users, 2 * processors // forced_parts)), forced_parts)
    return Plan(group, scan, rescan, parts=parts, forced=forced, users=users, **sizes)


def widest_group(n_users: int, block_n: int) -> int:
    """Rows of a group at most. A tile has four groups at least: a thread's columns are of one."""
    return min(64 if n_users <= FEW else 16, block_n // 4)


def _sweep(n_rows: int, rank: int, group: int, rows: int, programs: int, start: int) -> tuple[Sweep, int]:
    """A sweep of tiles of `rows` rows by at most so many programs, and how many entries of a query are gathered.

    start  0: the sample begins at the first tile; 1: half way to its second, so that another sweep sees other tiles
    """
    tiles = -(-n_rows // rows)
    per_tile = max(1, rows // group)
    # a sample of s groups lets about rank * groups / s of all groups pass: the fewest entries where both are equal
    visited = min(tiles, -(-max(4 * rank, math.isqrt(rank * tiles * per_tile)) // per_tile))
    step = tiles // visited
    start = start * step // 2
    visited = -(-(tiles - start) // step)
    programs = max(1, min(tiles, programs))
    expected = -(-2 * rank * tiles // visited)  # with twice the entries that a good sample lets pass
    places = programs * per_tile
    slots = min(-(-tiles // programs), expected // places + 4 * int((expected / places) ** 0.5) + 8)
    sample_slots = -(-visited // programs)
    gathered = max(2 * expected, visited * per_tile)
    return Sweep(rows, programs, places, tiles, visited, step, start, sample_slots, slots), gathered


def raise_blocks(n_users: int, processors: int) -> Config:
    """How a query's floor is raised. Few queries leave most of a device idle, and what counts is how often one that is
    served waits for memory and for its other warps: so it has many of them, and eight entries or more for each thread.
    """
    warps, programs, slots = (16, 256, 16) if n_users <= processors else (4, 32, 32)
    blocks = {"BLOCK": 256 * warps * WIDER, "BLOCK_P": programs * WIDER, "BLOCK_S": slots}
    return Config(blocks, num_warps=warps)


def scan_candidates(n_users: int, dims: int, dtype: str, hopper: bool = True) -> list[Config]:
    """Blocks of the scan, the ones that should serve everywhere first; `tuning.choose` picks one.

    n_users, dims  powers of two, from 1 and from 32 (the depth of the matrix units' products of int8) to 256: more
    dtype          of the stored rows
    hopper         the matrix units read both sides of a product from shared memory (sm_90); those of other GPUs take
                   more registers, so their tiles are smaller
    """
    wide = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[dtype]
    depth, deep = min(dims, 128), dims > 128
    if n_users <= 64:
        most = 128 if n_users > FEW or wide == 4 else 256
        rows = max(64, min(most, (32 << 10) // (depth * wide))) if hopper and not deep else 64
        stages = 4 if rows * depth * wide <= 16 << 10 and not deep else 3
        shapes = [(64, rows, stages), (64, rows, 7 - stages), (64, max(64, rows // 2), 3), (64, 64, 2)]
    elif n_users <= 128 or not hopper or wide == 4 or deep:
        shapes = [(128, 64, 2 if deep else 3), (128, 64, 2)]
    else:
        shapes = [(256, 64, 3), (256, 64, 4), (128, 64, 3), (128, 64, 2)]
    return [
        Config(
            {"BLOCK_Q": queries, "BLOCK_N": rows * WIDER, "BLOCK_D": depth},
            num_warps=min(queries // 16, 8),
            num_stages=stages,
            maxnreg=128 if queries > 64 and hopper and not deep else 255,  # else two programs share no processor
            shared=_shared(queries, rows, depth, wide, stages, deep),
        )
        for queries, rows, stages in dict.fromkeys(shapes)
    ]


def _shared(queries: int, rows: int, dims: int, wide: int, stages: int, deep: bool) -> int:
    """Bytes of shared memory, at most: the tiles on their way, one more where the matrix units read them there as they
    are stored, else one in the form of the product; the queries in that form, which are on their way like the tiles
    where vectors are deep; and what little changes hands."""
    product = 1 if wide == 1 else 2
    tiles = ((stages - 1) * wide + product) * rows * dims
    return tiles + product * queries * dims * (stages if deep else 1) + 40 * queries
