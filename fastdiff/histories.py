"""From what a caller holds to what a model sees: ids to rows of the item table, padding off, cut to the window.

Accepted: a list of histories (each a list, tuple, numpy array or tensor of external item ids, any length, empty for a
cold user), or one padded integer array or tensor `[B, L]`, padded on either side with -1 or the model's own pad id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.catalog import ItemCatalog
from fastdiff.config import ModelConfig
from fastdiff.errors import InvalidHistory
from fastdiff.models.base import Histories
from fastdiff.noise import history_row_key
from fastdiff.ops.score_topk import UserLists

IntArray = npt.NDArray[np.int64]
ArrayLike = Sequence[Any] | npt.NDArray[Any] | Tensor

_ACCEPTED = (
    "a list of histories (lists of item ids, oldest first) or an integer array [B, L], padded on either side with -1 "
    "or the model's pad id, is accepted"
)


Packed = tuple[IntArray, IntArray, IntArray, IntArray, IntArray | None]
"""window items [B, n], window lengths [B], rows of every item given, their offsets [B + 1], row keys [B] or None."""


class ParsedHistories:
    """The histories of one call, on the host.

    n_users   B
    window    what the model sees
    seen      rows of every item given, also those outside the window
    row_key   [B] int64, a hash of what the model sees
    """

    __slots__ = ("_offsets", "_row_key", "_rows", "n_users", "window")

    checks: ClassVar[tuple[Callable[[], None], ...]] = ()  # they were made

    def __init__(self, packed: Packed) -> None:
        items, lengths, self._rows, self._offsets, self._row_key = packed
        self.n_users = len(lengths)
        self.window = Histories(torch.from_numpy(items), torch.from_numpy(lengths))

    @property
    def seen(self) -> UserLists:
        return UserLists.trusted(torch.from_numpy(self._rows), torch.from_numpy(self._offsets))

    @property
    def only_seen(self) -> UserLists:
        """The same."""
        return self.seen

    @property
    def row_key(self) -> Tensor:
        if self._row_key is None:
            return history_row_key(self.window.items, self.window.lengths)
        return torch.from_numpy(self._row_key)

    def packed(self) -> list[Tensor]:
        """Window items and lengths, rows of every item given and their offsets, and row keys where they are known."""
        window = [self.window.items, self.window.lengths]
        others = (self._rows, self._offsets, self._row_key)
        return window + [torch.from_numpy(part) for part in others if part is not None]


def parse_histories(histories: ArrayLike, catalog: ItemCatalog, config: ModelConfig) -> ParsedHistories:
    """Check, map and pack `histories`, on the CPU; raises `InvalidHistory` naming the history and the id that is wrong.

    `pack_in_python` says what that means. Where fastdiff._C is there, it does the same in one pass over what it knows
    for right, and leaves everything else to Python.
    """
    if isinstance(histories, Tensor):
        histories = _to_numpy(histories, "histories")
    packed = _pack_in_cpp(histories, catalog, config)
    if packed is None and not _is_padded(histories):
        histories = _as_lists(histories)
        packed = _pack_in_cpp(histories, catalog, config)
    return ParsedHistories(packed or pack_in_python(histories, catalog, config))


def _pack_in_cpp(histories: Any, catalog: ItemCatalog, config: ModelConfig) -> Packed | None:
    index = catalog.index
    return None if index is None else index.pack(histories, config.pad_id, config.pad_inside, config.max_seq_len)


def pack_in_python(histories: Any, catalog: ItemCatalog, config: ModelConfig) -> Packed:
    """The definition of what is accepted, what is refused and in which words, and how histories are packed.

    histories  a padded array [B, L], or anything else that holds histories
    """
    ids, lengths, padded = _flatten(histories)
    user = np.repeat(np.arange(len(lengths)), lengths)
    rows, is_pad = _to_rows(ids, user, catalog, config)
    rows, user = _strip_padding(ids, rows, user, is_pad, len(lengths), config, padded)
    lengths = np.bincount(user, minlength=len(lengths))
    ends = np.cumsum(lengths)

    window_lengths = np.minimum(lengths, config.max_seq_len)
    width = int(window_lengths.max(initial=0))
    columns = np.arange(width)
    inside = columns < window_lengths[:, None]
    source = (ends - window_lengths)[:, None] + columns
    items = np.full((len(lengths), width), config.pad_id, dtype=np.int64)
    items[inside] = rows[source[inside]]
    # where the pad id may stand between items, it is an item that the user has seen
    return items, window_lengths, rows, np.concatenate([[0], ends]), None


def _is_padded(histories: Any) -> TypeGuard[npt.NDArray[Any]]:
    return isinstance(histories, np.ndarray) and histories.dtype != object


def _flatten(histories: Any) -> tuple[npt.NDArray[Any], IntArray, bool]:
    """All ids one after the other, the length of each history, and whether they came as one padded array."""
    if _is_padded(histories):
        if histories.ndim != 2:
            raise InvalidHistory(
                f"generate: histories has shape {histories.shape}; {_ACCEPTED}; "
                "for one user, wrap the history: [history]"
            )
        lengths = np.full(histories.shape[0], histories.shape[1], dtype=np.int64)
        return _check_dtype(histories.reshape(-1), "histories"), lengths, True
    parts = _as_lists(histories)
    lengths = np.fromiter((len(part) for part in parts), dtype=np.int64, count=len(parts))
    flat = list(chain.from_iterable(parts))
    types = set(map(type, flat))
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in types):
        try:
            return np.array(flat, dtype=np.int64), lengths, False
        except OverflowError:
            raise InvalidHistory("generate: histories hold an id of more than 64 bits; use strings as ids") from None
    if all(issubclass(kind, str) for kind in types):
        return np.array([str(value) for value in flat], dtype=object), lengths, False
    accepted = (str,) if isinstance(flat[0], str) else (int, np.integer)
    position, value = next(
        (position, value)
        for position, part in enumerate(parts)
        for value in part
        if isinstance(value, bool) or not isinstance(value, accepted)
    )
    raise InvalidHistory(
        f"generate: histories[{position}] holds {value!r}, a {type(value).__name__}; item ids are all integers, or all "
        "strings where the catalogue's ids are; convert them first"
    )


def _as_lists(histories: Any) -> list[Sequence[Any]]:
    if isinstance(histories, (str, bytes, dict)) or not hasattr(histories, "__iter__"):
        raise InvalidHistory(f"generate: histories is a {type(histories).__name__}; {_ACCEPTED}")
    return [_one_history(position, history) for position, history in enumerate(histories)]


def _one_history(position: int, history: Any) -> Sequence[Any]:
    if isinstance(history, Tensor):
        history = _to_numpy(history, f"histories[{position}]")
    if isinstance(history, np.ndarray):
        if history.ndim != 1:
            raise InvalidHistory(f"generate: histories[{position}] has shape {history.shape}; each history is 1-D")
        if history.size and history.dtype != object:
            _check_dtype(history, f"histories[{position}]")
        return history.tolist()  # type: ignore[no-any-return]
    if isinstance(history, (list, tuple, range)):
        return history
    hint = "; for one user, wrap the history: [history]" if isinstance(history, (int, str)) else ""
    raise InvalidHistory(
        f"generate: histories[{position}] is a {type(history).__name__} ({history!r}); {_ACCEPTED}{hint}"
    )


def _to_numpy(tensor: Tensor, name: str) -> npt.NDArray[Any]:
    if tensor.layout != torch.strided:
        raise InvalidHistory(f"generate: {name} is a {tensor.layout} tensor; a dense one is accepted: use .to_dense()")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InvalidHistory(f"generate: {name} has dtype {dtype}; item ids are integers: convert with .long()")
    array: npt.NDArray[Any] = (tensor if tensor.is_cpu else tensor.cpu()).numpy()
    return array


def _check_dtype(values: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    if values.dtype.kind == "U":
        return values.astype(object)
    if values.size == 0:
        return np.zeros(0, dtype=np.int64)
    raise InvalidHistory(
        f"generate: {name} has dtype {values.dtype}; item ids are integers: convert with .astype(int64)"
    )


def _to_rows(
    ids: npt.NDArray[Any], user: IntArray, catalog: ItemCatalog, config: ModelConfig
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Rows of the item table (the pad row at pads), and where the pads are."""
    rows = catalog.known(ids)
    unknown = rows < 0
    if not unknown.any():
        return rows, np.zeros(len(rows), dtype=np.bool_)
    is_pad = np.zeros(len(rows), dtype=np.bool_)
    if ids.dtype != object:
        # -1 marks padding, and so does the model's pad id unless the catalogue gave that number to an item
        is_pad = unknown & ((ids == config.pad_id) | (ids == -1))
    wrong = unknown & ~is_pad
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        unknown_id = ids[first : first + 1].tolist()[0]
        if not isinstance(unknown_id, catalog.id_type):
            kinds = ("a string", "integers") if catalog.id_type is int else ("an integer", "strings")
            raise InvalidHistory(
                f"generate: histories[{user[first]}] holds item id {unknown_id!r}, {kinds[0]}; the ids of this "
                f"catalogue are {kinds[1]} ({catalog.describe_ids()}): convert them first"
            )
        raise InvalidHistory(
            f"generate: histories[{user[first]}] holds item id {unknown_id!r}, "
            f"the catalogue has {catalog.describe_ids()}; add the item to the catalogue or leave it out"
        )
    return np.where(is_pad, config.pad_id, rows), is_pad


def _strip_padding(
    ids: npt.NDArray[Any],
    rows: IntArray,
    user: IntArray,
    is_pad: npt.NDArray[np.bool_],
    n_users: int,
    config: ModelConfig,
    padded: bool,
) -> tuple[IntArray, IntArray]:
    """Drop the pads before the first and after the last item; pads between items are an error, or a masked slot."""
    if not is_pad.any():
        return rows, user
    before, after = _edges(is_pad, user, n_users)
    wrong = is_pad & ~before & ~after
    if config.pad_inside:
        wrong &= ids == -1
    if wrong.any():
        where = int(user[np.flatnonzero(wrong)[0]])
        raise InvalidHistory(
            f"generate: histories[{where}] holds padding between its items (the pad id {config.pad_id} or -1); padding "
            "may stand before the first or after the last item; leave it out"
        )
    drop = is_pad
    if config.pad_inside:
        # a pad id at an edge may be an item: it is one in a list, where -1 marks the padding, and behind a left-padded
        # history
        marked, left_padded = np.zeros((2, n_users), dtype=np.bool_)
        marked |= not padded
        marked[user[ids == -1]] = True
        left_padded[user[before]] = True
        drop = np.where(marked[user], ids == -1, before | (after & ~left_padded[user]))
    return rows[~drop], user[~drop]


def _edges(
    is_pad: npt.NDArray[np.bool_], user: IntArray, n_users: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which ids stand before a user's first item, and which behind the last (all of them where there is none)."""
    position = np.arange(len(is_pad))
    first, last = np.full(n_users, len(is_pad)), np.full(n_users, -1)
    np.minimum.at(first, user[~is_pad], position[~is_pad])
    np.maximum.at(last, user[~is_pad], position[~is_pad])
    return position < first[user], position > last[user]
