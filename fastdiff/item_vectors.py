"""The item vectors of one catalogue snapshot: as they came, as they are scored, and as they are scanned.

A snapshot never changes, and shares with others what is equal in both. Appending writes behind the last row of a buffer
that older snapshots see only the front of, so a growing catalogue copies its table only when the buffer is full.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.score_topk import ScanTable
from fastdiff.ops.topk_definition import budget, slices, sum_in_order

METRICS = ("dot", "cosine")
_EPS = 1e-12


def normalize(vectors: Tensor) -> Tensor:
    """v / max(|v|, 1e-12) along the last axis in float32: torch's `F.normalize`, with a norm that is summed in float64
    in index order, so that a vector's bits do not depend on its neighbours."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for lo, hi in slices(flat.shape[0], budget(flat.device) // max(1, flat.shape[1])):
        norm = sum_in_order(flat[lo:hi], flat[lo:hi]).sqrt().float()
        torch.div(flat[lo:hi], norm.clamp_(min=_EPS)[:, None], out=out[lo:hi])
    return out.view(vectors.shape)


class _Front:
    """The first rows of a buffer."""

    def __init__(self, tensor: Tensor, buffer: _Buffer | None = None) -> None:
        self.tensor = tensor
        self._buffer = buffer or _Buffer(tensor)

    def __reduce__(self) -> tuple[type[_Front], tuple[Tensor]]:
        return _Front, (self.tensor.clone(),)  # alone: the rest of the buffer and its lock stay here

    def append(self, rows: Tensor) -> _Front:
        return self._buffer.append(self, rows)

    def replace(self, at: Tensor, rows: Tensor) -> _Front:
        """A copy with other values in some rows."""
        tensor = self.tensor.clone()
        tensor[at] = rows
        return _Front(tensor)


class _Buffer:
    def __init__(self, rows: Tensor) -> None:
        self.rows, self.used = rows, len(rows)
        self.lock = threading.Lock()

    def append(self, front: _Front, rows: Tensor) -> _Front:
        n, total = len(front.tensor), len(front.tensor) + len(rows)
        with self.lock:
            if self.used == n and total <= len(self.rows):
                self.rows[n:total] = rows
                self.used = total
                return _Front(self.rows[:total], self)
        # full, or another snapshot has appended here already: a new buffer, a quarter longer than needed
        grown = self.rows.new_empty(total + total // 4 + 16, *self.rows.shape[1:])
        grown[:n], grown[n:total] = front.tensor, rows
        buffer = _Buffer(grown)
        buffer.used = total
        return _Front(grown[:total], buffer)


@dataclass(frozen=True, eq=False)
class ItemVectors:
    """The vectors of one snapshot. Use `build`."""

    _table: _Front
    _scored: _Front
    metric: str
    scan: ScanTable

    @classmethod
    def build(cls, table: Tensor, metric: str, scan_dtype: torch.dtype | None, certified: bool = True) -> ItemVectors:
        """table [R, D] floating; metric "dot" or "cosine"; scan_dtype and certified as in `ScanTable.build`."""
        if metric not in METRICS:
            raise InvalidArgument(f"ItemCatalog: metric must be one of {', '.join(METRICS)} (got {metric!r})")
        scored = _as_scored(table, metric)
        scan = ScanTable.build(scored, scan_dtype, certified=certified)
        raw = _Front(table)
        return cls(raw, raw if scored is table else _Front(scored), metric, scan)

    @property
    def table(self) -> Tensor:
        """[R, D], as it came."""
        return self._table.tensor

    @property
    def scored(self) -> Tensor:
        """[R, D] float32, normalised where the metric is cosine; the table itself where that is the same."""
        return self._scored.tensor

    def append(self, rows: Tensor) -> ItemVectors:
        table = self._table.append(rows)
        shared = self._scored is self._table
        scored = table if shared else self._scored.append(_as_scored(rows, self.metric))
        return ItemVectors(table, scored, self.metric, self.scan.append(scored.tensor))

    def replace(self, at: Tensor, rows: Tensor) -> ItemVectors:
        table = self._table.replace(at, rows)
        shared = self._scored is self._table
        scored = table if shared else self._scored.replace(at, _as_scored(rows, self.metric))
        return ItemVectors(table, scored, self.metric, self.scan.replace(at, scored.tensor))


def _as_scored(table: Tensor, metric: str) -> Tensor:
    single = table.float()
    return single if metric == "dot" else normalize(single)
