"""Sequences for training: numbered items, splits, and what is wrong with a file before hours are spent on it.

Items are numbered 0 .. n_items - 1 (integer ids in ascending order, text ids in the order of the alphabet); a model's
row of an item is `config.first_item_row + number`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.config import ModelConfig
from fastdiff.data import Instance, ItemId, SequenceFile, UserSequence
from fastdiff.errors import DataError

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """What a recipe learns from, and what it is measured on.

    item_ids   external ids, by item number
    sequences  item numbers of each training user, oldest first, without what is held out
    valid      instances with external ids, as `fastdiff.evaluate.evaluate` takes them
    test       the same
    notes      what a reader of the results should know, as sentences
    """

    item_ids: Sequence[ItemId]
    sequences: Sequence[Numbers]
    valid: Sequence[Instance]
    test: Sequence[Instance]
    notes: Sequence[str] = ()

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def numbers(self) -> dict[ItemId, int]:
        """External id -> item number."""
        return {item: number for number, item in enumerate(self.item_ids)}

    def external_ids(self, config: ModelConfig) -> list[int] | list[str] | None:
        """The ids that a checkpoint stores: None where they are the row numbers of the model's table."""
        ids = list(self.item_ids)
        first = config.first_item_row
        return None if ids == list(range(first, first + len(ids))) else ids  # type: ignore[return-value]


def leave_one_out(sequences: Iterable[UserSequence]) -> TrainingData:
    """Of each user the last item is tested on, the one before it validated on, the rest is learned from.

    train  items[:-2]        valid  items[:-2] -> items[-2]        test  items[:-1] -> items[-1]
    """
    users = list(sequences)
    short = [user for user in users if len(user.items) < 3]
    if short:
        raise DataError(
            f"{short[0].where}: user {short[0].user} has {_count(len(short[0].items), 'item')}, and {len(short) - 1} "
            "more users have fewer than 3; leave-one-out holds out the last two items of each user, so at least 3 are "
            "needed; leave these users out, or give --min-items 3"
        )
    item_ids, numbers = _number_items(users)
    return TrainingData(
        item_ids,
        [_numbered(user.items[:-2], numbers) for user in users],
        [Instance(user.user, user.items[:-2], user.items[-2], user.where) for user in users],
        [Instance(user.user, user.items[:-1], user.items[-1], user.where) for user in users],
    )


def _number_items(users: Sequence[UserSequence]) -> tuple[list[ItemId], dict[ItemId, int]]:
    item_ids = sorted({item for user in users for item in user.items})
    return item_ids, {item: number for number, item in enumerate(item_ids)}


def _numbered(items: Sequence[ItemId], numbers: dict[ItemId, int]) -> Numbers:
    return np.array([numbers[item] for item in items], dtype=np.int64)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


# --- arrays of examples -----------------------------------------------------------------------------------------------


def windows(sequences: Iterable[Numbers], length: int, pad: int, side: str) -> tuple[Tensor, Tensor]:
    """The last `length` items of each sequence as `[users, length]` int64, filled with `pad` on the "left" or "right",
    and how many items each holds `[users]`."""
    rows = [sequence[-length:] for sequence in sequences]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    table = np.full((len(rows), length), pad, dtype=np.int64)
    for at, row in enumerate(rows):
        start = length - len(row) if side == "left" else 0
        table[at, start : start + len(row)] = row
    return torch.from_numpy(table), lengths


def prefixes(sequences: Iterable[Numbers], shortest: int = 1) -> Iterator[tuple[Numbers, int]]:
    """(the items before, the item) for every item of every sequence that has at least `shortest` items before it."""
    for sequence in sequences:
        for at in range(shortest, len(sequence)):
            yield sequence[:at], int(sequence[at])


def read(path: str | Path) -> TrainingData:
    """Leave-one-out data of a sequence file or a RecBole .inter file."""
    return leave_one_out(SequenceFile(path))


def describe(data: TrainingData) -> list[str]:
    """What a reader should know of the data before a long run starts."""
    interactions = sum(map(len, data.sequences))
    return [
        f"{len(data.sequences):,} users, {data.n_items:,} items, {interactions:,} interactions to learn from, "
        f"{len(data.valid):,} to validate on, {len(data.test):,} to test on",
        *data.notes,
    ]
