"""Histories on a CUDA device: brought there, or checked, mapped and packed where they are, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdiff.catalog import ItemCatalog
from fastdiff.config import ModelConfig
from fastdiff.histories import ParsedHistories, pack_in_python
from fastdiff.models.base import Histories
from fastdiff.noise import history_row_key
from fastdiff.ops.score_topk import UserLists
from fastdiff.staging import upload

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class DeviceHistories:
    """`ParsedHistories` on a CUDA device.

    seen          as there; but where `seen_lengths` are given, only so many of a user's rows are the user's own, and
                  the pad's row, which is no item, fills the list up
    seen_lengths  [B] int64, or None: all
    checks        raise `InvalidHistory` where an id is wrong; they wait for the device
    """

    window: Histories
    seen: UserLists
    row_key: Tensor
    seen_lengths: Tensor | None = None
    checks: tuple[Callable[[], None], ...] = ()

    @classmethod
    def of(cls, histories: ParsedHistories, device: torch.device) -> DeviceHistories:
        """Everything in one copy, which is not waited for."""
        items, lengths, rows, offsets, *keys = upload(histories.packed(), device)
        row_key = keys[0] if keys else history_row_key(items, lengths)
        return cls(Histories(items, lengths), UserLists.trusted(rows, offsets), row_key)

    @property
    def n_users(self) -> int:
        return self.window.batch_size

    @property
    def only_seen(self) -> UserLists:
        """`seen` without what fills it up; waits for the device where there is such."""
        if self.seen_lengths is None:
            return self.seen
        rows = self.seen.values.view(self.n_users, -1)
        own = torch.arange(rows.shape[1], device=rows.device) < self.seen_lengths[:, None]
        offsets = torch.nn.functional.pad(self.seen_lengths.cumsum(0), (1, 0))
        return UserLists.trusted(rows[own], offsets)


def can_parse(histories: Tensor, catalog: ItemCatalog) -> bool:
    """Whether `parse_on_device` takes them: dense integers [B, L], in a catalogue of integers. For all else there is
    `parse_histories`, which says what is wrong with it."""
    integers = histories.dtype in INTEGERS and catalog.id_type is int
    return integers and histories.layout == torch.strided and histories.ndim == 2 and histories.numel() > 0


def parse_on_device(histories: Tensor, catalog: ItemCatalog, config: ModelConfig) -> DeviceHistories:
    """What `pack_in_python` defines for a padded array, on tensors, and with sizes that follow from [B, L] alone: the
    window has min(L, max_seq_len) columns, and each user's list of seen rows has L places."""
    ids = histories.to(torch.int64, copy=True)  # the caller's may change before the checks
    n_users, width = ids.shape
    rows = catalog.device_ids.known(ids)
    unknown, minus = rows < 0, ids == -1
    is_pad = unknown & ((ids == config.pad_id) | minus)
    rows = torch.where(unknown, config.pad_id, rows)

    n_before = (~is_pad).cumsum(1)
    before, after = n_before == 0, n_before == n_before[:, -1:]
    after &= is_pad
    between = is_pad & ~before & ~after
    drop = is_pad
    if config.pad_inside:  # see fastdiff.histories on what is a pad there
        between &= minus
        marked, left_padded = minus.any(1, keepdim=True), before.any(1, keepdim=True)
        drop = torch.where(marked, minus, before | (after & ~left_padded))
    wrong = ((unknown & ~is_pad) | between).any()

    # a user's rows move to the left, over what is dropped; that goes to a column of its own
    place = torch.where(drop, width, (~drop).cumsum(1) - 1)
    rows = torch.full((n_users, width + 1), config.pad_id, device=ids.device).scatter_(1, place, rows)[:, :width]
    lengths = (~drop).sum(1)
    window = window_of(rows, lengths, config)
    row_key = history_row_key(window.items, window.lengths)
    check = partial(_check, wrong, ids, catalog, config)
    return DeviceHistories(window, as_lists(rows), row_key, lengths, (check,))


def window_of(rows: Tensor, lengths: Tensor, config: ModelConfig) -> Histories:
    """What the model sees of whole histories [B, W], left-aligned, pads behind: the last `max_seq_len` of each."""
    width = rows.shape[1]
    columns = torch.arange(min(width, config.max_seq_len), device=rows.device)
    window_lengths = lengths.clamp(max=config.max_seq_len)
    source = (lengths - window_lengths)[:, None] + columns
    items = rows.gather(1, source.clamp_(max=width - 1))
    return Histories(torch.where(columns < window_lengths[:, None], items, config.pad_id), window_lengths)


def as_lists(rows: Tensor) -> UserLists:
    """[B, W] as lists of W rows each; where pads fill them up: the pad's row is no item."""
    n_users, width = rows.shape
    return UserLists.trusted(rows.flatten(), torch.arange(n_users + 1, device=rows.device) * width)


def _check(wrong: Tensor, ids: Tensor, catalog: ItemCatalog, config: ModelConfig) -> None:
    """Where something is wrong, `pack_in_python` says what."""
    if bool(wrong):
        pack_in_python(ids.cpu().numpy(), catalog, config)
        raise AssertionError("histories that only the device refuses")
