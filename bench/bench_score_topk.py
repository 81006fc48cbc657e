"""score_topk: the K best of N items for each query, by dot product.

Ours returns the exact ranking, defined by float64 scores rounded once to float32, ties to the lower row, and is held to
that: the same rows in the same order, whatever the scan reads. Others are held to scores: place by place, no row may be
worse than the best one by more than float32 rounding. Torch in bfloat16 and our uncertified scans promise less; they
are compared apart. The same random items and queries serve all: no structure that pruning could use.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from bench.baselines import Calls, Wrap, eager_and_compiled
from bench.cases import Absent, Case, Options, Provider
from bench.inputs import draw_items, draw_noise
from bench.retrieval import Faiss, Implicit, torch_topk, usearch_exact, why_not
from bench.topk import OURS, UNCERTIFIED, Answer, our_topk
from fastdiff.ops.score_topk import score_topk

OTHERS = (
    "torch-topk",
    "torch-topk-compiled",
    "torch-topk-bf16",
    "torch-topk-bf16-compiled",
    "faiss",
    "faiss-tuned",
    "implicit",
    "usearch",
)


def providers(n_items: int, k: int, batch: int, dim: int, options: Options) -> Iterator[Provider | Absent]:
    device = options.device
    item_emb, query = draw_items(n_items, dim), draw_noise(batch, dim, seed=4)
    answer = Answer(query, item_emb, k)
    flops, table_bytes = 2.0 * batch * n_items * dim, 4.0 * n_items * dim
    table, asked = item_emb.to(device), query.to(device)

    def by_torch(asked: Tensor, table: Tensor, wrap: Wrap) -> Calls:
        return partial(wrap(torch_topk), asked, table, k), None

    make = partial(by_torch, asked, table)
    yield from eager_and_compiled("torch-topk", make, answer.close, options, flops=flops, bytes=table_bytes)
    make = partial(by_torch, asked.bfloat16(), table.bfloat16())
    less = {"flops": flops, "bytes": table_bytes / 2, "arithmetic": "bfloat16", "approximate": True}
    yield from eager_and_compiled("torch-topk-bf16", make, answer.rounded, options, **less)

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


def score_topk_case(n_items: int, k: int, batch: int, dim: int = 64) -> Case:
    params: dict[str, int | str] = {"items": n_items, "dim": dim, "k": k, "batch": batch}
    build = partial(providers, n_items, k, batch, dim)
    return Case(
        "score_topk", params, "queries to the k best items", build, (score_topk,), OTHERS, (*OURS, *UNCERTIFIED)
    )


SIZES = ((12_101, 64, 20), (100_000, 64, 100), (1_000_000, 64, 100), (1_000_000, 128, 100))
CASES = [score_topk_case(n_items, k, batch, dim) for n_items, dim, k in SIZES for batch in (1, 32, 256)]
