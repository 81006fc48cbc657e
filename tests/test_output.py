"""What an output leaves for the first look at it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.catalog import TopK
from fastdiff.errors import InvalidHistory
from fastdiff.output import GenerateOutput, Pending
from fastdiff.stopwatch import Stopwatch

ROWS = torch.tensor([[3, 1, -1], [2, 0, 4]])
TENSORS = ("item_ids", "scores", "num_valid", "embeddings")


def output(pending: Pending) -> GenerateOutput:
    top = TopK(ROWS, torch.rand(2, 3))
    return GenerateOutput(None, top, torch.rand(2, 5), 7, Stopwatch(torch.device("cpu")), pending)


@pytest.mark.parametrize("first", TENSORS)
def test_the_first_look_checks_and_maps_once(first: str) -> None:
    done: list[str] = []

    def external(rows: Tensor) -> Tensor:
        done.append("map")
        return rows * 10

    got = output(Pending([lambda: done.append("a"), lambda: done.append("b")], external))
    assert got.seed == 7
    assert got.timings == {}
    assert done == []
    getattr(got, first)
    assert done == ["a", "b", "map"]
    assert torch.equal(torch.as_tensor(got.item_ids), ROWS * 10)
    assert got.num_valid.tolist() == [2, 3]
    assert got.to_tuple()[1] is got.scores
    assert "item_ids=tensor" in repr(got)
    assert done == ["a", "b", "map"]


@pytest.mark.parametrize("name", TENSORS)
def test_an_error_comes_with_every_look(name: str) -> None:
    def wrong() -> None:
        raise InvalidHistory("generate: histories[1] holds item id 99")

    def never(rows: Tensor) -> Any:
        raise AssertionError("ids of an output that is wrong")

    got = output(Pending([wrong], never))
    for _ in range(2):
        with pytest.raises(InvalidHistory, match="item id 99"):
            getattr(got, name)
