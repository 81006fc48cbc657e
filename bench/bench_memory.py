"""score_topk: how much memory one call of 1,024 queries over 10^6 items needs beyond the table.

Each provider runs the call once, in a process of its own, after a call of one query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench.cases import Absent, Case, Options, Provider
from bench.inputs import draw_items, draw_noise
from bench.ours import bindings
from bench.peak import in_child
from bench.peak import why_not as why_no_peak
from bench.retrieval import Faiss, Implicit, torch_topk, why_not
from bench.topk import OURS, Answer, build_scan
from fastdiff.ops.score_topk import score_topk

OTHERS = ("torch-topk", "faiss", "faiss-tuned", "implicit")


def calls(
    name: str, backend: str, n_items: int, k: int, batch: int, dim: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """In the child: (the call with one query, the call that is measured)."""
    item_emb, query = draw_items(n_items, dim), draw_noise(batch, dim, seed=4)
    if name == "torch-topk":
        search: Callable[..., Any] = partial(torch_topk, item_emb=item_emb)
    elif name == "implicit":
        search = Implicit(item_emb).search
    elif name in ("faiss", "faiss-tuned"):
        search = Faiss(item_emb, tuned=name == "faiss-tuned").search
    else:
        search = partial(score_topk.bind(backend, "cpu"), item_emb=item_emb, scan=build_scan(name, item_emb))
    return partial(search, query=query[:1], k=k), partial(search, query=query, k=k)


def providers(n_items: int, k: int, batch: int, dim: int, options: Options) -> Iterator[Provider | Absent]:
    device = options.device
    query, sizes = draw_noise(batch, dim, seed=4), {"n_items": n_items, "k": k, "batch": batch, "dim": dim}
    answer = Answer(query, draw_items(n_items, dim), k)
    others = [(name, "eager", why_not(name.partition("-")[0], device), answer.close) for name in OTHERS]
    ours = [(name, label, None, answer.same) for name in OURS for label in bindings([score_topk], device)]
    for name, backend, reason, check in others + ours:
        reason = reason or why_no_peak() or (None if device.type == "cpu" else "memory is measured on the CPU")
        if reason is not None:
            yield Absent(name, reason)
        elif options.wants(name):
            run = partial(in_child, "bench.bench_memory:calls", name=name, backend=backend, **sizes)
            yield Provider(name, run, check, backend=backend, once=True)


def memory_case(n_items: int = 1_000_000, k: int = 100, batch: int = 1024, dim: int = 64) -> Case:
    params: dict[str, int | str] = {"items": n_items, "dim": dim, "k": k, "batch": batch}
    setting = "memory that one call needs beyond the table, in a process of its own"
    return Case(
        "memory",
        params,
        setting,
        partial(providers, n_items, k, batch, dim),
        (score_topk,),
        OTHERS,
        OURS,
        only_on="cpu",
    )


CASES = [memory_case()]
