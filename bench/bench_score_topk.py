"""score_topk: the K best of N items for each query, dot product, D = 64.

Ours returns the exact ranking, defined by float64 scores rounded once to float32, ties to the lower row, and is held to
that: the same rows in the same order. Others are held to scores: place by place, no row may be worse than the best one
by more than float32 rounding. The same random items and queries serve all: no structure that pruning could use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import Faiss, compiled, static_compile, torch_topk, why_no_faiss
from bench.cases import GOLDEN, Absent, Case, Gate, Options, Provider, bindings, draw_noise, ranking_error
from fastdiff.ops.score_topk import ScanTable, score_topk

CHECKED_QUERIES = 8
OTHERS = ("torch-topk", "torch-topk-compiled", "faiss", "faiss-tuned")
OURS = ("fastdiff", "fastdiff-bf16-scan")


def exact_ranking(query: Tensor, item_emb: Tensor, k: int) -> Tensor:
    """Rows `[B, k]` by definition: float64 scores summed in index order, rounded to float32, ties to the lower row."""
    scores = torch.zeros(query.shape[0], item_emb.shape[0], dtype=torch.float64)
    for i in range(query.shape[1]):
        scores += query[:, i : i + 1].double() * item_emb[:, i].double()
    return torch.sort(scores.float(), dim=1, descending=True, stable=True).indices[:, :k]


def providers(n_items: int, k: int, batch: int, dim: int, options: Options) -> Iterator[Provider | Absent]:
    device = options.device
    item_emb, query = draw_noise(n_items, dim, seed=3), draw_noise(batch, dim, seed=4)
    users = torch.arange(0, batch, max(1, batch // CHECKED_QUERIES))
    truth = exact_ranking(query[users], item_emb, k)
    scores = query[users].double() @ item_emb.double().T
    count = partial(Provider, flops=2.0 * batch * n_items * dim)
    fp32_bytes = 4.0 * n_items * dim

    def close(output: tuple[Tensor, Tensor]) -> Gate:
        return Gate(ranking_error(output[0].cpu()[users], scores), GOLDEN, "float64 scores, place by place")

    def same(output: tuple[Tensor, Tensor]) -> Gate:
        wrong = (output[0].cpu()[users] != truth).double().mean()
        return Gate(float(wrong), 0.0, "the rows of the exact ranking, in order")

    table, asked = item_emb.to(device), query.to(device)
    yield count("torch-topk", partial(torch_topk, asked, table, k), close, bytes=fp32_bytes)
    missing = compiled(options, "torch-topk-compiled")
    if missing is None:
        faster = partial(static_compile(torch_topk), asked, table, k)
        yield count("torch-topk-compiled", faster, close, bytes=fp32_bytes)
    else:
        yield missing

    reason = why_no_faiss(device)
    for name, tuned in (("faiss", False), ("faiss-tuned", True)):
        if reason is not None:
            yield Absent(name, reason)
        elif options.wants(name):
            yield count(name, partial(Faiss(item_emb, tuned).search, query, k), close, bytes=fp32_bytes)

    for name, dtype in (("fastdiff", torch.float32), ("fastdiff-bf16-scan", torch.bfloat16)):
        if not options.wants(name):
            continue
        start = time.perf_counter()
        scan = ScanTable.build(table, dtype)
        setup = time.perf_counter() - start
        for label, backend in bindings([score_topk], device).items():
            op = score_topk.bind(backend, device)
            run = partial(op, asked, table, k, scan=scan)
            yield count(name, run, same, backend=label, bytes=fp32_bytes * scan.rows.element_size() / 4, setup=setup)


def score_topk_case(n_items: int, k: int, batch: int, dim: int = 64, heavy: bool = False) -> Case:
    params: dict[str, int | str] = {"items": n_items, "k": k, "batch": batch}
    setting = f"queries to the k best items, D = {dim}, float32"
    build = partial(providers, n_items, k, batch, dim)
    return Case("score_topk", params, setting, build, (score_topk,), OTHERS, OURS, heavy)


CASES = [
    score_topk_case(n_items, k, batch, heavy=n_items * batch > 10**8)
    for n_items, k in ((12_101, 20), (100_000, 100), (1_000_000, 100))
    for batch in (1, 32, 256)
]


def test_score_topk(contender: Any) -> None:
    contender()
