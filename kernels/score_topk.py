"""score_topk in Triton: scan, open, score by the definition, order; nothing waits for the device.

    prepare   the queries in the form of the product, with the factors of their slack
    scan      a strided sample of the table, the highest score of each group of rows, less its slack
    raise     floor = the k-th best of these, a score that k rows surely reach: k different groups hold one each
    scan      the whole table: only groups whose highest score, and its slack, reach the floor are kept
    raise     the floor once more, from what is kept; the groups left are listed, hardly more than k
    exact     rows of these groups by the definition; queries of whom too much was kept go through the whole table
    order     keys to their places

Seven launches, whose sizes depend on shapes alone, so a call can be captured in a CUDA graph. Of G groups,
a sample of s lets about k G / s pass; with s = sqrt(k G), a million rows in groups of 16 are read 1.04 times for k of
100, and a user costs 2,500 entries of 8 bytes each time, in place of a million scores. A group that is opened costs its
8 to 64 float32 rows, so groups are small where there are many queries, and may be large where there are few.

Where a scan is not worth it (few rows, k beyond an eighth of the groups or beyond 4,096), or only listed rows are
wanted, `exact` and `order` alone give the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
from torch import Tensor

from fastdiff.kernels import score_topk_plan
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import INTERPRETED, next_power_of_2
from fastdiff.kernels.score_topk_exact import NO_KEY, _exact_kernel, _order_kernel, _raise_kernel
from fastdiff.kernels.score_topk_plan import Plan, plan, scan_blocks
from fastdiff.kernels.score_topk_scan import FACTORS, NOT_FINITE, _prepare_kernel, _scan_kernel
from fastdiff.ops import topk_scan
from fastdiff.ops.score_topk import check_finite, check_rows, check_topk
from fastdiff.ops.topk_definition import from_keys
from fastdiff.ops.topk_scan import STORED, ScanTable
from fastdiff.ops.user_lists import UserLists
from fastdiff.per_object import PerObject

ORDERED = 1 << 14
"""Up to this k, keys are ordered by counting; beyond it by torch.sort."""

_REGISTERS = 168
"""That a thread of the exact kernel may have, three blocks of four warps to a processor: without a bound, it spills."""

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
    scan = ScanTable.build(item_emb) if scan is None else scan.to_scan(item_emb)
    excluded = 0 if user_exclude is None else -(-user_exclude.values.numel() // n_users)
    sizes = plan(n_users, n_rows, dim, min(k, n_rows), excluded, _processors(device))
    call = _Call(items, scan, allowed, user_exclude, user_candidates, n_users, sizes)
    for lo in range(0, n_users, sizes.users):
        part = slice(lo, min(lo + sizes.users, n_users))
        call.answer(query[part], lo, rows[part], scores[part])
    return rows, scores


class _Call:
    """What the slices of a call share."""

    def __init__(
        self,
        items: Tensor,
        scan: ScanTable,
        allowed: Tensor | None,
        exclude: UserLists | None,
        candidates: UserLists | None,
        n_users: int,
        sizes: Plan,
    ) -> None:
        self.items, self.scan, self.plan, self.device = items, scan, sizes, items.device
        self.scanned = bool(sizes.group) and candidates is None
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
        self.stored = STORED[scan.dtype]
        self.offsets, self.max_norm = _table_facts.get(scan, _facts_of)

    def answer(self, query: Tensor, first: int, out_rows: Tensor, out_scores: Tensor) -> None:
        """Of a slice of the queries, from number `first` on."""
        (n, dim), (n_rows, _), sizes, k = query.shape, self.items.shape, self.plan, out_rows.shape[1]
        kept, n_parts, dims = min(k, n_rows), self.plan.parts, -(-dim // 16) * 16
        operand_dtype = torch.int8 if self.stored == STORED[torch.int8] else torch.bfloat16
        if INTERPRETED and operand_dtype == torch.bfloat16:
            operand_dtype = torch.float32  # of bfloat16 numbers: the interpreter cannot compute in bfloat16
        operand = self._empty(n, dims, dtype=operand_dtype)
        factors, floor = self._empty(n, FACTORS.value), self._empty(n)
        state, n_found, n_open = (self._empty(n, dtype=torch.int32) for _ in range(3))
        opened = self._empty(n, sizes.opened, dtype=torch.int32)
        _prepare_kernel[(n,)](
            query,
            self.max_norm,
            operand,
            factors,
            floor,
            state,
            n_found,
            dim,
            dims,
            ALL_FORCED=not self.scanned,
            STORED=self.stored,
            BLOCK_D=min(next_power_of_2(dims), 1024),
            num_warps=1,
        )
        exclude_offsets, candidate_offsets = self.exclude_offsets[first:], self.candidate_offsets[first:]
        if self.scanned:
            most = sizes.programs * max(sizes.slots, sizes.sample_slots)
            entries = self._empty(n, most, dtype=torch.int64)
            counts = self._empty(n, sizes.programs, dtype=torch.int32)
            gathered = self._empty(n, sizes.gathered, dtype=torch.int64)
            for last, visited, step, slots in (
                (False, sizes.visited, sizes.step, sizes.sample_slots),
                (True, sizes.tiles, 1, sizes.slots),
            ):
                self._scan(operand, factors, floor, entries, counts, dim, visited, step, slots)
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
                    kept,
                    sizes.programs,
                    slots,
                    sizes.gathered,
                    sizes.opened,
                    GROUP=sizes.group,
                    LAST=last,
                    CERTIFIED=self.scan.certified,
                    HAS_EXCLUDE=self.flags["HAS_EXCLUDE"],
                    BLOCK=256 * score_topk_plan.WIDER,
                )
        width = n_parts * sizes.keys
        found = self._empty(n, width, dtype=torch.int64)
        if k > ORDERED:
            found.fill_(NO_KEY.value)
        _exact_kernel[(n, n_parts)](
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
            self._empty(n, n_parts, sizes.sifted, dtype=torch.int32),
            self._empty(n, n_parts, sizes.keys, dtype=torch.int64),
            found,
            n_found,
            n_rows,
            dim,
            self.items.stride(0),
            kept,
            sizes.opened,
            sizes.sifted,
            sizes.keys,
            width,
            SCANNED=self.scanned,
            GROUP=sizes.group or 64,
            CERTIFIED=self.scan.certified,
            EXCLUDE_SORTED=self.sorted_exclude,
            HAS_CANDIDATES=self.has_candidates,
            BLOCK_R=128 * score_topk_plan.WIDER,
            BLOCK_S=64 * score_topk_plan.WIDER,
            BLOCK_D=min(next_power_of_2(dim), 64),
            BLOCK_K=256 * score_topk_plan.WIDER,
            maxnreg=_REGISTERS,
            **self.flags,
        )
        if k > ORDERED:
            best = found.sort(dim=1, descending=True).values[:, :kept]
            rows, scores = from_keys(torch.nn.functional.pad(best, (0, k - kept), value=NO_KEY.value))
            out_rows.copy_(rows)
            out_scores.copy_(scores.masked_fill_((state == NOT_FINITE.value)[:, None], torch.nan))
            return
        block = 128 * score_topk_plan.WIDER
        _order_kernel[(n, triton.cdiv(max(width, k), block))](
            found, n_found, state, out_rows, out_scores, k, width, BLOCK=block, BLOCK_J=32 * score_topk_plan.WIDER
        )

    def _scan(
        self,
        operand: Tensor,
        factors: Tensor,
        floor: Tensor,
        entries: Tensor,
        counts: Tensor,
        dim: int,
        visited: int,
        step: int,
        slots: int,
    ) -> None:
        n, blocks = len(operand), self.plan.blocks
        rows = self.scan.chunks[0] if self.stored else self.items
        if INTERPRETED and self.stored == STORED[torch.bfloat16]:
            rows = rows.view(torch.int16)
        _scan_kernel[(triton.cdiv(n, blocks.queries), self.plan.programs)](
            operand,
            factors,
            floor,
            rows,
            self.offsets,
            self.scan.bounds,
            self.allowed,
            entries,
            counts,
            n,
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
            ITEMS_FIRST=blocks.items_first,
            CHUNK=topk_scan.CHUNK if len(self.scan.chunks) > 1 else 0,
            GROUP=self.plan.group,
            BLOCK_Q=blocks.queries,
            BLOCK_N=blocks.rows,
            BLOCK_D=blocks.dims,
            ONE_STEP=dim <= blocks.dims,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            maxnreg=blocks.maxnreg,
        )

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def _facts_of(scan: ScanTable) -> tuple[Tensor, Tensor]:
    """(how many numbers behind the first each chunk begins [chunks] int64, the largest norm [1]), on the device."""
    size, start = scan.chunks[0].element_size(), scan.chunks[0].data_ptr()
    offsets = [(chunk.data_ptr() - start) // size for chunk in scan.chunks]
    return torch.tensor(offsets, device=scan.device), scan.bounds[:, :1].amax(0)


def _sorted(lists: UserLists, n_rows: int) -> Tensor:
    """The values of each list in ascending order; those outside the table become -1 or n_rows."""
    keys = (lists.users() << 32) + lists.values.clamp(-1, n_rows) + 1
    return (keys.sort().values & 0xFFFFFFFF) - 1


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    flags = {"HAS_ALLOWED": True, "HAS_EXCLUDE": True}
    stored_as = {0: "*fp32", 1: "*bf16", 2: "*u8"}
    for dim in (64, 128):
        for n_users, n_rows in ((1, 1_000_000), (32, 1_000_000), (1024, 1_000_000), (32, 12_000), (1024, 12_000)):
            for dtype, stored in STORED.items():
                sizes, blocks = plan(n_users, n_rows, dim, 100, 0, 132), scan_blocks(n_users, dim)
                name = f"{str(dtype).removeprefix('torch.')} B={n_users} N={n_rows} D={dim}"
                yield Case(
                    f"scan {name}",
                    _scan_kernel,
                    {
                        "p_operand": "*i8" if stored == STORED[torch.int8] else "*bf16",
                        "p_rows": stored_as[stored],
                        "p_chunks": "*i64",
                        **dict.fromkeys(("p_factors", "p_floor", "p_bounds"), "*fp32"),
                        "p_allowed": "*u8",
                        "p_entries": "*i64",
                        "p_counts": "*i32",
                        **dict.fromkeys(("n_queries", "n_rows", "dim", "operand_dim"), "i32"),
                        **dict.fromkeys(("row_stride", "n_visited", "step", "slots"), "i32"),
                    },
                    {
                        "STORED": stored,
                        "WIDE": False,
                        "CERTIFIED": True,
                        "HAS_ALLOWED": n_users > 1,
                        "ITEMS_FIRST": blocks.items_first,
                        "CHUNK": topk_scan.CHUNK if stored and n_rows > topk_scan.CHUNK else 0,
                        "GROUP": sizes.group,
                        "BLOCK_Q": blocks.queries,
                        "BLOCK_N": blocks.rows,
                        "BLOCK_D": blocks.dims,
                        "ONE_STEP": True,
                    },
                    {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, "maxnreg": blocks.maxnreg},
                    tensor_core=True,
                    divisible=("p_operand", "p_rows", "p_chunks", "p_entries", "dim", "operand_dim", "row_stride"),
                )
        for scanned, group, candidates, sorted_lists in (
            (False, 64, False, False),
            (False, 64, True, True),
            (True, 64, False, False),
            (True, 16, False, True),
            (True, 8, False, False),
        ):
            listed = " listed" if candidates else " scanned" if scanned else ""
            yield Case(
                f"exact D={dim}{listed} G={group}{' sorted' if sorted_lists else ''}",
                _exact_kernel,
                {
                    **dict.fromkeys(("p_query", "p_items", "p_bounds", "p_factors", "p_floor"), "*fp32"),
                    **dict.fromkeys(("p_state", "p_open", "p_n_open", "p_sifted", "p_n_found"), "*i32"),
                    "p_allowed": "*u8",
                    **dict.fromkeys(("p_exclude", "p_exclude_offsets", "p_candidates"), "*i64"),
                    **dict.fromkeys(("p_candidate_offsets", "p_keys", "p_found"), "*i64"),
                    **dict.fromkeys(("n_rows", "dim", "item_stride", "k"), "i32"),
                    **dict.fromkeys(("open_width", "sift_width", "key_width", "found_width"), "i32"),
                },
                {
                    "SCANNED": scanned,
                    "GROUP": group,
                    "CERTIFIED": group != 8,
                    **flags,
                    "EXCLUDE_SORTED": sorted_lists,
                    "HAS_CANDIDATES": candidates,
                    "BLOCK_R": 128,
                    "BLOCK_S": 64,
                    "BLOCK_D": 64,
                    "BLOCK_K": 256,
                },
                {"maxnreg": _REGISTERS},
                divisible=("p_query", "p_items", "dim", "item_stride"),
            )
    for dtype, stored in STORED.items():
        yield Case(
            f"prepare {str(dtype).removeprefix('torch.')} D=128",
            _prepare_kernel,
            {
                **dict.fromkeys(("p_query", "p_max_norm", "p_factors", "p_floor"), "*fp32"),
                "p_operand": "*i8" if stored == STORED[torch.int8] else "*bf16",
                **dict.fromkeys(("p_state", "p_n_found"), "*i32"),
                **dict.fromkeys(("dim", "operand_dim"), "i32"),
            },
            {"ALL_FORCED": False, "STORED": stored, "BLOCK_D": 128},
            {"num_warps": 1},
        )
    for last in (False, True):
        yield Case(
            f"raise{' last' if last else ''}",
            _raise_kernel,
            {
                **dict.fromkeys(("p_entries", "p_exclude_offsets", "p_gathered"), "*i64"),
                **dict.fromkeys(("p_counts", "p_state", "p_open", "p_n_open"), "*i32"),
                **dict.fromkeys(("p_factors", "p_bounds", "p_floor"), "*fp32"),
                **dict.fromkeys(("k", "n_programs", "slots", "gather_width", "open_width"), "i32"),
            },
            {"GROUP": 64, "LAST": last, "CERTIFIED": True, "HAS_EXCLUDE": True, "BLOCK": 256},
        )
    yield Case(
        "order",
        _order_kernel,
        {
            **dict.fromkeys(("p_found", "p_out_rows"), "*i64"),
            **dict.fromkeys(("p_n_found", "p_state"), "*i32"),
            "p_out_scores": "*fp32",
            **dict.fromkeys(("k", "found_width"), "i32"),
        },
        {"BLOCK": 128, "BLOCK_J": 32},
    )
