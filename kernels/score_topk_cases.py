"""What is compiled ahead of time of score_topk's kernels: each as every call of the launcher may ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product

import torch

from fastdiff.kernels import score_topk_plan
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.score_topk_exact import _exact_kernel, _order_kernel
from fastdiff.kernels.score_topk_plan import raise_blocks, scan_candidates, widest_group
from fastdiff.kernels.score_topk_queries import _prepare_kernel
from fastdiff.kernels.score_topk_scan import _rescan_kernel, _scan_kernel
from fastdiff.kernels.score_topk_select import _raise_kernel
from fastdiff.ops import topk_scan
from fastdiff.ops.topk_scan import STORED

REGISTERS = 168
"""That a thread of the exact kernel may have, three blocks of four warps to a processor: without a bound, it spills."""
RESCAN_REGISTERS = 255
"""And one of the second scan, which is rare."""

_STORED_AS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*u8"}
_MULTIPLIED_AS = {torch.float32: "*bf16", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}


def all_cases() -> Iterator[Case]:
    yield from _scan_cases()
    yield from _exact_cases()
    for dtype, stored in STORED.items():
        yield Case(
            f"prepare {_name(dtype)} D=128",
            _prepare_kernel,
            {
                **dict.fromkeys(("p_query", "p_max_norm", "p_factors", "p_floor"), "*fp32"),
                "p_operand": _MULTIPLIED_AS[dtype],
                **dict.fromkeys(("p_state", "p_n_found", "p_n_listed"), "*i32"),
                **dict.fromkeys(("dim", "operand_dim"), "i32"),
            },
            {"ALL_FORCED": False, "STORED": stored, "BLOCK_D": 128},
            {"num_warps": 1},
        )
    for last, second, few in product((False, True), repeat=3):
        blocks = raise_blocks(1 if few else 2048, 132)
        yield Case(
            f"raise{' second' if second else ''}{' last' if last else ''} W={blocks.num_warps}",
            _raise_kernel,
            {
                **dict.fromkeys(("p_entries", "p_exclude_offsets", "p_gathered"), "*i64"),
                **dict.fromkeys(("p_counts", "p_state", "p_open", "p_n_open", "p_listed", "p_n_listed"), "*i32"),
                **dict.fromkeys(("p_factors", "p_bounds", "p_floor"), "*fp32"),
                **dict.fromkeys(("k", "n_places", "slots", "gather_width", "open_width"), "i32"),
            },
            {
                "GROUP": 64,
                "LAST": last,
                "SECOND": second,
                "RESCANNED": True,
                "CERTIFIED": True,
                "HAS_EXCLUDE": True,
                **blocks.constants,
            },
            blocks.options(),
            divisible=("p_entries", "p_gathered", "p_open", "p_factors", "p_bounds", "p_floor"),
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


def _scan_cases() -> Iterator[Case]:
    for dim, n_users, hopper in product((64, 128, 256), (1, 64, 128, 1024), (True, False)):
        for dtype, stored in STORED.items():
            candidates = scan_candidates(n_users, dim, _name(dtype), hopper)
            first = ((candidates[0], allowed) for allowed in (False, True))
            others = ((config, False) for config in candidates[1:] if dim <= 128)
            for config, allowed in chain(first, others):
                queries, rows = config.constants["BLOCK_Q"], config.constants["BLOCK_N"]
                yield Case(
                    f"scan {_name(dtype)} B={n_users} D={dim} Q={queries} N={rows} S={config.num_stages}"
                    + (" allowed" if allowed else ""),
                    _scan_kernel,
                    {
                        "p_operand": _MULTIPLIED_AS[dtype],
                        "p_rows": _STORED_AS[dtype],
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
                        "HAS_ALLOWED": allowed,
                        "CHUNK": topk_scan.CHUNK if stored else 0,
                        "GROUP": widest_group(n_users, rows),
                        "ONE_STEP": dim <= 128,
                        **config.constants,
                    },
                    config.options(),
                    hot=dim <= 128 and not allowed,
                    tensor_core=True,
                    divisible=("p_operand", "p_rows", "p_chunks", "p_entries", "dim", "operand_dim", "row_stride"),
                    archs=(90,) if hopper else (80, 100),
                )
    for group in (64, 32, 16, 8):
        yield Case(
            f"rescan G={group}",
            _rescan_kernel,
            {
                **dict.fromkeys(("p_query", "p_factors", "p_floor", "p_items", "p_bounds"), "*fp32"),
                "p_allowed": "*u8",
                "p_entries": "*i64",
                **dict.fromkeys(("p_counts", "p_listed", "p_n_listed"), "*i32"),
                **dict.fromkeys(("n_rows", "dim", "item_stride", "start", "step", "n_visited", "slots"), "i32"),
            },
            {
                "HAS_ALLOWED": True,
                "GROUP": group,
                "BLOCK_Q": score_topk_plan.RESCAN_QUERIES,
                "BLOCK_N": score_topk_plan.RESCAN_ROWS,
                "BLOCK_D": score_topk_plan.RESCAN_DIMS,
            },
            {"maxnreg": RESCAN_REGISTERS},
            divisible=("p_query", "p_items", "p_entries", "dim", "item_stride"),
        )


def _exact_cases() -> Iterator[Case]:
    for kind, group, sorted_lists in (
        ("", 64, False),
        ("candidates", 64, True),
        ("scanned", 64, False),
        ("scanned", 32, True),
        ("scanned", 16, True),
        ("scanned", 8, False),
        ("listed", 64, True),
        ("listed", 16, False),
    ):
        yield Case(
            f"exact {kind} G={group}{' sorted' if sorted_lists else ''}",
            _exact_kernel,
            {
                **dict.fromkeys(("p_query", "p_items", "p_bounds", "p_factors", "p_floor"), "*fp32"),
                **dict.fromkeys(("p_state", "p_open", "p_n_open", "p_sifted", "p_n_found"), "*i32"),
                **dict.fromkeys(("p_listed", "p_n_listed"), "*i32"),
                "p_allowed": "*u8",
                **dict.fromkeys(("p_exclude", "p_exclude_offsets", "p_candidates"), "*i64"),
                **dict.fromkeys(("p_candidate_offsets", "p_keys", "p_found"), "*i64"),
                **dict.fromkeys(("n_rows", "dim", "item_stride", "k"), "i32"),
                **dict.fromkeys(("open_width", "sift_width", "key_width", "found_width"), "i32"),
            },
            {
                "SCANNED": kind == "scanned",
                "LISTED": kind == "listed",
                "FORCED_LATER": kind == "scanned",
                "GROUP": group,
                "CERTIFIED": group != 8,
                "HAS_ALLOWED": True,
                "HAS_EXCLUDE": True,
                "EXCLUDE_SORTED": sorted_lists,
                "HAS_CANDIDATES": kind == "candidates",
                "BLOCK_R": 128,
                "BLOCK_S": 128,
                "BLOCK_D": 64,
                "BLOCK_K": 256,
            },
            {"maxnreg": REGISTERS},
            divisible=("p_query", "p_items", "dim", "item_stride"),
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
