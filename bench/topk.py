"""What the cases of score_topk share: the exact answer, its checks, and fastdiff's ways to find it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import GOLDEN, Absent, Gate, Options, Provider, ranking_error
from bench.inputs import some_of
from bench.ours import bindings
from fastdiff.ops.score_topk import ScanTable, score_topk
from fastdiff.ops.user_lists import dtype_name

CHECKED_QUERIES = 8
MOST_PAIRS = 1 << 31
"""Queries times items that our plain PyTorch is measured with on a GPU."""
ROUNDED_TOLERANCE = 2.0**-6
"""Inputs of 8 bits (bfloat16, int8) tell scores apart to about this much."""

SCANS = {
    "fastdiff": torch.float32,
    "fastdiff-bf16-scan": torch.bfloat16,
    "fastdiff-fp16-scan": torch.float16,
    "fastdiff-int8-scan": torch.int8,
}
OURS = tuple(SCANS)
UNCERTIFIED = {
    "fastdiff-bf16-uncertified": torch.bfloat16,
    "fastdiff-int8-uncertified": torch.int8,
}
NO_LISTS = "-no-lists"
"""The same call without the lists of the case, shown beside it."""


class Answer:
    """The exact ranking of some of the queries, by definition, and the checks against it.

    forbidden  [C, N] bool, what may not be returned to the checked queries; None: nothing
    """

    def __init__(self, query: Tensor, item_emb: Tensor, k: int, forbidden: Tensor | None = None) -> None:
        self.users = some_of(len(query), CHECKED_QUERIES)
        asked = query[self.users]
        self.scores = exact_scores(asked, item_emb)
        if forbidden is not None:
            self.scores.masked_fill_(forbidden, -torch.inf)
        self.rows = torch.sort(self.scores.float(), dim=1, descending=True, stable=True).indices[:, :k].cpu()

    def same(self, output: tuple[Tensor, Tensor]) -> Gate:
        """Ours: the same rows in the same order."""
        wrong = (output[0].cpu()[self.users] != self.rows).double().mean()
        return Gate(float(wrong), 0.0, "the rows of the exact ranking, in order")

    def close(self, output: tuple[Tensor, Tensor]) -> Gate:
        """Others: place by place, no row may be worse than the best one by more than float32 rounding."""
        return Gate(self._error(output), GOLDEN, "float64 scores, place by place")

    def rounded(self, output: tuple[Tensor, Tensor]) -> Gate:
        """Those that go by scores of rounded inputs, and promise no more."""
        return Gate(self._error(output), ROUNDED_TOLERANCE, "float64 scores, place by place, as 8 bits tell them apart")

    def _error(self, output: tuple[Tensor, Tensor]) -> float:
        return ranking_error(output[0].to(self.scores.device)[self.users], self.scores)


def exact_scores(query: Tensor, item_emb: Tensor) -> Tensor:
    """float64 `[B, N]`, summed in index order: products of float32 are exact in float64, so fused sums are the same."""
    scores = torch.zeros(query.shape[0], item_emb.shape[0], dtype=torch.float64, device=query.device)
    for i in range(query.shape[1]):
        scores.addr_(query[:, i].double(), item_emb[:, i].double())
    return scores


def build_scan(name: str, item_emb: Tensor) -> ScanTable:
    """The table that a provider of ours scans."""
    dtype = {**SCANS, **UNCERTIFIED}[name]
    return ScanTable.build(item_emb, dtype, certified=name in SCANS)


def _arithmetic(scan: ScanTable, backend: str) -> str:
    """What a scan may multiply in: the C++ engine rounds float32 rows to bfloat16 where that is faster, and proves the
    answer all the same."""
    if scan.dtype == torch.float32 and scan.certified and backend != "torch":
        return "float32 or bfloat16"
    return dtype_name(scan.dtype)


def our_topk(
    names: Iterable[str],
    query: Tensor,
    item_emb: Tensor,
    k: int,
    check: Callable[[Any], Gate],
    options: Options,
    **arguments: Any,
) -> Iterator[Provider | Absent]:
    """score_topk over `item_emb [N, D]`, once per provider of `SCANS` or `UNCERTIFIED` and way to run it."""
    for name in names:
        if not options.wants(name):
            continue
        start = time.perf_counter()
        scan = build_scan(name, item_emb)
        setup = time.perf_counter() - start
        for label, backend in bindings([score_topk], options.device).items():
            if backend == "torch" and options.device.type == "cuda" and len(query) * len(item_emb) > MOST_PAIRS:
                yield Absent(f"{name}[{label}]", "plain PyTorch takes many seconds at this size")
                continue
            op = score_topk.bind(backend, options.device)
            yield Provider(
                name,
                partial(op, query, item_emb, k, scan=scan, **arguments),
                check,
                backend=label,
                flops=2.0 * len(query) * item_emb.numel(),
                bytes=float(item_emb.numel() * scan.dtype.itemsize),
                arithmetic=_arithmetic(scan, label),
                setup=setup,
                approximate=name in UNCERTIFIED,
            )
