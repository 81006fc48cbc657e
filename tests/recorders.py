"""Stand-ins for CUDA graphs on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastdiff.pipeline import Ranked
from tests.syncs import no_syncs


class _OneAtATime:
    """What all recorders must be told: whose turn it is, on which buffer."""

    def __init__(self, device: torch.device) -> None:
        self.recordings: list[Any] = []
        self.n_drops = 0
        self._busy = threading.Lock()
        self._buffer: Tensor | None = None

    @contextmanager
    def turn(self, buffer: Tensor) -> Iterator[None]:
        assert self._buffer is None or self._buffer is buffer
        self._buffer = buffer
        assert self._busy.acquire(blocking=False), "two recordings side by side"
        try:
            yield
        finally:
            self._busy.release()

    def finish(self) -> None:
        self.recordings.clear()
        self.n_drops += 1

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for recording in self.recordings for tensor in tensors_of(recording.ranked))


class Rerun:
    """Runs the same Python again, and writes where it wrote the first time."""

    def __init__(self, run: Callable[[], Ranked]) -> None:
        self._run, self.ranked = run, run()

    @torch.inference_mode()  # in which all tensors may be written to
    def replay(self) -> None:
        for kept, now in zip(tensors_of(self.ranked), tensors_of(self._run()), strict=True):
            kept.copy_(now)


class Reruns(_OneAtATime):
    """For backends whose ops wait, or come in sizes that depend on values."""

    def record(self, run: Callable[[], Ranked]) -> Rerun:
        self.recordings.append(Rerun(run))
        return self.recordings[-1]  # type: ignore[no-any-return]


class Tape(TorchDispatchMode):
    """The operations of PyTorch and the launches of (interpreted) kernels, in order, with the numbers and the tensors
    that they had: all that a CUDA graph knows. Replayed, they read and write these same tensors; no Python of the
    engine runs. An operation that would wait for the device is an error while it is recorded, and so is a tensor made
    of numbers of Python, which would be copied up."""

    def __init__(self, run: Callable[[], Ranked]) -> None:
        super().__init__()
        self._steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._made: set[int] = set()
        self._read: dict[int, StorageWeakRef] = {}
        with no_syncs(), self, self._launches(), self._nothing_to_look_at():
            self.ranked = run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func._schema.name != "aten::lift_fresh", "numbers of Python become a tensor"
        given = self._note((args, kwargs))
        made = func(*args, **kwargs)
        self._steps.append((func, args, kwargs, made))
        self._made |= {_place(tensor) for tensor in tensors_in(made)} - given
        return made

    def _note(self, arguments: Any) -> set[int]:
        """Where they are, and which of them were not made here."""
        given = {_place(tensor): tensor.untyped_storage() for tensor in tensors_in(arguments) if tensor.numel()}
        self._read |= {place: StorageWeakRef(given[place]) for place in given.keys() - self._made - self._read.keys()}
        return set(given)

    @contextmanager
    def _launches(self) -> Iterator[None]:
        from triton.runtime.interpreter import InterpretedFunction

        launch = InterpretedFunction.run

        def recorded(kernel: Any, *args: Any, **kwargs: Any) -> None:
            self._note((args, kwargs))
            self._steps.append((launch, (kernel, *args), kwargs, None))
            with _disable_current_modes():
                launch(kernel, *args, **kwargs)

        with mock.patch.object(InterpretedFunction, "run", recorded):
            yield

    @contextmanager
    def _nothing_to_look_at(self) -> Iterator[None]:
        """What the launcher of the ranking checks on the CPU alone."""
        from fastdiff.kernels import score_topk

        with mock.patch.multiple(score_topk, check_rows=mock.DEFAULT, check_finite=mock.DEFAULT):
            yield

    def replay(self) -> None:
        for func, args, kwargs, made in self._steps:
            again = func(*args, **kwargs)
            for before, now in zip(tensors_in(made), tensors_in(again), strict=True):
                if _place(before) != _place(now) and "empty" not in str(func):
                    before.copy_(now)

    def forget(self) -> dict[int, StorageWeakRef]:
        """The tape, emptied: the storages, by address, that it read and had not made, without keeping them alive."""
        self._steps.clear()
        return self._read


class Tapes(_OneAtATime):
    def record(self, run: Callable[[], Ranked]) -> Tape:
        run()  # as CUDA graphs do: what is made once is made before
        self.recordings.append(Tape(run))
        return self.recordings[-1]  # type: ignore[no-any-return]


def tensors_of(ranked: Ranked) -> tuple[Tensor, Tensor, Tensor]:
    return ranked.query, ranked.top.rows, ranked.top.scores


def tensors_in(values: Any) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
