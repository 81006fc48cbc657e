"""Files of histories, and the splits that evaluation uses.

Three kinds of files are read, told apart by how the name ends:

    any name   a sequence file: one user per line, `user item item ...`, oldest item first, separated by white space.
               Blank lines are skipped; there are no comments. Read line by line: it may be larger than memory
    .inter     RecBole's interactions: tab-separated columns under a header such as `user_id:token  item_id:token
               timestamp:float`. Rows are sorted by user (as numbers where all users are numbers), then by time; equal
               times keep the order of the file, and so does a file without a timestamp column. Read at once
    .npz       ready-made evaluation instances, arrays of B rows: `history` [B, L] integer, right-padded with anything,
               `history_len` [B] integer, `target` [B] integer

Users are kept as the text that the file holds. Items are ints or text, as the catalogue's ids are (`id_type`). Every
error is a `DataError` that names file and line.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fastdiff.errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from fastdiff.catalog import ItemCatalog
    from fastdiff.config import ModelConfig

ItemId = int | str
IdType = type[int] | type[str]

SPLITS = {"test": 1, "valid": 2}
"""Name -> how many items from the end the target stands."""

_LINE = "a line is `user item item ...`, separated by white space"
_NOT_AN_INT = re.compile(r"[^0-9\-\s]")
_INT64 = range(-(1 << 63), 1 << 63)


class UserSequence(NamedTuple):
    """All items of one user, oldest first. `where` is "file:line", for messages."""

    user: str
    items: list[ItemId]
    where: str


class Instance(NamedTuple):
    """One row of an evaluation: what is known of the user, and the item to be found."""

    user: str
    history: list[ItemId]
    target: ItemId
    where: str


# --- files of sequences -----------------------------------------------------------------------------------------------


class SequenceFile:
    """A sequence file or a RecBole `.inter` file as an iterable of `UserSequence`; iterate it as often as needed.

    id_type  int or str: what items are. With int, anything else than an integer of 64 bits is a `DataError`
    notes    what a reader of the file should know, as sentences; some are known only when it has been read
    A user with two lines in a sequence file counts as two users.
    """

    def __init__(self, path: str | Path, id_type: IdType = int) -> None:
        if id_type not in (int, str):
            raise InvalidArgument(f"SequenceFile: id_type must be int or str (got {id_type!r})")
        self.path, self.id_type = Path(path), id_type
        self.notes: list[str] = []
        self._columns: _Columns | None = None
        _check_is_file(self.path)
        if self.path.suffix == ".npz":
            raise DataError(
                f"{self.path}: an .npz file holds evaluation instances, not sequences; `fastdiff evaluate` reads it "
                "(InstanceFile in Python); a sequence file or a RecBole .inter file is accepted here"
            )
        if self.path.suffix == ".inter":
            self._columns = _inter_columns(self.path)
            if self._columns.timestamp is None:
                self.notes.append(
                    f"{self.path.name} has no timestamp column: a user's interactions keep the order of the file"
                )

    def __iter__(self) -> Iterator[UserSequence]:
        if self._columns is not None:
            return self._read_inter(self._columns)
        return self._read_lines()

    def _read_lines(self) -> Iterator[UserSequence]:
        for where, text in _numbered_lines(self.path):
            user, *rest = text.split(None, 1)
            if not rest:
                raise DataError(
                    f"{where}: a user without items (got {_shown(text)}); {_LINE}, with at least one item; "
                    "leave users without a history out of the file"
                )
            yield UserSequence(user, parse_items(rest[0], self.id_type, where), where)

    def timed(self) -> Iterator[tuple[UserSequence, list[float]]]:
        """The users of an .inter file with the time of each item, ascending."""
        if self._columns is None or self._columns.timestamp is None:
            lacks = "it has no timestamp column" if self._columns else "a sequence file holds no times"
            raise DataError(
                f"{self.path}: the times of its interactions are needed, and {lacks}; a RecBole .inter file with the "
                "columns user_id, item_id and timestamp is accepted"
            )
        return self._read_timed(self._columns)

    def _read_inter(self, columns: _Columns) -> Iterator[UserSequence]:
        return (user for user, _ in self._read_timed(columns))

    def _read_timed(self, columns: _Columns) -> Iterator[tuple[UserSequence, list[float]]]:
        users: dict[str, list[tuple[float, ItemId]]] = {}
        lines: dict[str, str] = {}
        backwards: list[str] = []
        rows = _numbered_lines(self.path)
        next(rows)
        for where, text in rows:
            cells = text.rstrip("\r\n").split("\t")
            if len(cells) != columns.count:
                raise DataError(
                    f"{where}: {len(cells)} columns (got {_shown(text)}); the header names {columns.count}; "
                    "columns are separated by one tab each"
                )
            user, item = cells[columns.user].strip(), cells[columns.item].strip()
            if not user or not item:
                raise DataError(
                    f"{where}: the {'item' if user else 'user'} id is empty (got {_shown(text)}); each row needs both"
                )
            time = 0.0 if columns.timestamp is None else _timestamp(cells[columns.timestamp], where)
            events = users.setdefault(user, [])
            if events and time < events[-1][0]:
                backwards.append(where)
            events.append((time, _int_id(item, where) if self.id_type is int else item))
            lines.setdefault(user, where)
        if backwards:
            self._note(
                f"{self.path.name} is not in the order of time, and was sorted; interactions older than the one before "
                f"them of the same user: {len(backwards):,} (the first: {backwards[0]})"
            )
        for user in _sorted_users(users):
            events = sorted(users[user], key=lambda event: event[0])
            yield UserSequence(user, [item for _, item in events], lines[user]), [time for time, _ in events]

    def _note(self, text: str) -> None:
        if text not in self.notes:  # the file may be read again
            self.notes.append(text)


def parse_items(text: str, id_type: IdType, where: str) -> list[ItemId]:
    """The item ids of a text, separated by white space; `where` is named in errors."""
    tokens = text.split()
    if id_type is str:
        return list(tokens)
    if tokens and not _NOT_AN_INT.search(text):
        try:
            items = list(map(int, tokens))
        except ValueError:
            pass  # such as 1-2: the loop below names it
        else:
            if min(items) in _INT64 and max(items) in _INT64:
                return list(items)
    return [_int_id(token, where) for token in tokens]


def read_items(path: str | Path, id_type: IdType) -> list[ItemId]:
    """All item ids of a text file, separated by white space."""
    _check_is_file(Path(path))
    return [item for where, text in _numbered_lines(Path(path)) for item in parse_items(text, id_type, where)]


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "there is no such file"
        raise DataError(
            f"{path}: {what}; a sequence file, a RecBole .inter file or an .npz file of instances is accepted"
        )


def _numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:number", text) of every line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8 text "
                    f"(got 0x{raw[error.start]:02x}); convert the file to UTF-8"
                ) from error
            if not text.isspace() and text:
                yield f"{path}:{number}", text


def _int_id(token: str, where: str) -> int:
    if not re.fullmatch(r"-?[0-9]+", token) or int(token) not in _INT64:
        raise DataError(
            f"{where}: item id {_shown(token)} is not an integer of 64 bits; the catalogue's ids are integers, "
            "and so must be those given (`fastdiff train` learns a catalogue of text ids with --text-ids)"
        )
    return int(token)


def _shown(text: str) -> str:
    text = text.rstrip("\r\n")
    return repr(text if len(text) <= 60 else text[:57] + "...")


@dataclass(frozen=True)
class _Columns:
    count: int
    user: int
    item: int
    timestamp: int | None


def _inter_columns(path: Path) -> _Columns:
    where, header = next(_numbered_lines(path), (f"{path}:1", ""))
    names = [cell.strip().partition(":")[0] for cell in header.split("\t")]
    missing = [name for name in ("user_id", "item_id") if name not in names]
    if missing:
        raise DataError(
            f"{where}: the header has no column {' and no column '.join(missing)} (got {_shown(header)}); "
            "a header such as 'user_id:token<tab>item_id:token<tab>timestamp:float' is accepted"
        )
    timestamp = names.index("timestamp") if "timestamp" in names else None
    return _Columns(len(names), names.index("user_id"), names.index("item_id"), timestamp)


def _timestamp(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: timestamp {_shown(cell)} is not a finite number, such as seconds since 1970")
    return value


def _sorted_users(users: Iterable[str]) -> list[str]:
    names = list(users)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=int)
    return sorted(names)


# --- splits and instances ---------------------------------------------------------------------------------------------


class LeaveOneOut:
    """The usual split: of each sequence, the last item is the test target, the one before it the validation target.

        test    history = items[:-1], target = items[-1]
        valid   history = items[:-2], target = items[-2]

    Users with fewer than `min_history` items left in the history are skipped; `skipped` counts them while iterating.
    """

    def __init__(self, sequences: Iterable[UserSequence], split: str = "test", min_history: int = 1) -> None:
        if split not in SPLITS:
            raise InvalidArgument(f"LeaveOneOut: split must be one of {', '.join(SPLITS)} (got {split!r})")
        if not isinstance(min_history, int) or isinstance(min_history, bool) or min_history < 0:
            raise InvalidArgument(f"LeaveOneOut: min_history must be an int of at least 0 (got {min_history!r})")
        self.sequences, self.split, self.min_history = sequences, split, min_history
        self.skipped = 0

    @property
    def min_items(self) -> int:
        """The fewest items that a user needs."""
        return self.min_history + SPLITS[self.split]

    def __iter__(self) -> Iterator[Instance]:
        self.skipped = 0
        held_out = SPLITS[self.split]
        for user, items, where in self.sequences:
            if len(items) < self.min_items:
                self.skipped += 1
            else:
                yield Instance(user, items[:-held_out], items[-held_out], where)


class InstanceFile:
    """An `.npz` file of instances: an iterable of `Instance` with a length; users are the row numbers.

    history [B, L], history_len [B], target [B], all integer. The first `history_len` entries of a row are its history,
    oldest first. A history that holds only the model's pad id is a cold user's, as in DreamRec's files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _check_is_file(self.path)
        arrays = self._load()
        self.history, self.history_len, self.target = arrays["history"], arrays["history_len"], arrays["target"]
        width = self.history.shape[1]
        wrong = np.flatnonzero((self.history_len < 0) | (self.history_len > width))
        if wrong.size:
            raise DataError(
                f"{self.path}: history_len[{wrong[0]}] is {self.history_len[wrong[0]]}; "
                f"history has {width} columns, so 0..{width} is accepted"
            )

    def _load(self) -> dict[str, npt.NDArray[np.int64]]:
        names = {"history": 2, "history_len": 1, "target": 1}
        accepted = "integer arrays history [B, L], history_len [B] and target [B] are accepted"
        try:
            loaded = np.load(self.path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("it holds a single array")
            with loaded as archive:
                found: dict[str, npt.NDArray[Any]] = {name: archive[name] for name in archive.files if name in names}
                others = list(archive.files)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path}: not an .npz file of plain arrays ({error}); {accepted}") from error
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(
                f"{self.path}: no array {' and no array '.join(missing)} (got {', '.join(others) or 'none'}); "
                f"{accepted}"
            )
        for name, ndim in names.items():
            array = found[name]
            if array.ndim != ndim or array.dtype.kind not in "iu" or len(array) != len(found["history"]):
                raise DataError(f"{self.path}: {name} has shape {array.shape} and dtype {array.dtype}; {accepted}")
        return {name: array.astype(np.int64) for name, array in found.items()}

    def __len__(self) -> int:
        return len(self.target)

    def __iter__(self) -> Iterator[Instance]:
        for row in range(len(self)):
            history = self.history[row, : self.history_len[row]].tolist()
            yield Instance(str(row), history, int(self.target[row]), f"{self.path}, row {row}")


# --- against a catalogue ----------------------------------------------------------------------------------------------


def id_type_of(catalog: ItemCatalog) -> IdType:
    """int or str: what the external ids of a catalogue are."""
    return catalog.id_type


class _Located(Protocol):
    @property
    def where(self) -> str: ...


def check_known(
    rows: Sequence[_Located], histories: Sequence[list[ItemId]], catalog: ItemCatalog, config: ModelConfig
) -> None:
    """Raise a `DataError` naming the line of the first item that the catalogue lacks (the model's pad id passes)."""
    flat = [item for history in histories for item in history]
    is_text = id_type_of(catalog) is str
    rows_found = catalog.known(np.array(flat, dtype=object if is_text else np.int64))
    for position in np.flatnonzero(rows_found < 0):
        item = flat[int(position)]
        if is_text or item != config.pad_id:
            user = int(np.searchsorted(np.cumsum([len(history) for history in histories]), position, side="right"))
            raise DataError(
                f"{rows[user].where}: item id {item!r} is not in the catalogue, which has {catalog.describe_ids()}; "
                "leave the item out, or add it to the catalogue"
            )


@dataclass(frozen=True)
class Statistics:
    """What a data set holds; lengths are items per user.

    lengths  the shortest, the quartiles and the longest
    repeats  share of the items, a user's first one aside, that are the same as the one just before
    """

    users: int
    items: int
    interactions: int
    mean_length: float
    lengths: tuple[float, float, float, float, float]
    repeats: float

    @property
    def median_length(self) -> float:
        return self.lengths[2]

    @property
    def density(self) -> float:
        """interactions / (users * items)"""
        return self.interactions / max(1, self.users * self.items)


def statistics(sequences: Iterable[UserSequence]) -> Statistics:
    """Count users, distinct items and interactions; one pass, in memory proportional to users plus items."""
    items: set[ItemId] = set()
    lengths: list[int] = []
    repeats = 0
    for sequence in sequences:
        items.update(sequence.items)
        lengths.append(len(sequence.items))
        repeats += sum(map(eq, sequence.items, sequence.items[1:]))
    if not lengths:
        return Statistics(0, 0, 0, 0.0, (0.0,) * 5, 0.0)
    lowest, first, median, third, highest = map(float, np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
    n = sum(lengths)
    return Statistics(
        len(lengths),
        len(items),
        n,
        n / len(lengths),
        (lowest, first, median, third, highest),
        repeats / max(1, n - len(lengths)),
    )
