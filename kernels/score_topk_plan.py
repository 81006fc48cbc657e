"""The sizes of a call of score_topk in Triton, worked out from shapes alone, and the blocks of its scan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdiff.kernels.runtime import INTERPRETED, next_power_of_2

LARGEST_K = 4096
"""Beyond it, and in tables of fewer rows than `FEWEST_ROWS`, every row is scored by the definition."""
FEWEST_ROWS = 1024
WIDEST = 1 << 16
"""Wider vectors too: their bounds would be loose."""
BUDGET = 256 << 20
"""Bytes of the buffers of one slice of the queries."""
USERS = 2048
"""Queries of a slice at most."""
WIDER = 8 if INTERPRETED else 1
"""Interpreted, an operation costs the same for few numbers and for many, so blocks are wider there."""


@dataclass(frozen=True)
class Blocks:
    """The configuration of the scan's kernel."""

    items_first: bool
    queries: int
    rows: int
    dims: int
    num_stages: int
    maxnreg: int  # what a thread needs on every chip; less is taken where less will do
    num_warps: int = 8


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from shapes alone.

    group      rows of which the scan keeps one number; 0: no scan
    programs   that share the tiles of the table out, of each block of queries
    visited, step, sample_slots   the tiles of the sample, how far apart, and room for all its groups, per program
    slots      entries of the whole table that each program has room for
    gathered, opened, sifted, keys   room per query for entries, groups, and (per part) rows and keys
    parts      programs per query that score by the definition
    users      queries at a time
    """

    group: int
    blocks: Blocks
    programs: int
    tiles: int
    visited: int
    step: int
    sample_slots: int
    slots: int
    gathered: int
    opened: int
    sifted: int
    keys: int
    parts: int
    users: int


def plan(n_users: int, n_rows: int, dim: int, k: int, excluded: int, processors: int) -> Plan:
    """excluded: how many rows a user may not be given, on average; processors: of the device."""
    rank = k + 2 * excluded
    group = 64 if n_users < 64 else 16
    while group >= 8 and 8 * rank * group > n_rows:
        group //= 2
    if group < 8 or k > LARGEST_K or n_rows < FEWEST_ROWS or dim > WIDEST:
        group = 0
    blocks = scan_blocks(n_users, dim)
    tiles = -(-n_rows // blocks.rows)
    per_tile = max(1, blocks.rows // max(1, group))
    # a sample of s groups lets about rank * groups / s of all groups pass: the fewest entries where both are equal
    visited = min(tiles, -(-max(4 * rank, math.isqrt(rank * tiles * per_tile)) // per_tile))
    here = min(n_users, USERS)
    step = tiles // visited
    visited = -(-tiles // step)
    programs = max(1, min(tiles, 4 * processors // -(-here // blocks.queries)))
    expected = -(-2 * rank * tiles // visited)  # with twice the entries that a good sample lets pass
    slots = min(-(-tiles // programs) * per_tile, expected // programs + 4 * int((expected / programs) ** 0.5) + 8)
    parts = max(1, min(2 * processors // here, 32 if group else -(-n_rows // 2048)))
    sizes = {
        "sample_slots": -(-visited // programs) * per_tile,
        "slots": slots,
        "gathered": max(2 * expected, visited * per_tile),
        "opened": 4 * rank + 256,
        "sifted": 2 * rank + 512,
        "keys": 2 * k + 512 * WIDER,
    }
    per_part = 16 * sizes["keys"] + 4 * sizes["sifted"]
    entries = programs * max(sizes["slots"], sizes["sample_slots"])
    per_user = 8 * (entries + sizes["gathered"]) + 4 * sizes["opened"] if group else 0
    users = max(1, min(here, BUDGET // (per_user + parts * per_part)))
    return Plan(group, blocks, programs, tiles, visited, step, parts=parts, users=users, **sizes)


def scan_blocks(n_users: int, dim: int) -> Blocks:
    dims = max(32, min(next_power_of_2(dim), 128))  # 32: the depth of the matrix units' products of int8
    if n_users < 64:
        return Blocks(True, max(16, next_power_of_2(n_users)), 128 * WIDER, dims, num_stages=3, maxnreg=255)
    return Blocks(False, 128, 64 * WIDER, dims, num_stages=2, maxnreg=192)
