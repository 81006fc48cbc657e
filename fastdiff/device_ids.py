"""What a catalogue of integers knows of its ids, as tensors on a device: looked up there without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.item_ids import IntegerIds, ItemIds, RowIds
from fastdiff.staging import finish, upload


class DeviceIds:
    """The ids of one snapshot of a catalogue whose ids are integers.

    sorted_ids, sorted_rows  [n] int64, every known id in ascending order and its row
    by_row                   [R + 1] int64, the id of each row, and -1 for row -1; None where that is the row itself
    """

    def __init__(self, ids: ItemIds, device: torch.device) -> None:
        if isinstance(ids, IntegerIds):
            numbers, rows, by_row = ids.sorted_ids, ids.sorted_rows, ids.shown
            parts = upload([torch.from_numpy(part) for part in (numbers, rows, by_row)], device)
            self.sorted_ids, self.sorted_rows = parts[0], parts[1]
            self.by_row: Tensor | None = parts[2]
        else:
            assert isinstance(ids, RowIds)
            places = torch.arange(ids.n_rows, device=device)
            for row in ids.special:
                places[row].fill_(-1)
            self.sorted_ids, self.sorted_rows, self.by_row = places, places, None
        finish(device)

    def known(self, ids: Tensor) -> Tensor:
        """The row of each id [..] int64, -1 for ids that are not known: `ItemIds.known`."""
        n = self.sorted_ids.numel()
        if n == 0:
            return torch.full_like(ids, -1)
        if self.by_row is None:
            inside = (ids >= 0) & (ids < n)
            return torch.where(inside, self.sorted_rows[ids.clamp(0, n - 1)], -1)
        place = torch.searchsorted(self.sorted_ids, ids).clamp_(max=n - 1)
        return torch.where(self.sorted_ids[place] == ids, self.sorted_rows[place], -1)

    def external(self, rows: Tensor) -> Tensor:
        """The id of each row, -1 for -1: `ItemIds.external`."""
        return rows.clone() if self.by_row is None else self.by_row[rows]
