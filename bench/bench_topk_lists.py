"""score_topk with lists: what users may not be shown, or what alone may be shown.

denied      1,000 items per user, a tenth of them among the user's own 1,000 best, as seen items are. Beside it the same
            call without lists: both stand in one run, so that their ratio is what lists cost
allowed     one list for all: 1 % of the items may be shown, 99 % are denied
candidates  one list per user: 1 % of the items may be shown
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import Absent, Case, Options, Provider
from bench.inputs import draw_items, draw_noise, some_of
from bench.retrieval import (
    Faiss,
    Implicit,
    torch_topk,
    torch_topk_candidates,
    torch_topk_denied,
    torch_topk_of,
    why_not,
)
from bench.topk import CHECKED_QUERIES, NO_LISTS, OURS, Answer, our_topk
from fastdiff.ops.score_topk import UserLists, score_topk


@dataclass(frozen=True)
class Lists:
    """One kind of lists, as each side takes them.

    forbidden  [B, N] bool
    ours       arguments of score_topk
    rivals     name -> builds, from the table, (query, k) -> (rows, scores)
    scored     the share of all B x N scores that the problem needs      read  the share of the table
    """

    forbidden: Tensor
    ours: dict[str, Any]
    rivals: dict[str, Callable[[Tensor], Callable[..., Any]]]
    scored: float = 1.0
    read: float = 1.0


# --- the kinds --------------------------------------------------------------------------------------------------------


def denied_lists(query: Tensor, item_emb: Tensor, length: int = 1000) -> Lists:
    length = min(length, len(item_emb) // 10)
    generator = torch.Generator().manual_seed(5)
    best, _ = torch_topk(query, item_emb, length)
    near = torch.stack([own[torch.randperm(length, generator=generator)[: length // 10]] for own in best])
    rows = _distinct(near, len(item_emb), length, generator)
    lists = _user_lists(rows)
    return Lists(
        torch.zeros(len(query), len(item_emb), dtype=torch.bool).scatter_(1, rows, True),
        {"user_exclude": lists},
        {
            "torch-topk": lambda table: partial(torch_topk_denied, table, lists.to(table.device)),
            "faiss-tuned": lambda table: partial(Faiss(table, tuned=True).search_denied, lists),
            "implicit": lambda table: Implicit(table, denied=lists).search,
        },
    )


def allowed_list(query: Tensor, item_emb: Tensor) -> Lists:
    allowed = torch.rand(len(item_emb), generator=torch.Generator().manual_seed(6)) < 0.01
    return Lists(
        (~allowed).expand(len(query), -1),
        {"allowed": allowed},
        {
            "torch-topk": lambda table: partial(torch_topk_of, table, allowed.nonzero().flatten().to(table.device)),
            "faiss": lambda table: Faiss(table, tuned=False, allowed=allowed).search,
            "implicit": lambda table: Implicit(table, allowed=allowed).search,
        },
        scored=0.01,
        read=0.01,
    )


def candidate_lists(query: Tensor, item_emb: Tensor) -> Lists:
    none = torch.zeros(len(query), 0, dtype=torch.int64)
    rows = _distinct(none, len(item_emb), len(item_emb) // 100, torch.Generator().manual_seed(7))
    return Lists(
        torch.ones(len(query), len(item_emb), dtype=torch.bool).scatter_(1, rows, False),
        {"user_candidates": _user_lists(rows)},
        {"torch-topk": lambda table: partial(torch_topk_candidates, table, rows.to(table.device))},
        scored=0.01,
        read=min(1.0, 0.01 * len(query)),
    )


def _distinct(first: Tensor, n_items: int, length: int, generator: torch.Generator) -> Tensor:
    """`[B, length]` rows in ascending order, each once per user: those of `first`, the rest drawn from all items."""
    lists = []
    for own in first:
        drawn = torch.randperm(n_items, generator=generator)[: length + len(own)]
        lists.append(torch.cat([own, drawn[~torch.isin(drawn, own)]])[:length].sort().values)
    return torch.stack(lists)


def _user_lists(rows: Tensor) -> UserLists:
    users, length = rows.shape
    return UserLists(rows.flatten(), torch.arange(users + 1) * length)


KINDS = {"denied": denied_lists, "allowed": allowed_list, "candidates": candidate_lists}
OTHERS = {
    "denied": ("torch-topk", "faiss-tuned", "implicit"),
    "allowed": ("torch-topk", "faiss", "implicit"),
    "candidates": ("torch-topk",),
}
CALLED = {
    "denied": "1,000 denied items per user, most far, some near",
    "allowed": "one list for all: 1 % of the items allowed",
    "candidates": "1 % of the items allowed to each user",
}


# --- providers --------------------------------------------------------------------------------------------------------


def providers(kind: str, n_items: int, k: int, batch: int, dim: int, options: Options) -> Iterator[Provider | Absent]:
    item_emb, query = draw_items(n_items, dim), draw_noise(batch, dim, seed=4)
    lists = KINDS[kind](query, item_emb)
    users = some_of(batch, CHECKED_QUERIES)
    answer = Answer(query, item_emb, k, lists.forbidden[users])
    table, asked = item_emb.to(options.device), query.to(options.device)
    for name, build in lists.rivals.items():
        reason = why_not(name.partition("-")[0], options.device)
        if reason is not None:
            yield Absent(name, reason)
        elif options.wants(name):
            yield Provider(name, partial(build(table), query=asked, k=k), answer.close)

    placed = {name: given.to(options.device) for name, given in lists.ours.items()}
    for provider in our_topk(OURS, asked, table, k, answer.same, options, **placed):
        assert isinstance(provider, Provider), "32 users are not too many for plain PyTorch"
        assert provider.flops is not None
        assert provider.bytes is not None
        yield replace(provider, flops=provider.flops * lists.scored, bytes=provider.bytes * lists.read)
    if kind == "denied":
        unlisted = Answer(query, item_emb, k)
        for provider in our_topk(OURS, asked, table, k, unlisted.same, options):
            assert isinstance(provider, Provider)
            yield replace(provider, name=provider.name + NO_LISTS, aside=True)


def topk_lists_case(kind: str, n_items: int = 1_000_000, k: int = 100, batch: int = 32, dim: int = 64) -> Case:
    params: dict[str, int | str] = {"lists": kind, "items": n_items, "dim": dim, "k": k, "batch": batch}
    ours = (*OURS, *(name + NO_LISTS for name in OURS)) if kind == "denied" else OURS
    build = partial(providers, kind, n_items, k, batch, dim)
    return Case("topk_lists", params, CALLED[kind], build, (score_topk,), OTHERS[kind], ours)


CASES = [topk_lists_case(kind) for kind in KINDS]
