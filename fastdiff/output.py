"""What a call returns. On a CUDA device nothing of it is waited for before it is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from torch import Tensor

from fastdiff.catalog import TopK
from fastdiff.stopwatch import Stopwatch

IdArray = npt.NDArray[Any]


@dataclass(eq=False)
class Pending:
    """What the first look at an output still has to do: both wait for the device.

    checks    raise where the call turns out to have been given, or to have made, something wrong
    external  the item ids of the rows
    reads     what the device may be reading until then: were it let go, tensors of other streams could take its memory
    """

    checks: list[Callable[[], None]]
    external: Callable[[Tensor], Tensor | IdArray]
    reads: object = None


class GenerateOutput:
    """What `generate()` returns.

    item_ids    [B, K] external ids, best first; int64 tensor, or a numpy object array where the ids are strings.
                Places that no allowed item fills hold -1 (None for strings)
    scores      [B, K] float32, -inf at such places
    num_valid   [B] int64, how many of the K places are filled
    embeddings  [B, D], or [B, num_samples, D]: the generated queries, where `output_embeddings`
    seed        the seed of the call's noise; None where the noise was given or came from a generator

    On a CUDA device `generate()` returns before the device has answered. The first look at any of the tensors waits for
    it, on the stream that is current then, and raises what could not be known before: an item id that is none among
    histories that were on the device, or NaN that the weights made.
    """

    __slots__ = ("_embeddings", "_item_ids", "_pending", "_stopwatch", "_top", "seed")

    def __init__(
        self,
        item_ids: Tensor | IdArray | None,
        top: TopK,
        embeddings: Tensor | None,
        seed: int | None,
        stopwatch: Stopwatch,
        pending: Pending | None = None,
    ) -> None:
        self._item_ids, self._top, self._embeddings, self.seed = item_ids, top, embeddings, seed
        self._stopwatch, self._pending = stopwatch, pending

    def _settle(self) -> None:
        pending = self._pending
        if pending is None:
            return
        for check in pending.checks:
            check()
        self._item_ids = pending.external(self._top.rows)
        self._pending = None

    @property
    def item_ids(self) -> Tensor | IdArray:
        self._settle()
        assert self._item_ids is not None
        return self._item_ids

    @property
    def scores(self) -> Tensor:
        self._settle()
        return self._top.scores

    @property
    def num_valid(self) -> Tensor:
        self._settle()
        return self._top.num_valid

    @property
    def embeddings(self) -> Tensor | None:
        self._settle()
        return self._embeddings

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage: "prepare" (check, map and pack the histories), "encode", "denoise", "rank"; or
        "prepare" and "graph", where a CUDA graph does the rest."""
        return self._stopwatch.seconds()

    def to_tuple(self) -> tuple[Tensor | IdArray, Tensor]:
        """(item_ids, scores)."""
        return self.item_ids, self.scores

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in ("item_ids", "scores", "embeddings", "seed")}
        return f"GenerateOutput({', '.join(f'{name}={value!r}' for name, value in values.items())})"
