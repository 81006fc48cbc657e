"""score_topk: the K best of N items for each query, by dot product.

Ours returns the exact ranking, defined by float64 scores rounded once to float32, ties to the lower row, and is held to
that: the same rows in the same order, whatever the scan reads. Others are held to scores: place by place, no row may be
worse than the best one by more than float32 rounding. Torch in bfloat16 and our uncertified scans promise less; they
are compared apart. The same random items and queries serve all: no structure that pruning could use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import Calls, Wrap, eager_and_compiled
from bench.cases import Absent, Case, Options, Provider
from bench.inputs import draw_items, draw_noise
from bench.retrieval import (
    Faiss,
    Found,
    Implicit,
    in_int8,
    torch_topk,
    torch_topk_int8,
    torch_topk_tiles,
    usearch_exact,
    users_at_once,
    why_not,
)
from bench.topk import OURS, UNCERTIFIED, Answer, our_topk
from fastdiff.ops.score_topk import score_topk

OTHERS = (
    "torch-topk",
    "torch-topk-compiled",
    "torch-topk-bf16",
    "torch-topk-bf16-compiled",
    "torch-topk-tiles",
    "torch-topk-bf16-tiles",
    "torch-topk-int8",
    "faiss",
    "faiss-tuned",
    "implicit",
    "usearch",
)


def providers(n_items: int, k: int, batch: int, dim: int, options: Options) -> Iterator[Provider | Absent]:
    device = options.device
    item_emb, query = draw_items(n_items, dim, device), draw_noise(batch, dim, seed=4)
    table, asked = item_emb, query.to(device)
    answer = Answer(asked, table, k)
    flops, table_bytes = 2.0 * batch * n_items * dim, 4.0 * n_items * dim

    def by_torch(asked: Tensor, table: Tensor, wrap: Wrap) -> Calls:
        parts = asked.split(users_at_once(batch, n_items, asked.element_size(), device))
        return in_parts(wrap(torch_topk), parts, table, k), None

    make = partial(by_torch, asked, table)
    yield from eager_and_compiled("torch-topk", make, answer.close, options, flops=flops, bytes=table_bytes)
    make = partial(by_torch, asked.bfloat16(), table.bfloat16())
    less = {"flops": flops, "bytes": table_bytes / 2, "arithmetic": "bfloat16", "approximate": True}
    yield from eager_and_compiled("torch-topk-bf16", make, answer.rounded, options, **less)

    if device.type == "cuda":
        yield from other_selections(asked, table, k, answer, flops)
    packages = {
        "faiss": ("faiss", lambda: Faiss(item_emb, tuned=False).search),
        "faiss-tuned": ("faiss", lambda: Faiss(item_emb, tuned=True).search),
        "implicit": ("implicit", lambda: Implicit(item_emb).search),
        "usearch": ("usearch", lambda: lambda query, k: usearch_exact(query, item_emb, k)),
    }
    for name, (module, build) in packages.items():
        reason = why_not(module, device)
        if reason is not None:
            yield Absent(name, reason)
        elif options.wants(name):
            yield Provider(name, partial(build(), query, k), answer.close, flops=flops, bytes=table_bytes)

    yield from our_topk(OURS, asked, table, k, answer.same, options)
    yield from our_topk(UNCERTIFIED, asked, table, k, answer.rounded, options)


def in_parts(search: Callable[..., Found], parts: Sequence[Any], table: Any, k: int) -> Callable[[], Found]:
    """A call that searches for some queries after others."""
    if len(parts) == 1:
        return partial(search, parts[0], table, k)

    def run() -> Found:
        rows, scores = zip(*(search(part, table, k) for part in parts), strict=True)
        return torch.cat(rows), torch.cat(scores)

    return run


def other_selections(query: Tensor, table: Tensor, k: int, answer: Answer, flops: float) -> Iterator[Provider]:
    """The best selections from a matrix of scores that we could write in PyTorch, on a GPU."""

    def parts_of(rows: Tensor) -> tuple[Tensor, ...]:
        # scores of int8 are int32, and float32 once they are scaled
        return rows.split(users_at_once(len(query), len(table), max(2, rows.element_size()), table.device))

    run = in_parts(torch_topk_tiles, parts_of(query), table, k)
    yield Provider("torch-topk-tiles", run, answer.close, flops=flops, bytes=4.0 * table.numel())
    less: dict[str, Any] = {"flops": flops, "approximate": True}
    run = in_parts(torch_topk_tiles, parts_of(query.bfloat16()), table.bfloat16(), k)
    facts = {**less, "bytes": 2.0 * table.numel(), "arithmetic": "bfloat16"}
    yield Provider("torch-topk-bf16-tiles", run, answer.rounded, **facts)
    asked = list(zip(*(parts_of(part) for part in in_int8(query)), strict=True))
    run = in_parts(torch_topk_int8, asked, in_int8(table), k)
    yield Provider("torch-topk-int8", run, answer.rounded, **less, bytes=float(table.numel()), arithmetic="int8")


def score_topk_case(n_items: int, k: int, batch: int, dim: int = 64, only_on: str | None = None) -> Case:
    params: dict[str, int | str] = {"items": n_items, "dim": dim, "k": k, "batch": batch}
    build = partial(providers, n_items, k, batch, dim)
    ours, setting = (*OURS, *UNCERTIFIED), "queries to the k best items"
    return Case("score_topk", params, setting, build, (score_topk,), OTHERS, ours, only_on=only_on)


SIZES = ((12_101, 64, 20), (100_000, 64, 100), (1_000_000, 64, 100), (1_000_000, 128, 100))
GPU_SIZES = tuple((n_items, dim) for n_items in (10**7, 10**6) for dim in (64, 128))
CASES = [
    *(score_topk_case(n_items, k, batch, dim, "cpu") for n_items, dim, k in SIZES for batch in (1, 32, 256)),
    *(score_topk_case(n_items, 100, batch, dim, "cuda") for n_items, dim in GPU_SIZES for batch in (1, 32, 1024, 8192)),
]
