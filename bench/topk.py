"""What the cases of score_topk share: the exact answer, its checks, and fastdiff's ways to find it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import GOLDEN, Gate, Options, Provider, ranking_error
from bench.inputs import some_of
from bench.ours import bindings
from fastdiff.ops.score_topk import SCAN_DTYPES, ScanTable, score_topk
from fastdiff.ops.user_lists import dtype_name

CHECKED_QUERIES = 8
BF16_TOLERANCE = 2.0**-6
"""Inputs and scores that are rounded to bfloat16, 8 bits each, tell scores apart to about this much."""

SCANS = {
    torch.float32: "fastdiff",
    torch.bfloat16: "fastdiff-bf16-scan",
    torch.int8: "fastdiff-int8-scan",
}
OURS = tuple(SCANS[dtype] for dtype in SCAN_DTYPES if dtype in SCANS)
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
        self.rows = torch.sort(self.scores.float(), dim=1, descending=True, stable=True).indices[:, :k]

    def same(self, output: tuple[Tensor, Tensor]) -> Gate:
        """Ours: the same rows in the same order."""
        wrong = (output[0].cpu()[self.users] != self.rows).double().mean()
        return Gate(float(wrong), 0.0, "the rows of the exact ranking, in order")

    def close(self, output: tuple[Tensor, Tensor]) -> Gate:
        """Others: place by place, no row may be worse than the best one by more than float32 rounding."""
        return Gate(self._error(output), GOLDEN, "float64 scores, place by place")

    def within_bf16(self, output: tuple[Tensor, Tensor]) -> Gate:
        """Those that score in bfloat16, and promise no more."""
        return Gate(self._error(output), BF16_TOLERANCE, "float64 scores, place by place, as bfloat16 tells them apart")

    def _error(self, output: tuple[Tensor, Tensor]) -> float:
        return ranking_error(output[0].cpu()[self.users], self.scores)


def exact_scores(query: Tensor, item_emb: Tensor) -> Tensor:
    """float64 `[B, N]`, summed in index order."""
    scores = torch.zeros(query.shape[0], item_emb.shape[0], dtype=torch.float64)
    for i in range(query.shape[1]):
        scores.addr_(query[:, i].double(), item_emb[:, i].double())
    return scores


def our_topk(
    query: Tensor, item_emb: Tensor, k: int, check: Callable[[Any], Gate], options: Options, **arguments: Any
) -> Iterator[Provider]:
    """score_topk over `item_emb [N, D]`, once per dtype of the scan and way to run it."""
    flops, at_float32 = 2.0 * len(query) * item_emb.numel(), 4.0 * item_emb.numel()
    for dtype in SCAN_DTYPES:
        if dtype not in SCANS or not options.wants(SCANS[dtype]):
            continue
        start = time.perf_counter()
        scan = ScanTable.build(item_emb, dtype)
        setup = time.perf_counter() - start
        for label, backend in bindings([score_topk], options.device).items():
            op = score_topk.bind(backend, options.device)
            yield Provider(
                SCANS[dtype],
                partial(op, query, item_emb, k, scan=scan, **arguments),
                check,
                backend=label,
                flops=flops,
                bytes=at_float32 * dtype.itemsize / 4,
                arithmetic=dtype_name(dtype),
                setup=setup,
            )
