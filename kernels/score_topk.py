"""score_topk in Triton: scan, open, score by the definition, order; nothing waits for the device.

    prepare   the queries in the form of the product, with the factors of their slack
    scan      a strided sample of the table, the highest score of each group of rows, less its slack
    raise     floor = a score that just k of these reach, or some equal ones more: k different groups hold one each
    scan      the whole table: only groups whose highest score, and its slack, reach the floor are kept
    raise     the floor once more, from what is kept; the groups left are listed, hardly more than k
    rescan    only queries of whom too much was kept, whose floor is higher by now: all of this once more, in float32
    exact     rows of the groups listed by the definition; queries of whom too much was kept even so (thousands of equal
              scores) go through the whole table, each with all processors
    order     keys to their places

Seven launches, of a large table twelve, whose sizes depend on shapes alone, so a call can be captured in a CUDA graph;
where no query was kept too much of, the five more have nothing to do and end at once. Of G groups,
a sample of s lets about k G / s pass; with s = sqrt(k G), a million rows in groups of 16 are read 1.04 times for k of
100, and a user costs 2,500 entries of 8 bytes each time, in place of a million scores. A group that is opened costs its
8 to 64 float32 rows, so groups are small where there are many queries, and may be large where there are few.

Where a scan is not worth it (few rows, k beyond an eighth of the groups or beyond 4,096), or only listed rows are
wanted, `exact` and `order` alone give the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch
import triton
from torch import Tensor

from fastdiff.kernels import score_topk_plan
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import INTERPRETED, next_power_of_2
from fastdiff.kernels.score_topk_cases import REGISTERS, RESCAN_REGISTERS, all_cases
from fastdiff.kernels.score_topk_exact import _exact_kernel, _order_kernel
from fastdiff.kernels.score_topk_plan import Plan, Sweep, plan, raise_blocks, scan_candidates
from fastdiff.kernels.score_topk_queries import FACTORS, NOT_FINITE, _prepare_kernel
from fastdiff.kernels.score_topk_scan import _rescan_kernel, _scan_kernel
from fastdiff.kernels.score_topk_select import NO_KEY, _raise_kernel
from fastdiff.kernels.tuning import Config, Problem, bucket, choose
from fastdiff.ops import topk_scan
from fastdiff.ops.score_topk import check_finite, check_rows, check_topk
from fastdiff.ops.topk_definition import from_keys
from fastdiff.ops.topk_scan import STORED, ScanTable
from fastdiff.ops.user_lists import UserLists
from fastdiff.per_object import PerObject

ORDERED = 1 << 14
"""Up to so many keys are ordered by counting, each by how many are above it; more by torch.sort."""

_table_facts: PerObject[tuple[Tensor, Tensor]] = PerObject()


def score_topk(
    query: Tensor,
    item_emb: Tensor,
    k: int,
    allowed: Tensor | None = None,
    user_exclude: UserLists | None = None,
    user_candidates: UserLists | None = None,
    scan: ScanTable | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastdiff.ops.score_topk.score_topk_ref`: the same bits."""
    check_topk(query, item_emb, k, allowed, user_exclude, user_candidates, scan)
    (n_users, dim), n_rows, device = query.shape, item_emb.shape[0], query.device
    if device.type == "cpu":  # interpreted; to look at values on a CUDA device would be to wait for it
        check_rows(n_rows, user_exclude, user_candidates)
        check_finite(query)
    rows = torch.empty(n_users, k, dtype=torch.int64, device=device)
    scores = torch.empty(n_users, k, device=device)
    if n_users == 0 or n_rows == 0:
        return rows.fill_(-1), scores.fill_(-torch.inf)
    query = query.contiguous()
    items = item_emb if item_emb.stride(1) == 1 or dim == 1 else item_emb.contiguous()
    excluded = 0 if user_exclude is None else -(-user_exclude.values.numel() // n_users)
    dtype = torch.float32 if scan is None else torch.int8 if scan.automatic else scan.dtype
    blocks = _scan_blocks(n_users, dim, dtype, device)
    queries, rows_of_tile = blocks.constants["BLOCK_Q"], blocks.constants["BLOCK_N"]
    listed = None if user_candidates is None else user_candidates.values.numel()
    processors = _processors(device)
    sizes = plan(n_users, n_rows, dim, min(k, n_rows), excluded, processors, queries, rows_of_tile, listed)
    if not sizes.group or user_candidates is not None:
        scan = None  # nothing is scanned
    else:
        scan = ScanTable.build(item_emb) if scan is None else scan.to_scan(item_emb)
    call = _Call(items, scan, allowed, user_exclude, user_candidates, n_users, sizes, blocks)
    for lo in range(0, n_users, sizes.users):
        part = slice(lo, min(lo + sizes.users, n_users))
        call.answer(query[part], lo, rows[part], scores[part])
    return rows, scores


class _Call:
    """What the slices of a call share."""

    def __init__(
        self,
        items: Tensor,
        scan: ScanTable | None,
        allowed: Tensor | None,
        exclude: UserLists | None,
        candidates: UserLists | None,
        n_users: int,
        sizes: Plan,
        blocks: Config,
    ) -> None:
        self.items, self.plan, self.blocks, self.device = items, sizes, blocks, items.device
        self.scanned = scan is not None
        self.raising = raise_blocks(min(n_users, sizes.users), _processors(items.device))
        self.sorted_exclude = exclude is not None and exclude.values.numel() > 512 * n_users
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        self.allowed = nothing if allowed is None else allowed.contiguous().view(torch.uint8)
        self.exclude = self.exclude_offsets = self.candidates = self.candidate_offsets = nothing
        if exclude is not None:
            self.exclude = _sorted(exclude, items.shape[0]) if self.sorted_exclude else exclude.values.contiguous()
            self.exclude_offsets = exclude.offsets.contiguous()
        if candidates is not None:
            self.candidates, self.candidate_offsets = (
                _sorted(candidates, items.shape[0]),
                candidates.offsets.contiguous(),
            )
        self.flags = {"HAS_ALLOWED": allowed is not None, "HAS_EXCLUDE": exclude is not None}
        self.has_candidates = candidates is not None
        self.most = len(items) if candidates is None else candidates.values.numel()  # keys of a query
        if scan is None:  # then only the types of what is passed are of interest
            scan = ScanTable(torch.float32, (items,), items, *items.shape)
            self.offsets, self.max_norm = nothing, items
        else:
            self.offsets, self.max_norm = _table_facts.get(scan, _facts_of)
        self.scan, self.stored = scan, STORED[scan.dtype]

    def answer(self, query: Tensor, first: int, out_rows: Tensor, out_scores: Tensor) -> None:
        """Of a slice of the queries, from number `first` on."""
        (n, dim), (n_rows, _), sizes, k = query.shape, self.items.shape, self.plan, out_rows.shape[1]
        kept, n_parts, dims = min(k, n_rows), self.plan.parts, -(-dim // 16) * 16
        operand = self._empty(n, dims, dtype=self._operand_dtype())
        factors, floor = self._empty(n, FACTORS.value), self._empty(n)
        state, n_found, n_open = (self._empty(n, dtype=torch.int32) for _ in range(3))
        opened = self._empty(n, sizes.opened, dtype=torch.int32)
        listed, n_listed = self._empty(2, n, dtype=torch.int32), self._empty(2, dtype=torch.int32)
        _prepare_kernel[(n,)](
            query,
            self.max_norm,
            operand,
            factors,
            floor,
            state,
            n_found,
            n_listed,
            dim,
            dims,
            ALL_FORCED=not self.scanned,
            STORED=self.stored,
            BLOCK_D=min(next_power_of_2(dims), 1024),
            num_warps=1,
        )
        exclude_offsets, candidate_offsets = self.exclude_offsets[first:], self.candidate_offsets[first:]
        sweeps = [sweep for sweep in (sizes.scan, sizes.rescan) if sweep is not None and self.scanned]
        rescanned = len(sweeps) == 2
        if sweeps:
            entries = self._empty(n, max(sweep.entries for sweep in sweeps), dtype=torch.int64)
            counts = self._empty(n, max(sweep.places for sweep in sweeps), dtype=torch.int32)
            gathered = self._empty(n, sizes.gathered, dtype=torch.int64)
        for second, sweep in enumerate(sweeps):
            for last, visited, step, start, slots in sweep.passes():
                if second:
                    part = (query, factors, floor, entries, counts, listed[0], n_listed)
                    self._rescan(part, sweep, visited, step, start, slots)
                else:
                    self._scan((operand, factors, floor), entries, counts, dim, visited, step, slots)
                _raise_kernel[(n,)](
                    entries,
                    counts,
                    exclude_offsets,
                    factors,
                    self.scan.bounds,
                    floor,
                    state,
                    gathered,
                    opened,
                    n_open,
                    listed[second],
                    n_listed[second:],
                    kept,
                    sweep.places,
                    slots,
                    sizes.gathered,
                    sizes.opened,
                    GROUP=sizes.group,
                    LAST=last,
                    SECOND=bool(second),
                    RESCANNED=rescanned,
                    CERTIFIED=self.scan.certified or bool(second),
                    HAS_EXCLUDE=self.flags["HAS_EXCLUDE"],
                    **self.raising.launch(),
                )
        width = max(n_parts * sizes.keys, sizes.forced[1] * kept if rescanned else 0)
        found = self._empty(n, width, dtype=torch.int64)
        sort = k > ORDERED or (not self.scanned and min(width, self.most) > ORDERED)
        if sort:
            found.fill_(NO_KEY.value)
        for of_list in (False, True) if rescanned else (False,):
            grid = sizes.forced if of_list else (n, n_parts)
            _exact_kernel[grid](
                query,
                self.items,
                self.scan.bounds,
                factors,
                floor,
                state,
                opened,
                n_open,
                self.allowed,
                self.exclude,
                exclude_offsets,
                self.candidates,
                candidate_offsets,
                self._empty(*grid, sizes.sifted, dtype=torch.int32),
                self._empty(*grid, sizes.keys, dtype=torch.int64),
                found,
                n_found,
                listed[1],
                n_listed[1:],
                n_rows,
                dim,
                self.items.stride(0),
                kept,
                sizes.opened,
                sizes.sifted,
                sizes.keys,
                width,
                SCANNED=self.scanned and not of_list,
                LISTED=of_list,
                FORCED_LATER=rescanned and not of_list,
                GROUP=sizes.group or 64,
                CERTIFIED=self.scan.certified,
                EXCLUDE_SORTED=self.sorted_exclude,
                HAS_CANDIDATES=self.has_candidates,
                BLOCK_R=128 * score_topk_plan.WIDER,
                BLOCK_S=128 * score_topk_plan.WIDER,
                BLOCK_D=min(next_power_of_2(dim), 64),
                BLOCK_K=256 * score_topk_plan.WIDER,
                maxnreg=REGISTERS,
                **self.flags,
            )
        if sort:
            best = found.sort(dim=1, descending=True).values[:, :kept]
            rows, scores = from_keys(torch.nn.functional.pad(best, (0, k - kept), value=NO_KEY.value))
            out_rows.copy_(rows)
            out_scores.copy_(scores.masked_fill_((state == NOT_FINITE.value)[:, None], torch.nan))
            return
        block = 128 * score_topk_plan.WIDER
        _order_kernel[(n, triton.cdiv(max(width, k), block))](
            found, n_found, state, out_rows, out_scores, k, width, BLOCK=block, BLOCK_J=32 * score_topk_plan.WIDER
        )

    def _operand_dtype(self) -> torch.dtype:
        if self.stored == STORED[torch.int8] or self.stored == STORED[torch.float16]:
            return self.scan.dtype
        # of bfloat16 numbers: the interpreter cannot compute in bfloat16
        return torch.float32 if INTERPRETED else torch.bfloat16

    def _scan(
        self,
        queries: tuple[Tensor, Tensor, Tensor],
        entries: Tensor,
        counts: Tensor,
        dim: int,
        visited: int,
        step: int,
        slots: int,
    ) -> None:
        """queries: their operand, factors and floor."""
        operand, blocks = queries[0], self.blocks
        rows = self.scan.chunks[0] if self.stored else self.items
        if INTERPRETED and self.stored == STORED[torch.bfloat16]:
            rows = rows.view(torch.int16)
        _scan_kernel[(triton.cdiv(len(operand), blocks.constants["BLOCK_Q"]), self.plan.scan.programs)](
            *queries,
            rows,
            self.offsets,
            self.scan.bounds,
            self.allowed,
            entries,
            counts,
            len(operand),
            self.scan.n_rows,
            dim,
            operand.shape[1],
            rows.stride(0),
            visited,
            step,
            slots,
            STORED=self.stored,
            WIDE=INTERPRETED,
            CERTIFIED=self.scan.certified,
            HAS_ALLOWED=self.flags["HAS_ALLOWED"],
            CHUNK=topk_scan.CHUNK if len(self.scan.chunks) > 1 else 0,
            GROUP=self.plan.group,
            ONE_STEP=dim <= blocks.constants["BLOCK_D"],
            **blocks.launch(),
        )

    def _rescan(
        self,
        queries: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        sweep: Sweep,
        visited: int,
        step: int,
        start: int,
        slots: int,
    ) -> None:
        """queries: vectors, factors, floor, entries, counts, which of them, and how many these are."""
        query, factors, floor, entries, counts, listed, n_listed = queries
        _rescan_kernel[(1, sweep.programs)](
            query,
            factors,
            floor,
            self.items,
            self.scan.bounds,
            self.allowed,
            entries,
            counts,
            listed,
            n_listed,
            self.scan.n_rows,
            query.shape[1],
            self.items.stride(0),
            start,
            step,
            visited,
            slots,
            HAS_ALLOWED=self.flags["HAS_ALLOWED"],
            GROUP=self.plan.group,
            BLOCK_Q=score_topk_plan.RESCAN_QUERIES,
            BLOCK_N=sweep.rows,
            BLOCK_D=score_topk_plan.RESCAN_DIMS,
            maxnreg=RESCAN_REGISTERS,
        )

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def _facts_of(scan: ScanTable) -> tuple[Tensor, Tensor]:
    """(how many times 16 numbers behind the first each chunk begins [chunks] int64, the largest norm [1]).

    A kernel that knows the 16 reads 16 bytes at a time; every tensor that torch allocates begins at a multiple of 64
    bytes at least."""
    size, start = 16 * scan.chunks[0].element_size(), scan.chunks[0].data_ptr()
    offsets = [(chunk.data_ptr() - start) // size for chunk in scan.chunks]
    return torch.tensor(offsets, device=scan.device), scan.bounds[:, :1].amax(0)


def _sorted(lists: UserLists, n_rows: int) -> Tensor:
    """The values of each list in ascending order; those outside the table become -1 or n_rows."""
    keys = (lists.users() << 32) + lists.values.clamp(-1, n_rows) + 1
    return (keys.sort().values & 0xFFFFFFFF) - 1


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def _scan_blocks(n_users: int, dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    dims = min(next_power_of_2(max(dim, 32)), 256)
    key = (bucket(n_users, most=1024), dims, str(dtype).removeprefix("torch."), _is_hopper(device))
    return choose("score_topk", key, scan_candidates, device)


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times."""
    hopper = _is_hopper(device)
    for dims in (64, 128):
        n_rows = 1_000_000 if device.type == "cuda" else 256  # interpreted, only the choice can be looked at
        item_emb = torch.randn(n_rows, dims, device=device)
        for dtype in topk_scan.SCAN_DTYPES:
            scan, name = ScanTable.build(item_emb, dtype), str(dtype).removeprefix("torch.")
            for n_users in (1, 32, 1024):
                query = torch.randn(n_users, dims, device=device)
                key = (n_users, dims, name, hopper)
                yield Problem("score_topk", key, scan_candidates(*key), partial(_scores, query, item_emb, scan))


def _scores(query: Tensor, item_emb: Tensor, scan: ScanTable) -> Tensor:
    return score_topk(query, item_emb, 100, scan=scan)[1]


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    return all_cases()
