"""What is worked out once for an object and kept as long as the object lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Owner = TypeVar("Owner")
Made = TypeVar("Made")


class PerObject(Generic[Made]):
    """Values by object, told apart by identity; an object must not change afterwards. Not pickled: copies start empty.

    Safe to use from several threads: two that come first may both make a value, and the one that is kept first stays,
    for a captured CUDA graph may read it.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], Made]] = {}

    def get(self, owner: Owner, make: Callable[[Owner], Made]) -> Made:
        """The value of `owner`; make(owner) the first time."""
        entry = self._entries.get(id(owner))
        if entry is not None and entry[0]() is owner:
            return entry[1]
        made, key, entries = make(owner), id(owner), self._entries
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # later calls may come on other streams
            torch.cuda.current_stream().synchronize()

        def forget(dead: weakref.ref[Any]) -> None:
            now = entries.get(key)
            if now is not None and now[0] is dead:  # another object may have taken the address in the meantime
                entries.pop(key, None)

        mine = (weakref.ref(owner, forget), made)
        kept = entries.setdefault(key, mine)
        if kept[0]() is not owner:  # left by an object that died
            entries[key] = kept = mine
        return kept[1]

    def __reduce__(self) -> tuple[type[PerObject[Made]], tuple[()]]:
        return PerObject, ()


_made: dict[Callable[[Any], Any], PerObject[Any]] = {}


def packed(owner: Owner, make: Callable[[Owner], Made]) -> Made:
    """make(owner), kept as long as `owner` lives. An owner is told by identity; it must not change afterwards.

    make  a function of a module, since it is part of the key
    """
    cache = _made.get(make)
    if cache is None:
        cache = _made.setdefault(make, PerObject())
    kept: Made = cache.get(owner, make)
    return kept
