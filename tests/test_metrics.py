"""Metrics against their definitions, written out row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.errors import InvalidArgument
from fastdiff.metrics import RankingMetrics

TOP_KS = (1, 3, 5)


def literal(lists: list[list[Any]], targets: list[Any], catalogue: list[Any]) -> dict[str, float]:
    n, values = len(targets), {}
    for k in TOP_KS:
        hits = [target in ranked[:k] for ranked, target in zip(lists, targets, strict=True)]
        values[f"HR@{k}"] = sum(hits) / n
        gains = [
            1 / math.log2(ranked.index(target) + 2)
            for ranked, target, hit in zip(lists, targets, hits, strict=True)
            if hit
        ]
        values[f"NDCG@{k}"] = sum(gains) / n
        shown = {item for ranked in lists for item in ranked[:k]}
        values[f"coverage@{k}"] = len([item for item in catalogue if item in shown]) / len(catalogue)
    ranks = [ranked.index(t) for ranked, t in zip(lists, targets, strict=True) if t in ranked[: TOP_KS[-1]]]
    values[f"MRR@{TOP_KS[-1]}"] = sum(1 / (rank + 1) for rank in ranks) / n
    return values


@st.composite
def rankings(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    n = draw(st.integers(1, 12))
    lists = [draw(st.permutations(range(1, 10)))[:6] for _ in range(n)]
    targets = [draw(st.integers(1, 12)) for _ in range(n)]
    return lists, targets


@given(rankings(), st.integers(1, 5), st.sampled_from(["tensor", "numpy", "list", "text"]))
def test_against_the_definitions(data: tuple[list[list[int]], list[int]], batch_size: int, kind: str) -> None:
    lists, targets = data
    catalogue: list[Any] = list(range(1, 11))
    convert: Any = {"tensor": torch.tensor, "numpy": np.array, "list": list}.get(kind)
    if kind == "text":
        convert = lambda values: np.array(values, dtype=object)  # noqa: E731
        lists, targets, catalogue = (
            np.array(lists).astype(str).tolist(),
            list(map(str, targets)),
            list(map(str, catalogue)),
        )  # type: ignore[assignment]
    metrics = RankingMetrics((5, 1, 3), catalogue)
    for i in range(0, len(lists), batch_size):
        metrics.update(convert(lists[i : i + batch_size]), targets[i : i + batch_size])
    expected = literal(lists, targets, catalogue)
    assert metrics.compute() == pytest.approx(expected, abs=1e-15)
    assert metrics.compute().keys() == expected.keys()
    assert metrics.n_rows == len(lists)
    for k in TOP_KS:
        share = expected[f"HR@{k}"]
        assert metrics.standard_errors()[f"HR@{k}"] == pytest.approx(math.sqrt(share * (1 - share) / len(lists)))


@given(rankings(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(data: tuple[list[list[int]], list[int]], random: Any) -> None:
    lists, targets = data
    order = list(range(len(lists)))
    random.shuffle(order)
    values = []
    for rows in (range(len(lists)), order):
        metrics = RankingMetrics(TOP_KS)
        for row in rows:
            metrics.update([lists[row]], [targets[row]])
        values.append(metrics.compute())
    assert values[0] == values[1]  # bit for bit: the state is counts


@pytest.mark.parametrize(("lists", "targets"), [([[2, -1, -1]], [-1]), ([["b", None, None]], [None])])
def test_fill_never_hits_and_covers_nothing(lists: Any, targets: Any) -> None:
    metrics = RankingMetrics((3,), [lists[0][0], "x" if lists[0][1] is None else 7])
    metrics.update(np.array(lists, dtype=object) if lists[0][1] is None else torch.tensor(lists), targets)
    assert metrics.compute() == {"HR@3": 0.0, "NDCG@3": 0.0, "MRR@3": 0.0, "coverage@3": 0.5}


def test_rows_that_are_no_items_cover_nothing() -> None:
    metrics = RankingMetrics((2,), [1, 2])
    metrics.update(torch.tensor([[0, 1]]), [1])
    assert metrics.compute()["coverage@2"] == 0.5


def test_lists_may_be_longer_than_the_largest_k() -> None:
    metrics = RankingMetrics((2,))
    metrics.update(torch.tensor([[5, 6, 7]]), [7])
    assert metrics.compute() == {"HR@2": 0.0, "NDCG@2": 0.0, "MRR@2": 0.0}


def test_an_item_shown_twice_counts_once() -> None:
    metrics = RankingMetrics((3,))
    metrics.update(torch.tensor([[6, 7, 7]]), [7])
    assert metrics.compute()["MRR@3"] == 0.5


def test_an_empty_batch_changes_nothing() -> None:
    metrics = RankingMetrics((1,))
    metrics.update(torch.tensor([[1], [2]]), [1, 1])
    metrics.update(torch.empty(0, 1, dtype=torch.int64), [])
    assert metrics.compute()["HR@1"] == 0.5


@given(rankings(), st.integers(1, 5))
def test_averaged_over_batches_every_batch_weighs_the_same(
    data: tuple[list[list[int]], list[int]], batch_size: int
) -> None:
    lists, targets = data
    metrics, parts = RankingMetrics(TOP_KS, range(1, 11)), []
    for i in range(0, len(lists), batch_size):
        metrics.update(lists[i : i + batch_size], targets[i : i + batch_size])
        parts.append(literal(lists[i : i + batch_size], targets[i : i + batch_size], [1]))
    metrics.update(torch.empty(0, 6, dtype=torch.int64), [])
    found = metrics.compute("batches")
    for name in ("HR@1", "HR@5", "NDCG@3", "NDCG@5", "MRR@5"):
        assert found[name] == pytest.approx(sum(part[name] for part in parts) / len(parts), abs=1e-15)
    assert found["coverage@3"] == metrics.compute()["coverage@3"]
    # Var mean_b(h_b / n_b) = p (1 - p) sum_b (1 / n_b) / m^2
    sizes = [len(lists[i : i + batch_size]) for i in range(0, len(lists), batch_size)]
    share = metrics.compute()["HR@3"]
    expected = math.sqrt(share * (1 - share) * sum(1 / size for size in sizes)) / len(sizes)
    assert metrics.standard_errors("batches")["HR@3"] == pytest.approx(expected)


def test_an_unknown_average() -> None:
    metrics = RankingMetrics((1,))
    metrics.update([[1]], [1])
    for method in (metrics.compute, metrics.standard_errors):
        with pytest.raises(InvalidArgument, match=r"average must be one of 'users', 'batches' \(got 'items'\)"):
            method("items")


@pytest.mark.parametrize("top_ks", [(), (0,), (5, -1), (True,), (2.0,)])
def test_bad_cut_offs(top_ks: Any) -> None:
    with pytest.raises(InvalidArgument, match="top_ks must be ints of at least 1"):
        RankingMetrics(top_ks)


@pytest.mark.parametrize(
    ("ranked", "targets"), [([[1, 2]], [1]), ([[1, 2, 3]], [1, 2]), ([1, 2, 3], [1]), ([[1, 2, 3]], [[1]])]
)
def test_bad_shapes(ranked: Any, targets: Any) -> None:
    with pytest.raises(
        InvalidArgument, match=r"ranked has shape .* \[B, K\] with K of at least 3 and \[B\] are accepted"
    ):
        RankingMetrics((3,)).update(torch.tensor(ranked), torch.tensor(targets))


def test_nothing_counted_yet() -> None:
    for ask in (RankingMetrics().compute, RankingMetrics().standard_errors):
        with pytest.raises(InvalidArgument, match="no row has been counted"):
            ask()
