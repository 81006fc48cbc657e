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
    _scanned: _Front
    _coef: _Front
    metric: str
    scan: ScanTable

    @classmethod
    def build(cls, table: Tensor, metric: str, scan_dtype: torch.dtype | None) -> ItemVectors:
        """table [R, D] floating; metric "dot" or "cosine"; scan_dtype of `ScanTable`, None: float32."""
        if metric not in METRICS:
            raise InvalidArgument(f"ItemCatalog: metric must be one of {', '.join(METRICS)} (got {metric!r})")
        single = table.float()
        scored = single if metric == "dot" else normalize(single)
        scan = ScanTable.build(scored, scan_dtype or torch.float32)
        raw = _Front(table)
        exact = raw if scored is table else _Front(scored)
        return cls(raw, exact, exact if scan.rows is scored else _Front(scan.rows), _Front(scan.coef), metric, scan)

    @property
    def table(self) -> Tensor:
        """[R, D], as it came."""
        return self._table.tensor

    @property
    def scored(self) -> Tensor:
        """[R, D] float32, normalised where the metric is cosine; the table itself where that is the same."""
        return self._scored.tensor

    def append(self, rows: Tensor) -> ItemVectors:
        new = ItemVectors.build(rows, self.metric, self.scan.dtype)
        table = self._table.append(new.table)
        scored = table if self._scored is self._table else self._scored.append(new.scored)
        scanned = scored if self._scanned is self._scored else self._scanned.append(new.scan.rows)
        return self._with(table, scored, scanned, self._coef.append(new.scan.coef), new.scan)

    def replace(self, at: Tensor, rows: Tensor) -> ItemVectors:
        new = ItemVectors.build(rows, self.metric, self.scan.dtype)
        table = self._table.replace(at, new.table)
        scored = table if self._scored is self._table else self._scored.replace(at, new.scored)
        scanned = scored if self._scanned is self._scored else self._scanned.replace(at, new.scan.rows)
        return self._with(table, scored, scanned, self._coef.replace(at, new.scan.coef), new.scan)

    def _with(self, table: _Front, scored: _Front, scanned: _Front, coef: _Front, new: ScanTable) -> ItemVectors:
        # the largest of the old and the new: still a bound where the row that had it was replaced
        scan = ScanTable(
            scanned.tensor,
            coef.tensor,
            max(self.scan.max_coef, new.max_coef),
            max(self.scan.max_norm, new.max_norm),
        )
        return ItemVectors(table, scored, scanned, coef, self.metric, scan)
