"""External item ids: row numbers, integers or strings, and what row of the item table each names.

Three classes with one interface; an instance is one snapshot, never changed. `fastdiff.catalog` makes new ones from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.errors import CatalogError

if TYPE_CHECKING:
    from fastdiff._C import ItemIndex
try:
    from fastdiff import _C
except ImportError:  # the C++ part is optional: without it ids are looked up in numpy
    _C = None  # type: ignore[assignment]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
IdArray = npt.NDArray[Any]
"""int64, or object holding str."""

KINDS = "all integers or all strings"


class ItemIds(ABC):
    """The external id of each row, [R]. A removed item's id stays known, for histories that hold it, until it is given
    to another item.

    is_item  [R] bool        special  row -> name of the rows that never were items
    """

    kind: str

    def __init__(self, is_item: BoolArray, special: dict[int, str]) -> None:
        self.is_item, self.special = is_item, special

    @property
    def n_rows(self) -> int:
        return len(self.is_item)

    @cached_property
    def index(self) -> ItemIndex | None:
        """`known` in C++, which reads lists of ids itself; None where fastdiff._C was not built."""
        return None if _C is None else self._make_index(_C.ItemIndex)

    @abstractmethod
    def _make_index(self, kind: type[ItemIndex]) -> ItemIndex: ...

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "index"}  # made again where it is used

    @abstractmethod
    def known(self, ids: IdArray) -> IntArray:
        """The row of each id, of items and of removed ones; -1 for all else."""

    def lookup(self, ids: IdArray) -> IntArray:
        """The row of each id, -1 for ids that name no item."""
        rows = self.known(ids)
        return np.where((rows >= 0) & self.is_item[rows], rows, -1) if self.n_rows else rows

    @abstractmethod
    def external(self, rows: Tensor) -> Tensor | IdArray:
        """The id of each row, in the shape of `rows` and apart from it; see `ItemCatalog.external`."""

    @abstractmethod
    def listed(self) -> tuple[int, ...] | tuple[str, ...]:
        """The id of every item, in row order."""

    @abstractmethod
    def describe(self) -> str:
        """What ids there are, for a message."""

    @abstractmethod
    def added(self, ids: IdArray) -> ItemIds:
        """With one more row per id; the ids name no item yet, and are of this kind (see `takes`)."""

    def removed(self, rows: IntArray) -> ItemIds:
        """With these rows no items any more."""
        is_item = self.is_item.copy()
        is_item[rows] = False
        return self._with_items(is_item)

    @abstractmethod
    def _with_items(self, is_item: BoolArray) -> ItemIds: ...

    def takes(self, ids: IdArray) -> bool:
        """Whether ids of this type can be added."""
        return (ids.dtype == object) == (self.kind == "str") or not len(ids)

    def _grown(self, n: int) -> BoolArray:
        return np.concatenate([self.is_item, np.ones(n, dtype=np.bool_)])


class RowIds(ItemIds):
    """Ids that are the row numbers: no map at all."""

    kind = "row"

    def _make_index(self, kind: type[ItemIndex]) -> ItemIndex:
        return kind.of_rows(self.n_rows, list(self.special))

    def known(self, ids: IdArray) -> IntArray:
        if ids.dtype == object:
            return np.full(len(ids), -1)
        rows: IntArray = np.where((ids >= 0) & (ids < self.n_rows), ids, -1)
        for row in self.special:
            rows[rows == row] = -1
        return rows

    def external(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def listed(self) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self.is_item).tolist())

    def describe(self) -> str:
        return _describe_integers(np.flatnonzero(self.is_item))

    def added(self, ids: IdArray) -> ItemIds:
        if np.array_equal(ids, np.arange(self.n_rows, self.n_rows + len(ids))):
            return RowIds(self._grown(len(ids)), self.special)
        by_row = np.arange(self.n_rows)
        by_row[list(self.special)] = -1
        return IntegerIds(by_row, self.is_item, self.special).added(ids)

    def _with_items(self, is_item: BoolArray) -> RowIds:
        return RowIds(is_item, self.special)


class IntegerIds(ItemIds):
    """Integers of 64 bits: found by bisection in a sorted copy."""

    kind = "int"

    def __init__(
        self,
        by_row: IntArray,
        is_item: BoolArray,
        special: dict[int, str],
        index: tuple[IntArray, IntArray] | None = None,
    ) -> None:
        """by_row [R], the id of each row, -1 for special ones; index: (ids, their rows), sorted by id, each id once."""
        super().__init__(is_item, special)
        self.shown = np.concatenate([by_row, np.full(1, -1)])  # row -1 is no item
        self.sorted_ids, self.sorted_rows = self._sort(by_row) if index is None else index

    @property
    def by_row(self) -> IntArray:
        return self.shown[:-1]

    @staticmethod
    def _sort(by_row: IntArray) -> tuple[IntArray, IntArray]:
        """Of rows with one id the last counts: an id is given again only to a row behind the removed one."""
        backwards = by_row[::-1]
        ids, place = np.unique(backwards, return_index=True)
        keep = ids != -1
        return ids[keep], len(by_row) - 1 - place[keep]

    def _make_index(self, kind: type[ItemIndex]) -> ItemIndex:
        return kind.of_integers(self.sorted_ids, self.sorted_rows)

    def known(self, ids: IdArray) -> IntArray:
        if ids.dtype == object or not len(self.sorted_ids):
            return np.full(len(ids), -1)
        place = np.searchsorted(self.sorted_ids, ids)
        place[place == len(self.sorted_ids)] = 0
        return np.where(self.sorted_ids[place] == ids, self.sorted_rows[place], -1)

    def external(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.shown[rows.cpu().numpy()]).to(rows.device)

    def listed(self) -> tuple[int, ...]:
        return tuple(self.by_row[self.is_item].tolist())

    def describe(self) -> str:
        return _describe_integers(np.sort(self.by_row[self.is_item]))

    def added(self, ids: IdArray) -> IntegerIds:
        by_row = np.concatenate([self.by_row, ids])
        free = ~np.isin(self.sorted_ids, ids)  # ids of removed items now name the new ones
        kept_ids, kept_rows = self.sorted_ids[free], self.sorted_rows[free]
        order = np.argsort(ids, kind="stable")
        place = np.searchsorted(kept_ids, ids[order])
        index = np.insert(kept_ids, place, ids[order]), np.insert(kept_rows, place, self.n_rows + order)
        return IntegerIds(by_row, self._grown(len(ids)), self.special, index)

    def _with_items(self, is_item: BoolArray) -> IntegerIds:
        return IntegerIds(self.by_row, is_item, self.special, (self.sorted_ids, self.sorted_rows))


class StringIds(ItemIds):
    """Strings: a dict."""

    kind = "str"

    def __init__(
        self, by_row: IdArray, is_item: BoolArray, special: dict[int, str], index: dict[str, int] | None = None
    ) -> None:
        """by_row [R] object: str, or None for special rows; of rows with one id the last counts."""
        super().__init__(is_item, special)
        self.by_row = by_row
        self._shown = np.concatenate([by_row, np.full(1, None, dtype=object)])  # row -1 is no item
        self._shown[list(special)] = list(special.values())
        if index is None:
            index = {item: row for row, item in enumerate(by_row.tolist()) if item is not None}
        self._row_of = index

    def _make_index(self, kind: type[ItemIndex]) -> ItemIndex:
        return kind.of_strings(self._row_of)

    def known(self, ids: IdArray) -> IntArray:
        find = self._row_of.get
        return np.fromiter((find(item, -1) for item in ids.tolist()), dtype=np.int64, count=len(ids))

    def external(self, rows: Tensor) -> IdArray:
        names: IdArray = self._shown[rows.cpu().numpy()]
        return names

    def listed(self) -> tuple[str, ...]:
        return tuple(self.by_row[self.is_item].tolist())

    def describe(self) -> str:
        items = self.by_row[self.is_item]
        if not len(items):
            return "no items"
        some = [repr(item) for item in items[:3]]
        return f"{len(items)} string ids ({', '.join(some)}{', ...' if len(items) > 3 else ''})"

    def added(self, ids: IdArray) -> StringIds:
        return StringIds(np.concatenate([self.by_row, ids]), self._grown(len(ids)), self.special)

    def _with_items(self, is_item: BoolArray) -> StringIds:
        return StringIds(self.by_row, is_item, self.special, self._row_of)


def item_ids(ids: Any, is_item: BoolArray, special: dict[int, str], where: str) -> ItemIds:
    """The ids of a new catalogue: `ids` holds one per item in row order; None: the row numbers."""
    if ids is None:
        return RowIds(is_item, special)
    values, rows = as_id_array(ids, where), np.flatnonzero(is_item)
    if len(values) != len(rows):
        raise CatalogError(f"{where}: must hold one id per item, {len(rows)} (got {len(values)})")
    check_new_ids(values, where)
    if values.dtype == object:
        names = np.full(len(is_item), None, dtype=object)
        names[rows] = values
        return StringIds(names, is_item, special)
    by_row = np.full(len(is_item), -1)
    by_row[rows] = values
    return IntegerIds(by_row, is_item, special)


def as_id_array(ids: Any, where: str) -> IdArray:
    """A flat sequence, array or tensor of ids as int64, or as object holding str; raises CatalogError for all else."""
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1:
            raise CatalogError(f"{where}: must be flat (got shape {list(ids.shape)})")
        if ids.dtype.kind in "iu" and (ids.dtype != np.uint64 or not (ids >> np.uint64(63)).any()):
            return ids.astype(np.int64, copy=False)
        if ids.size == 0:
            return np.zeros(0, dtype=np.int64)
        if ids.dtype.kind == "U":
            return ids.astype(object)
        if ids.dtype != object:
            raise CatalogError(f"{where}: ids must be {KINDS} (got dtype {ids.dtype}); convert them first")
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise CatalogError(f"{where}: must be a sequence, array or tensor of ids (got {type(ids).__name__})")
    types = set(map(type, ids))
    if types <= {int}:
        try:
            return np.array(ids, dtype=np.int64)
        except OverflowError:
            at = next(i for i, item in enumerate(ids) if not -(1 << 63) <= item < 1 << 63)
            raise CatalogError(f"{where}[{at}]: integers must have 64 bits (got {ids[at]}); use strings") from None
    if all(issubclass(kind, str) for kind in types):
        return np.array([str(item) for item in ids], dtype=object)
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in types):
        return as_id_array([int(item) for item in ids], where)
    first = str if isinstance(ids[0], str) else int
    accepted = (str,) if first is str else (int, np.integer)
    at = next(i for i, item in enumerate(ids) if not isinstance(item, accepted) or isinstance(item, bool))
    raise CatalogError(f"{where}: ids must be {KINDS} (got {ids[at]!r} of type {type(ids[at]).__name__} at index {at})")


def check_new_ids(ids: IdArray, where: str) -> None:
    """Raise for an id that stands twice, and for -1, which means no item."""
    if ids.dtype != object and (ids == -1).any():
        at = int(np.flatnonzero(ids == -1)[0])
        raise CatalogError(f"{where}[{at}]: -1 cannot be an item id, it stands for 'no item' in results; use another")
    if len(set(ids.tolist())) == len(ids):
        return
    first: dict[Any, int] = {}
    for at, item in enumerate(ids.tolist()):
        if item in first:
            raise CatalogError(f"{where}[{at}]: item id {item!r} is already at index {first[item]}; ids must be unique")
        first[item] = at


def shown(ids: IdArray, at: int) -> str:
    """One id for a message, without numpy's name around it."""
    return repr(ids[at : at + 1].tolist()[0])


def _describe_integers(ids: IntArray) -> str:
    if not len(ids):
        return "no items"
    low, high = int(ids[0]), int(ids[-1])
    if high - low + 1 == len(ids):
        return f"ids {low}..{high}"
    return f"{len(ids)} ids from {low} to {high}"
