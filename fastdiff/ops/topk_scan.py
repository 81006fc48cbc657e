"""The scan of score_topk: which rows can be among the k best, by a bound and in lower precision.

The rows of a `ScanTable` are scanned as they are stored: e', in float32, in bfloat16, in float16, or as whole numbers
of -127..127; the last two times a scale that 64 rows share. For a query q scanned as q', with the unit roundoff u of
the scan's sums,

    |scanned - score| <= |q| |e - e'|  +  |q - q'| |e'|  +  gamma |q'| |e'|  +  tiny

    gamma   (D + 16) u / (1 - (D + 16) u), for sums in any order (Higham, Accuracy and Stability of Numerical
            Algorithms, 2nd ed., section 3.1); 16: the rounding of the score itself, of its float64 sum, of e' from its
            whole numbers, and of the comparisons with the bound, and some to spare
    u       2^-24 for float32 arithmetic, and for sums of whole numbers, which are exact until they are scaled; 2^-22
            for matrix units, which may truncate
    tiny    what is lost where the hardware takes subnormal inputs, products or sums for zero

|e - e'| and the larger of |e| and |e'| are stored for each block of 64 rows, the largest of the block, rounded up; so a
row is dropped only where no row of its block's size could be among the k best.

A float16 number has 11 bits, eight times finer than bfloat16, but ends at 65,504 and loses bits below 2^-14. So the
scale of a block is the power of two that brings its largest number to 2^14 .. 2^15: nothing overflows, scaling back is
exact, and what lies below 2^-14 is less than 2^-28 of the largest; should matrix units take it for zero (they do not),
that would be sqrt(D) 2^-28 of the block's largest norm, within the 2^-22 times 16 to spare in gamma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.cpu import library
from fastdiff.ops.topk_definition import budget, exact_scores, slices
from fastdiff.ops.user_lists import ChunkedLists, UserLists

SCAN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
STORED = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float16: 3}
"""The numbers by which the C++ engine and the Triton kernels know the dtypes of a scan."""

BLOCK = 64
"""Rows that share one bound and one scale."""
CHUNK = 1 << 16
"""Rows of one tensor of a packed table: what a change copies at most."""
LARGEST = 2.0**126
"""Scanned scores below this cannot overflow float32 on the way."""
AT_ONCE = 1 << 19
"""Up to this many scores, and numbers that the definition then sums, one top-k over all scores beats blocks."""
_LOWEST = torch.finfo(torch.float32).min
_SMALLEST_SCALE = 2.0**-60

_Number = TypeVar("_Number", float, Tensor)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScanTable:
    """The item table as the scan reads it, with the bounds by which it proves its answer. Never written to again, so
    that a table and the tables made from it by `append` and `replace` share what is equal. Use `build`.

    dtype      float32, bfloat16, float16 or int8
    chunks     float32: the item table itself, not a copy; else tensors of `CHUNK` rows (the last may be shorter), in
               bfloat16, in float16 of the quotient by the scale, or in uint8: 128 + the whole number
    bounds     [ceil(N / 64), 4] float32: of each block the largest |e| or |e'|, the largest |e - e'| (of float32 rows:
               as rounded to bfloat16), the scale, nothing
    n_rows, dim
    certified  False: the scan keeps the k best by its own scores, which the definition then scores and orders: a row
               may be missed where the scan's error (2^-9 of bfloat16, 2^-12 of float16, about 2^-7 of int8) swaps it
               with the k-th
    automatic  made without a dtype: backends may scan a copy of their own choice (see `to_scan`)
    """

    dtype: torch.dtype
    chunks: tuple[Tensor, ...]
    bounds: Tensor
    n_rows: int
    dim: int
    certified: bool = True
    automatic: bool = False

    @classmethod
    def build(cls, item_emb: Tensor, dtype: torch.dtype | None = torch.float32, *, certified: bool = True) -> ScanTable:
        """From the float32 item table [N, D]. The dtype changes the speed of the scan, never its (certified) answer.

        None is float32 with leave for a backend to choose: the C++ engine and the Triton kernels make an int8 copy when
        they first scan, a quarter of the table's memory: it has the fewest bytes and the fastest products.
        """
        if dtype is None:
            return replace(cls.build(item_emb, certified=certified), automatic=True)
        if dtype not in SCAN_DTYPES:
            accepted = ", ".join(map(str, SCAN_DTYPES))
            raise InvalidArgument(f"scan_dtype: must be None or one of {accepted} (got {dtype!r})")
        n_rows, dim = item_emb.shape
        if dtype == torch.float32:
            return cls(dtype, (item_emb,), _pack(item_emb, dtype)[1], n_rows, dim, certified)
        parts = [_pack(item_emb[lo:hi], dtype) for lo, hi in slices(len(item_emb), CHUNK)]
        chunks, bounds = ([part[i] for part in parts] for i in (0, 1))
        return cls(dtype, tuple(chunks), _joined(bounds, item_emb), n_rows, dim, certified)

    def append(self, item_emb: Tensor) -> ScanTable:
        """Of the item table [N', D], whose first N rows are those of this one."""
        whole = self.n_rows // BLOCK * BLOCK  # the rows of whole blocks, which stay as they are
        rows, bounds = _pack(item_emb[whole:], self.dtype)
        bounds = torch.cat([self.bounds[: whole // BLOCK], bounds])
        if self.dtype == torch.float32:
            return self._like((item_emb,), bounds, item_emb)._copied_from(self, lambda copy: copy.append(item_emb))
        kept = whole // CHUNK
        if whole % CHUNK:
            rows = torch.cat([self.chunks[kept][: whole % CHUNK], rows])
        added = [rows[lo:hi] for lo, hi in slices(len(rows), CHUNK)]
        # each a tensor of its own, so that none keeps the memory of the others
        return self._like((*self.chunks[:kept], *(chunk.clone() for chunk in added)), bounds, item_emb)

    def replace(self, at: Tensor, item_emb: Tensor) -> ScanTable:
        """Of the item table [N, D], which differs from that of this one in the rows `at`."""
        if not at.numel():
            chunks = (item_emb,) if self.dtype == torch.float32 else self.chunks
            return self._like(chunks, self.bounds, item_emb)._copied_from(self, lambda copy: copy)
        blocks = torch.unique(at // BLOCK)  # ascending, so that a block that is not full comes last
        rows = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=at.device)).flatten()
        rows = rows[rows < self.n_rows]
        packed, changed = _pack(item_emb[rows], self.dtype)
        bounds = self.bounds.clone()
        bounds[blocks] = changed
        if self.dtype == torch.float32:
            return self._like((item_emb,), bounds, item_emb)._copied_from(self, lambda copy: copy.replace(at, item_emb))
        changed_chunks = list(self.chunks)
        for chunk in torch.unique(rows // CHUNK).tolist():
            here = rows // CHUNK == chunk
            changed_chunks[chunk] = changed_chunks[chunk].clone()
            changed_chunks[chunk][rows[here] % CHUNK] = packed[here]
        return self._like(tuple(changed_chunks), bounds, item_emb)

    def _like(self, chunks: tuple[Tensor, ...], bounds: Tensor, item_emb: Tensor) -> ScanTable:
        return replace(self, chunks=chunks, bounds=bounds, n_rows=len(item_emb))

    def _copied_from(self, older: ScanTable, change: Callable[[ScanTable], ScanTable]) -> ScanTable:
        """This table; the int8 copy that an older one has made serves it too, changed in the same way."""
        made: ScanTable | None = older.__dict__.get("_int8")
        if made is not None:
            self.__dict__["_int8"] = change(made)
        return self

    def __getitem__(self, part: slice) -> ScanTable:
        """The table of the first rows: scan[:n]."""
        if part.start not in (None, 0) or part.step not in (None, 1):
            raise InvalidArgument(f"ScanTable: only the first rows can be taken, scan[:n] (got {part})")
        n = len(range(self.n_rows)[part])
        if n == self.n_rows:
            return self
        size = max(1, self.n_rows) if self.dtype == torch.float32 else CHUNK
        chunks = tuple(chunk[: n - i * size] for i, chunk in enumerate(self.chunks) if i == 0 or i * size < n)
        # a slice lives for one call: not worth a copy of its own
        automatic = self.automatic and "_int8" in self.__dict__
        cut = replace(self, chunks=chunks, bounds=self.bounds[: -(-n // BLOCK)], n_rows=n, automatic=automatic)
        return cut._copied_from(self, lambda copy: copy[part])

    def to_scan(self, item_emb: Tensor) -> ScanTable:
        """What fast backends scan: this table, or an int8 copy that is made once where the dtype was left open."""
        if not self.automatic:
            return self
        made: ScanTable | None = self.__dict__.get("_int8")
        if made is None:  # two threads may both make it; the first copy stays
            copy = ScanTable.build(item_emb, torch.int8, certified=self.certified)
            made = self.__dict__.setdefault("_int8", copy)
        return made

    @property
    def choice(self) -> torch.dtype | None:
        """The dtype that `build` was given."""
        return None if self.automatic else self.dtype

    @property
    def device(self) -> torch.device:
        return self.bounds.device

    @cached_property
    def max_norm(self) -> float:
        """At least the largest |e|; 0 for an empty table."""
        return float(self.bounds[:, 0].max()) if self.n_rows else 0.0

    # --- as plain PyTorch scans it ------------------------------------------------------------------------------------

    @cached_property
    def coef(self) -> Tensor:
        """[N] float32, rounded up: |scanned - score| <= |q| coef + tiny."""
        bounds = self.bounds.double()
        coef = bounds[:, 0] * _relative_error(self.dtype, self.dim)
        if self.dtype != torch.float32:
            coef += bounds[:, 1]
        return _up(coef).repeat_interleave(BLOCK)[: self.n_rows]

    @cached_property
    def max_coef(self) -> float:
        return float(self.coef.max()) if self.n_rows else 0.0

    def scanned(self, query: Tensor, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        """[B, hi - lo] float32 or bfloat16: the scores of rows lo .. hi - 1, within the bound."""
        rows = self._rows(lo, hi)
        if self.dtype == torch.bfloat16:
            query = query.to(torch.bfloat16)
            if rows.device.type != "cpu":
                # elsewhere than on the CPU a bfloat16 product may also be summed in bfloat16; widened, it is in float32
                query, rows = query.float(), rows.float()
        return torch.mm(query, rows.T, out=out)

    def _rows(self, lo: int, hi: int) -> Tensor:
        """e' of rows lo .. hi - 1."""
        if self.dtype == torch.float32:
            return self.chunks[0][lo:hi]
        chunks = range(lo // CHUNK, max(lo, hi - 1) // CHUNK + 1)
        parts = [self.chunks[i][max(0, lo - i * CHUNK) : hi - i * CHUNK] for i in chunks]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.dtype == torch.bfloat16:
            return rows
        scale = self.bounds[:, 2].index_select(0, torch.arange(lo, hi, device=rows.device) // BLOCK)
        wide = rows.float()
        return (wide if self.dtype == torch.float16 else wide - 128.0) * scale[:, None]

    def scanned_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == torch.bfloat16 and self.device.type == "cpu" else torch.float32

    def looseness(self, dim: int) -> float:
        """The factor by which the float32 matmul of this moment exceeds the bound's share of |e|."""
        if self.dtype == torch.bfloat16:  # bfloat16 inputs lose nothing by being rounded again
            return 1.0
        return 1.0 + _input_rounding(self.device) / _relative_error(torch.float32, dim)

    def slack(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(factor [B], tiny [B]) float32, rounded up: |scanned - score| <= factor coef + tiny."""
        norm, dim = torch.linalg.vector_norm(query, dim=1, dtype=torch.float64), query.shape[1]
        return _up(norm * self.looseness(dim)), _up(self.tiny(norm, dim))

    def worst_slack(self, norm: float, dim: int) -> float:
        """The bound for any row and any query whose norm is at most `norm`."""
        return 1.001 * (norm * self.looseness(dim) * self.max_coef + self.tiny(norm, dim))

    def tiny(self, norm: _Number, dim: int) -> _Number:
        return 2.0**-124 * (2.0 * dim + 1.0 + math.sqrt(dim) * (norm + self.max_norm))


def _relative_error(dtype: torch.dtype, dim: int) -> float:
    # matrix units may truncate their sums, so the unit of a bfloat16 scan is four times that of rounded float32
    unit = 2.0**-22 if dtype == torch.bfloat16 else 2.0**-24
    gamma = (dim + 16) * unit / (1.0 - (dim + 16) * unit)
    return gamma + 2.0**-8 + 2.0**-8 * (1.0 + 2.0**-6) if dtype == torch.bfloat16 else gamma


def _input_rounding(device: torch.device) -> float:
    """How much of Q E a float32 matmul may lose by first rounding its inputs, as torch is now set for the device."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return {"tf32": 2.0**-8, "bf16": 2.0**-6}.get(backend.matmul.fp32_precision, 0.0)


def _up(values: Tensor) -> Tensor:
    """float64 to float32, never to a smaller number and never to a subnormal."""
    return (values * (1.0 + 2.0**-20) + 2.0**-120).float()


# --- packing ----------------------------------------------------------------------------------------------------------


def _pack(item_emb: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows as stored [N, D], bounds [ceil(N / 64), 4]) of float32 rows, from a block's start; float32 rows as is."""
    if item_emb.device.type == "cpu" and library.why_not() is None:
        rows, bounds = torch.ops.fastdiff.topk_pack.default(item_emb, STORED[dtype])
        return (item_emb if dtype == torch.float32 else rows), bounds
    rows, all_bounds = [], []
    step = max(1, budget(item_emb.device) // (BLOCK * max(1, item_emb.shape[1]))) * BLOCK
    for lo, hi in slices(len(item_emb), step):
        part, bounds = _pack_in_torch(item_emb[lo:hi], dtype)
        all_bounds.append(bounds)
        rows.append(part)
    if dtype == torch.float32:
        return item_emb, _joined(all_bounds, item_emb)
    return (torch.cat(rows) if rows else torch.zeros_like(item_emb, dtype=_stored_dtype(dtype))), _joined(
        all_bounds, item_emb
    )


def _pack_in_torch(item_emb: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, dim = item_emb.shape
    blocks = F.pad(item_emb, (0, 0, 0, -n % BLOCK)).view(-1, BLOCK, dim)
    scale = torch.ones(len(blocks), device=item_emb.device)
    if dtype == torch.int8:
        scale = (blocks.abs().amax((1, 2)) / 127.0).clamp_(min=_SMALLEST_SCALE)
        whole = (blocks / scale[:, None, None]).round_().clamp_(-127.0, 127.0)
        rows, scanned = (whole + 128.0).to(torch.uint8), whole * scale[:, None, None]
    elif dtype == torch.float16:
        scale = (_power_of_two(blocks.abs().amax((1, 2))) * 2.0**-14).clamp_(min=_SMALLEST_SCALE)
        rows = (blocks / scale[:, None, None]).to(torch.float16)
        scanned = rows.float() * scale[:, None, None]
    else:
        rows = blocks.to(torch.bfloat16)
        scanned = rows.float()
    exact, approximate = blocks.double(), scanned.double()
    norm = torch.maximum(exact.norm(dim=2), approximate.norm(dim=2)).amax(1)
    residual = (exact - approximate).norm(dim=2).amax(1)
    bounds = torch.stack([_up(norm), _up(residual), scale, torch.zeros_like(scale)], dim=1)
    return rows.view(-1, dim)[:n], bounds


def _power_of_two(values: Tensor) -> Tensor:
    """The largest power of two that is at most each float32 number; 0 for 0 and subnormals."""
    return (values.view(torch.int32) & 0x7F800000).view(torch.float32)


def _stored_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.int8 else dtype


def _joined(bounds: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(bounds) if bounds else torch.zeros(0, 4, device=like.device)


# --- one top-k over all scores ----------------------------------------------------------------------------------------


def scan_at_once(
    query: Tensor,
    item_emb: Tensor,
    k: int,
    denied: Tensor | None,
    exclude: UserLists | None,
    scan: ScanTable,
    slack: float,
) -> tuple[Tensor, Tensor] | None:
    """(rows [B, k], scores [B, k]) by one top-k a little wider than k; None where it does not reach past the bound."""
    n_rows = item_emb.shape[0]
    scanned = scan.scanned(query, 0, n_rows)
    if denied is not None:
        scanned += denied
    if exclude is not None:
        scanned[exclude.users(), exclude.values] = -torch.inf
    width = _at_once_width(n_rows, k, scan)
    highest, rows = scanned.topk(width, dim=1)
    if width < n_rows:
        kth, last = highest[:, k - 1].tolist(), highest[:, -1].tolist()
        if not all(low < high - 2.0 * slack or low == -torch.inf for low, high in zip(last, kth, strict=True)):
            return None
    rows, order = rows.sort(dim=1)
    vectors = item_emb.index_select(0, rows.flatten()).view(*rows.shape, -1)
    scores = exact_scores(query[:, None], vectors)
    if denied is not None or exclude is not None:
        none = highest.gather(1, order) == -torch.inf
        rows, scores = rows.masked_fill_(none, -1), scores.masked_fill_(none, -torch.inf)
    scores, order = scores.sort(
        dim=1, descending=True, stable=True
    )  # stable, so of equal scores the lower row is first
    return rows.gather(1, order[:, :k]), scores[:, :k].contiguous()


def worth_at_once(n_users: int, n_rows: int, k: int, scan: ScanTable) -> bool:
    """Whether the table is so small that `scan_at_once` is the faster way."""
    scored = n_users * _at_once_width(n_rows, k, scan) * scan.dim
    most = AT_ONCE if scan.dtype == torch.float32 else AT_ONCE // 4  # a top-k over bfloat16 is the slower one
    return n_users * n_rows <= most and scored <= most


def _at_once_width(n_rows: int, k: int, scan: ScanTable) -> int:
    return min(n_rows, (k if scan.dtype == torch.float32 else 2 * k) + 16)


# --- chunk by chunk ---------------------------------------------------------------------------------------------------


def chunk_rows(n_users: int, n_rows: int, k: int, device: torch.device) -> int:
    """Rows per chunk of a scan, a multiple of 64; enough to hold the k best of the first chunk."""
    rows = max(budget(device) // n_users, 4096, 8 * k)
    return -(-min(n_rows, rows) // 64) * 64


def scan_in_chunks(
    query: Tensor, k: int, denied: Tensor | None, exclude: UserLists | None, scan: ScanTable
) -> tuple[Tensor, Tensor, Tensor]:
    """(users [P], rows [P]): every pair that may be among the k best; users [W] of whom there are too many to list.

    A chunk's scores are cut into blocks, and only the highest of each block is looked at: the k best of these, less
    their bounds, are scores that k different rows surely reach, so the lowest of the k is a floor under the k-th best
    score. Only blocks whose highest may reach the floor are opened. The floor rises from chunk to chunk.
    """
    n_users, n_rows, device = query.shape[0], scan.n_rows, query.device
    factor, tiny = (bound[:, None] for bound in scan.slack(query))
    chunk = chunk_rows(n_users, n_rows, k, device)
    chunks = list(slices(n_rows, chunk))
    excluded = ChunkedLists(exclude, chunks)
    per_block = max(4, min(64, 1 << max(0, (chunk // (4 * k)).bit_length() - 1)))
    n_blocks = chunk // per_block
    buffer = torch.empty(n_users, chunk, dtype=scan.scanned_dtype(), device=device)
    blocks = buffer.view(n_users, per_block, n_blocks)  # a block is a column: maxima of columns are the fast ones
    inside = torch.arange(0, chunk, n_blocks, device=device)
    sure = torch.full((n_users, k), -torch.inf, device=device)
    floor = torch.full((n_users, 1), _LOWEST, device=device)
    kept = _Kept(n_users, 8 * k + 1024, device)
    for i, (lo, hi) in enumerate(chunks):
        coef = scan.coef[lo:hi]
        if hi - lo == chunk:
            scan.scanned(query, lo, hi, out=buffer)
        else:
            buffer[:, : hi - lo] = scan.scanned(query, lo, hi)
            buffer[:, hi - lo :] = -torch.inf
            coef = F.pad(coef, (0, chunk - (hi - lo)))
        if denied is not None:
            buffer[:, : hi - lo] += denied[lo:hi]
        excluded.fill(buffer, i, -torch.inf)
        coef = coef.view(per_block, n_blocks)
        highest = blocks.amax(1).float()
        slack = torch.addcmul(tiny, factor, coef.amax(0))
        surely = highest - slack
        if i == 0 and n_blocks < 4 * k:  # too few blocks for a floor that is of use
            first, at = buffer.float().topk(min(k, chunk), dim=1)
            surely = first - torch.addcmul(tiny, factor, coef.flatten()[at])
        sure = torch.cat([sure, surely], dim=1).topk(k, dim=1).values
        floor = torch.maximum(floor, sure[:, -1:]).masked_fill(kept.given_up, torch.inf)
        users, block = (highest + slack >= floor).nonzero(as_tuple=True)
        column = block[:, None] + inside
        reach = torch.addcmul(tiny[users], factor[users], coef.take(column))
        reach += buffer.take(column + chunk * users[:, None])
        opened, within = (reach >= floor[users]).nonzero(as_tuple=True)
        kept.add(users[opened], lo + column[opened, within], reach[opened, within], floor)
    return kept.settle(floor)


class _Kept:
    """The pairs that a scan has kept so far, pruned as the floor rises; users with more than `most` are given up."""

    def __init__(self, n_users: int, most: int, device: torch.device) -> None:
        self.n_users, self.most = n_users, most
        self.given_up = torch.zeros(n_users, 1, dtype=torch.bool, device=device)
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.total = 0

    def add(self, users: Tensor, rows: Tensor, reach: Tensor, floor: Tensor) -> None:
        """Keep pairs whose score is at most `reach`."""
        self.parts.append((users, rows, reach))
        self.total += users.numel()
        if self.total > 2 * self.n_users * self.most:
            self._prune(floor)

    def settle(self, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._prune(floor)
        users, rows, _ = self.parts[0]
        return users, rows, self.given_up.flatten().nonzero().flatten()

    def _prune(self, floor: Tensor) -> None:
        users, rows, reach = (torch.cat(column) for column in zip(*self.parts, strict=True))
        reached = reach >= floor.flatten()[users]
        counts = torch.bincount(users[reached], minlength=self.n_users)
        self.given_up |= (counts > self.most)[:, None]
        left = (reached & ~self.given_up.flatten()[users]).nonzero().flatten()
        self.parts = [(users[left], rows[left], reach[left])]
        self.total = left.numel()
