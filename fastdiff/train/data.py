"""Sequences for training: numbered items, splits, and what is wrong with a file before hours are spent on it.

Items are numbered 0 .. n_items - 1 (integer ids in ascending order, text ids in the order of the alphabet); a model's
row of an item is `config.first_item_row + number`. The items of held-out places are numbered too.

    leave-one-out   of each user the last item is tested on, the one before it validated on, the rest is learned from
    chronological   DreamRec's and TA-Rec's: users in the order of their last interaction; the first 80 per cent are
                    learned from, the next 10 validated on, the last 10 tested on, each item of theirs from all before
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.config import ModelConfig
from fastdiff.data import (
    IdType,
    Instance,
    ItemId,
    LeaveOneOut,
    SequenceFile,
    Statistics,
    UserSequence,
    statistics,
)
from fastdiff.errors import DataError, InvalidArgument

Numbers = npt.NDArray[np.int64]
TimedSequence = tuple[UserSequence, Sequence[float]]

READ_SPLITS = ("leave-one-out", "chronological")
_FEWEST = 3
"""Items of a user that leave-one-out needs: one to learn from, one to validate on, one to test on."""


@dataclass(frozen=True)
class Source:
    """The file that data are from, and how it was read: the arguments of `read`."""

    path: str
    split: str = "leave-one-out"
    text_ids: bool = False
    min_items: int = 1
    min_interactions: int = 1
    until_stable: bool = False

    def read(self) -> TrainingData:
        id_type: IdType = str if self.text_ids else int
        return read(self.path, self.split, id_type, self.min_items, self.min_interactions, self.until_stable)


@dataclass(frozen=True)
class TrainingData:
    """What a recipe learns from, and what it is measured on.

    item_ids    external ids, by item number
    sequences   item numbers of each training user, oldest first, without what is held out
    valid       instances with external ids, as `fastdiff.evaluate.evaluate` takes them
    test        the same
    notes       what a reader of the results should know, as sentences
    split       how the three were told apart
    statistics  of the whole data, held-out items included
    source      the arguments of `read`, path in full; None where the data are from elsewhere
    """

    item_ids: Sequence[ItemId]
    sequences: Sequence[Numbers]
    valid: Sequence[Instance]
    test: Sequence[Instance]
    notes: Sequence[str] = ()
    split: str = ""
    statistics: Statistics | None = None
    source: Source | None = None

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def numbers(self) -> dict[ItemId, int]:
        """External id -> item number."""
        return {item: number for number, item in enumerate(self.item_ids)}

    @cached_property
    def cold_items(self) -> frozenset[ItemId]:
        """Items that occur in held-out places only: nothing is learned about them."""
        trained = np.zeros(self.n_items, dtype=np.bool_)
        for sequence in self.sequences:
            trained[sequence] = True
        return frozenset(item for item, known in zip(self.item_ids, trained, strict=True) if not known)

    def external_ids(self, config: ModelConfig) -> list[int] | list[str] | None:
        """The ids that a checkpoint stores: None where they are the row numbers of the model's table."""
        ids = list(self.item_ids)
        first = config.first_item_row
        return None if ids == list(range(first, first + len(ids))) else ids  # type: ignore[return-value]


# --- from a file ------------------------------------------------------------------------------------------------------


def read(
    path: str | Path,
    split: str = "leave-one-out",
    id_type: IdType = int,
    min_items: int = 1,
    min_interactions: int = 1,
    until_stable: bool = False,
) -> TrainingData:
    """The data of a sequence file or a RecBole .inter file.

    split             "leave-one-out", or "chronological" for .inter files with timestamps
    id_type           int or str: what items are
    min_interactions  items with fewer interactions are left out, first
    min_items         users with fewer items are left out, then
    until_stable      both again until nothing more is left out (a "5-core"); else once, as TA-Rec prepares its data
    """
    if split not in READ_SPLITS:
        raise InvalidArgument(f"read: split must be one of {', '.join(READ_SPLITS)} (got {split!r})")
    for name, value in (("min_items", min_items), ("min_interactions", min_interactions)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidArgument(f"read: {name} must be an int of at least 1 (got {value!r})")
    file = SequenceFile(path, id_type)
    timed = list(file.timed()) if split == "chronological" else [(user, ()) for user in file]
    if not timed:
        raise DataError(f"{file.path}: it holds no sequence; one user per line, or a row per interaction, is needed")
    kept = thin([user for user, _ in timed], min_items, min_interactions, until_stable)
    if not any(kept):
        raise DataError(
            f"{file.path}: nothing is left of its {_count(len(timed), 'user')} when items with fewer than "
            f"{_count(min_interactions, 'interaction')} and users with fewer than {_count(min_items, 'item')} are left "
            "out; lower --min-interactions or --min-items"
        )
    notes = [*file.notes, *_note_on_left_out([user for user, _ in timed], kept, min_items, min_interactions)]
    chosen = [_chosen(user, times, places) for (user, times), places in zip(timed, kept, strict=True) if places]
    data = (
        chronological(chosen, notes) if split == "chronological" else leave_one_out([user for user, _ in chosen], notes)
    )
    full = str(Path(path).resolve())
    return replace(data, source=Source(full, split, id_type is str, min_items, min_interactions, until_stable))


def thin(
    users: Sequence[UserSequence], min_items: int, min_interactions: int, until_stable: bool = False
) -> list[list[int]]:
    """The places that each user keeps ([]: the user is left out); see `read`."""
    lengths = [len(user.items) for user in users]
    if min_items <= 1 and min_interactions <= 1:
        return [list(range(n)) for n in lengths]
    owner = np.repeat(np.arange(len(users)), lengths)
    _, numbers = _number_items(users)
    item = np.array([numbers[item] for user in users for item in user.items], dtype=np.int64)
    kept = np.ones(len(item), dtype=np.bool_)
    while True:
        before = int(kept.sum())
        kept &= np.bincount(item[kept], minlength=len(numbers))[item] >= min_interactions
        kept &= np.bincount(owner[kept], minlength=len(users))[owner] >= min_items
        if not until_stable or int(kept.sum()) == before:
            break
    ends = np.cumsum(lengths)
    return [np.flatnonzero(kept[end - n : end]).tolist() for end, n in zip(ends, lengths, strict=True)]


def _chosen(user: UserSequence, times: Sequence[float], places: Sequence[int]) -> TimedSequence:
    items = [user.items[at] for at in places]
    return user._replace(items=items), [times[at] for at in places] if times else ()


def _note_on_left_out(
    users: Sequence[UserSequence], kept: Sequence[Sequence[int]], min_items: int, min_interactions: int
) -> list[str]:
    lost = sum(len(user.items) - len(places) for user, places in zip(users, kept, strict=True))
    if not lost:
        return []
    left = {user.items[at] for user, places in zip(users, kept, strict=True) for at in places}
    items = len({item for user in users for item in user.items}) - len(left)
    return [
        f"left out: {_count(sum(not places for places in kept), 'user')} and {_count(items, 'item')}, with them "
        f"{_count(lost, 'interaction')} (--min-interactions {min_interactions}, --min-items {min_items})"
    ]


# --- splits -----------------------------------------------------------------------------------------------------------


def leave_one_out(sequences: Iterable[UserSequence], notes: Sequence[str] = ()) -> TrainingData:
    """Of each user the last item is tested on, the one before it validated on, the rest is learned from.

    train  items[:-2]        valid  items[:-2] -> items[-2]        test  items[:-1] -> items[-1]
    """
    users = list(sequences)
    _check_lengths(users)
    valid, test = (list(LeaveOneOut(users, split)) for split in ("valid", "test"))
    return _assemble(users, [instance.history for instance in valid], valid, test, "leave-one-out", notes)


def chronological(sequences: Iterable[TimedSequence], notes: Sequence[str] = ()) -> TrainingData:
    """DreamRec's and TA-Rec's split of 8 : 1 : 1 by user, in the order of the users' last interactions.

    Each item of a validation or test user is an instance, whose history is all items before it: none, for the first.
    The authors cut histories to a window of 10; here the model's own window does.
    """
    users = [user for user, _ in sorted(sequences, key=lambda timed: timed[1][-1])]
    first, second = len(users) * 8 // 10, len(users) * 9 // 10
    if len(users) < 10:
        where = f"{users[0].where.rpartition(':')[0]}: " if users else "chronological: "
        raise DataError(
            f"{where}{_count(len(users), 'user')}; a tenth of them is validated on and a tenth tested on, so at least "
            "10 are needed; leave-one-out takes fewer"
        )
    valid, test = (
        [Instance(user.user, user.items[:at], item, user.where) for user in part for at, item in enumerate(user.items)]
        for part in (users[first:second], users[second:])
    )
    return _assemble(users, [user.items for user in users[:first]], valid, test, "chronological", notes)


def _assemble(
    users: Sequence[UserSequence],
    trained: Sequence[Sequence[ItemId]],
    valid: Sequence[Instance],
    test: Sequence[Instance],
    split: str,
    notes: Sequence[str],
) -> TrainingData:
    item_ids, numbers = _number_items(users)
    if len(item_ids) == 1:
        raise DataError(
            f"{users[0].where}: item {item_ids[0]!r} is the only one of all users; "
            "a model learns which of several items comes next, so at least 2 are needed"
        )
    if -1 in numbers:
        where = next(user.where for user in users if -1 in user.items)
        raise DataError(f"{where}: item id -1 stands for 'no item' in results; give the item another id")
    return TrainingData(
        item_ids,
        [np.array([numbers[item] for item in items], dtype=np.int64) for items in trained],
        valid,
        test,
        [*notes, *_notes_on_users(users), *_note_on_single(trained)],
        split,
        statistics(users),
    )


def _check_lengths(users: Sequence[UserSequence]) -> None:
    if not users:
        raise DataError("leave_one_out: there is no sequence at all; at least one user with 3 items is needed")
    short = [user for user in users if len(user.items) < _FEWEST]
    why = "leave-one-out holds out the last two items of each user, so at least 3 are needed"
    if len(short) == len(users):
        raise DataError(f"{users[0].where}: all {len(users)} users have fewer than 3 items; {why}")
    if short:
        more = f", and {_count(len(short) - 1, 'more user')} fewer than 3" if len(short) > 1 else ""
        raise DataError(
            f"{short[0].where}: user {short[0].user} has {_count(len(short[0].items), 'item')}{more}; {why}; "
            "leave these users out, or give --min-items 3"
        )


def _notes_on_users(users: Sequence[UserSequence]) -> list[str]:
    """Only sequence files can name a user twice."""
    first: dict[str, UserSequence] = {}
    again = [user for user in users if first.setdefault(user.user, user) is not user]
    if not again:
        return []
    one = again[0]
    same = sum(user.items == first[user.user].items for user in again)
    return [
        f"{_count(len(again), 'line')} of users who have one already ({same} with the same items; the first: user "
        f"{one.user}, {one.where}, before it {first[one.user].where}): each line counts as a user of its own"
    ]


def _note_on_single(trained: Sequence[Sequence[ItemId]]) -> list[str]:
    single = sum(len(items) < 2 for items in trained)
    return [f"{_count(single, 'user')} with a single item to learn from"] if single else []


def _number_items(users: Sequence[UserSequence]) -> tuple[list[ItemId], dict[ItemId, int]]:
    item_ids = sorted({item for user in users for item in user.items})
    return item_ids, {item: number for number, item in enumerate(item_ids)}


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# --- what it holds ----------------------------------------------------------------------------------------------------


def describe(data: TrainingData) -> list[str]:
    """What is about to be learned from, as lines for people."""
    lines = []
    if (found := data.statistics) is not None:
        low, first, median, third, high = found.lengths
        lines = [
            f"users         {found.users:,}: {found.mean_length:.1f} items each "
            f"(from {low:g} to {high:g}; quartiles {first:g}, {median:g}, {third:g})",
            f"items         {found.items:,}",
            f"interactions  {found.interactions:,}: {_per_cent(found.density)} of users times items; "
            f"{_per_cent(found.repeats)} repeat the item just before",
        ]
    trained = sum(map(len, data.sequences))
    lines += [
        f"split         {data.split or 'as given'}: {trained:,} items of {len(data.sequences):,} users to learn from, "
        f"{len(data.valid):,} to validate on, {len(data.test):,} to test on",
    ]
    seen = sum(instance.target in instance.history for instance in data.test)
    if seen:
        lines.append(f"seen          {_per_cent(seen / len(data.test))} of the test targets stand in their own history")
    if cold := data.cold_items:
        valid, test = (sum(instance.target in cold for instance in part) for part in (data.valid, data.test))
        lines.append(
            f"cold          {_count(len(cold), 'item')} in held-out places only, of which nothing is learned: "
            f"{valid:,} of the validation targets, {test:,} of the test targets"
        )
    return [*lines, *(f"note          {note}" for note in data.notes)]


def _per_cent(share: float) -> str:
    return f"{100 * share:.3g} per cent"


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
