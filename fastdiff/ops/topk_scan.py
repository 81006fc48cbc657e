"""The scan of score_topk: which rows can be among the k best, by a bound and in lower precision.

For a query of norm Q and a row of norm E, with the unit roundoff u of the scan's sums:

    |scanned - score| <= Q coef + tiny

    coef   R + E (u_in + u_out + gamma(D + 12)),  gamma(m) = m u / (1 - m u), for sums in any order (Higham, Accuracy
           and Stability of Numerical Algorithms, 2nd ed., section 3.1)
           R = |e - e rounded|, u_in: the rounding of the query, u_out: of the scanned score; all 0 for a float32 scan
           12: the rounding of the score itself, of its float64 sum, and of the comparisons with the bound
    tiny   what is lost where the hardware takes subnormal inputs, products or sums for zero
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.topk_definition import budget, exact_scores, slices
from fastdiff.ops.user_lists import ChunkedLists, UserLists, dtype_name

SCAN_DTYPES = (torch.float32, torch.bfloat16)

LARGEST = 2.0**126
"""Scanned scores below this cannot overflow float32 on the way."""
AT_ONCE = 1 << 19
"""Up to this many scores, and numbers that the definition then sums, one top-k over all scores beats blocks."""
_LOWEST = torch.finfo(torch.float32).min

_Number = TypeVar("_Number", float, Tensor)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScanTable:
    """The item table in the dtype of the scan, with each row's share of the bound. Built once, kept with the table.

    rows      [N, D] float32 (the item table itself, not a copy) or bfloat16
    coef      [N] float32, the bound's factor of Q, rounded up
    max_coef  at least the largest of `coef`      max_norm  at least the largest |row|; 0 for an empty table
    """

    rows: Tensor
    coef: Tensor
    max_coef: float
    max_norm: float

    @classmethod
    def build(cls, item_emb: Tensor, dtype: torch.dtype = torch.float32) -> ScanTable:
        """From the float32 item table [N, D]. The dtype changes the speed of the scan, never its answer."""
        if dtype not in SCAN_DTYPES:
            accepted = ", ".join(dtype_name(known) for known in SCAN_DTYPES)
            raise InvalidArgument(f"scan_dtype: cannot scan in {dtype_name(dtype)}; accepted: {accepted}")
        n_rows, dim = item_emb.shape
        rows = item_emb.to(dtype)
        norm = torch.zeros(n_rows, dtype=torch.float64, device=item_emb.device)
        residual = torch.zeros_like(norm)
        for lo, hi in slices(n_rows, budget(item_emb.device) // max(1, dim)):
            exact = item_emb[lo:hi].double()
            norm[lo:hi] = exact.norm(dim=1)
            if dtype != torch.float32:
                residual[lo:hi] = (exact - rows[lo:hi].double()).norm(dim=1)
        coef = _up(norm * _relative_error(dtype, dim) + residual)
        return cls(rows, coef, float(coef.max()) if n_rows else 0.0, float(norm.max()) if n_rows else 0.0)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def __getitem__(self, part: slice | Tensor) -> ScanTable:
        """The table of some of the rows."""
        return ScanTable(self.rows[part], self.coef[part], self.max_coef, self.max_norm)

    def scanned(self, query: Tensor, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        """[B, hi - lo] float32 or bfloat16: the scores of rows lo .. hi - 1, within the bound."""
        rows = self.rows[lo:hi]
        if self.dtype == torch.bfloat16:
            query = query.to(torch.bfloat16)
            if rows.device.type != "cpu":
                # elsewhere than on the CPU a bfloat16 product may also be summed in bfloat16; widened, it is in float32
                query, rows = query.float(), rows.float()
        return torch.mm(query, rows.T, out=out)

    def scanned_dtype(self) -> torch.dtype:
        return self.dtype if self.rows.device.type == "cpu" else torch.float32

    def looseness(self, dim: int) -> float:
        """The factor by which the float32 matmul of this moment exceeds the bound's share of E."""
        if self.dtype != torch.float32:  # bfloat16 inputs lose nothing by being rounded again
            return 1.0
        return 1.0 + _input_rounding(self.rows.device) / _relative_error(torch.float32, dim)

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
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-22
    gamma = (dim + 12) * unit / (1.0 - (dim + 12) * unit)
    return gamma if dtype == torch.float32 else gamma + 2.0**-8 + 2.0**-8 * (1.0 + 2.0**-6)


def _input_rounding(device: torch.device) -> float:
    """How much of Q E a float32 matmul may lose by first rounding its inputs, as torch is now set for the device."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return {"tf32": 2.0**-8, "bf16": 2.0**-6}.get(backend.matmul.fp32_precision, 0.0)


def _up(values: Tensor) -> Tensor:
    """float64 to float32, never to a smaller number and never to a subnormal."""
    return (values * (1.0 + 2.0**-20) + 2.0**-120).float()


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
    scored = n_users * _at_once_width(n_rows, k, scan) * scan.rows.shape[1]
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
    n_users, n_rows, device = query.shape[0], scan.rows.shape[0], query.device
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
