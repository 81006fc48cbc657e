"""HR, NDCG, MRR and coverage of ranked lists, accumulated batch by batch.

Each row has one target and one list, best first; rank is the target's place in the list, counted from 0, and infinite
where the list does not hold it. Averages run over all rows, those without a hit included:

    HR@k       = mean [rank < k]
    NDCG@k     = mean [rank < k] / log2(rank + 2)            one relevant item, so the ideal DCG is 1
    MRR@k      = mean [rank < k] / (rank + 1)                of the list as kept: only for the largest k
    coverage@k = share of the catalogue's items that stand among the first k of at least one row

Some papers' code averages each batch and then the batches, so that the users of a short last batch weigh more than all
others; where that is asked for ("batches"), every `update` is a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastdiff.errors import InvalidArgument

Ids = Tensor | npt.NDArray[Any] | Sequence[Any]

AVERAGES = ("users", "batches")


class RankingMetrics:
    """The accumulator: `update` per batch, `compute` at any time. Over users, batching and order do not matter.

    top_ks         the cut-offs k
    catalogue_ids  external ids of the items that coverage counts (None: no coverage); ids of a list that are not among
                   them, such as the pad row of a published ranking, are nobody's item
    """

    def __init__(self, top_ks: Sequence[int] = (5, 10, 20), catalogue_ids: Ids | None = None) -> None:
        if not top_ks or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in top_ks):
            raise InvalidArgument(f"RankingMetrics: top_ks must be ints of at least 1 (got {top_ks!r})")
        self.top_ks = tuple(sorted(set(top_ks)))
        self.n_rows = 0
        self._rank_counts = np.zeros(self.top_ks[-1], dtype=np.int64)
        self._batch_sizes: list[int] = []
        self._batch_shares = np.zeros(self.top_ks[-1])  # per rank, summed over the batches
        self._catalogue = None if catalogue_ids is None else set(_array(catalogue_ids).tolist())
        self._shown: dict[int, set[Any]] = {k: set() for k in self.top_ks}

    def update(self, ranked: Ids, targets: Ids) -> None:
        """Count a batch.

        ranked   [B, K] item ids, best first, K at least the largest k; -1 (None among strings) fills empty places and
                 never hits
        targets  [B] item ids
        """
        lists, wanted = _array(ranked), _array(targets)
        if lists.ndim != 2 or wanted.shape != lists.shape[:1] or lists.shape[1] < self.top_ks[-1]:
            raise InvalidArgument(
                f"RankingMetrics.update: ranked has shape {lists.shape} and targets {wanted.shape}; "
                f"[B, K] with K of at least {self.top_ks[-1]} and [B] are accepted"
            )
        lists = lists[:, : self.top_ks[-1]]
        fill = lists == (None if lists.dtype == object else -1)
        hit = np.asarray(lists == wanted[:, None], dtype=np.bool_) & ~fill.astype(np.bool_)
        found = hit.any(axis=1)
        counts = np.bincount(hit.argmax(axis=1)[found], minlength=len(self._rank_counts))
        self._rank_counts += counts
        self.n_rows += len(wanted)
        if len(wanted):
            self._batch_sizes.append(len(wanted))
            self._batch_shares += counts / len(wanted)
        if self._catalogue is not None:
            for k, shown in self._shown.items():
                shown.update(lists[:, :k].ravel().tolist())

    def compute(self, average: str = "users") -> dict[str, float]:
        """Name -> value in 0..1: HR@k and NDCG@k for each k, MRR@(largest k), coverage@k where there is a catalogue.

        average  "users": every row weighs the same; "batches": every batch does
        """
        hits, total = self._hits(average)
        ranks = np.arange(len(hits))
        gains = hits / np.log2(ranks + 2.0)
        values = {f"HR@{k}": float(hits[:k].sum()) / total for k in self.top_ks}
        values |= {f"NDCG@{k}": float(gains[:k].sum()) / total for k in self.top_ks}
        values[f"MRR@{self.top_ks[-1]}"] = float((hits / (ranks + 1.0)).sum()) / total
        if self._catalogue is not None:
            values |= {
                f"coverage@{k}": len(shown & self._catalogue) / max(len(self._catalogue), 1)
                for k, shown in self._shown.items()
            }
        return values

    def standard_errors(self, average: str = "users") -> dict[str, float]:
        """ "HR@k" -> sqrt(p (1 - p) / n), the standard error of a share p of n rows.

        Averaged over m batches of n_b rows 1 / n is mean(1 / n_b) / m; p is the share of all rows either way.
        """
        self._hits(average)
        variance = 1.0 / self.n_rows
        if average == "batches":
            variance = float(np.mean(1.0 / np.array(self._batch_sizes))) / len(self._batch_sizes)
        found = {f"HR@{k}": float(self._rank_counts[:k].sum()) / self.n_rows for k in self.top_ks}
        return {name: math.sqrt(share * (1.0 - share) * variance) for name, share in found.items()}

    def _hits(self, average: str) -> tuple[npt.NDArray[Any], int]:
        """[largest k], hits at each rank, and of how many: rows, or shares of a batch's rows, and batches."""
        self._check_rows()
        check_average("RankingMetrics", average)
        if average == "batches":
            return self._batch_shares, len(self._batch_sizes)
        return self._rank_counts, self.n_rows

    def _check_rows(self) -> None:
        if self.n_rows == 0:
            raise InvalidArgument("RankingMetrics: no row has been counted; call update() with at least one first")


def check_average(where: str, average: str) -> None:
    if average not in AVERAGES:
        accepted = ", ".join(map(repr, AVERAGES))
        raise InvalidArgument(f"{where}: average must be one of {accepted} (got {average!r})")


def _array(values: Ids) -> npt.NDArray[Any]:
    """Integers as int64, anything else as objects (numpy's own strings would be cut to a common width)."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, np.ndarray):
        return values if values.dtype.kind in "iu" else values.astype(object)
    plain = np.array(values, dtype=object)
    return plain.astype(np.int64) if all(isinstance(value, (int, np.integer)) for value in plain.ravel()) else plain
