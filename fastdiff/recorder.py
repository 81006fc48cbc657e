"""Work on a device that can be done again: captured once, replayed with one launch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.errors import BackendUnavailable
from fastdiff.pipeline import Ranked


class Recording(Protocol):
    """Work that can be done again on the same tensors. ranked: what it makes, always in the same place."""

    ranked: Ranked

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Makes recordings that share memory, and may not run side by side."""

    def record(self, run: Callable[[], Ranked]) -> Recording:
        """`run` reads and writes the same tensors each time, and waits for nothing. It is called at least once."""

    def turn(self, buffer: Tensor) -> AbstractContextManager[None]:
        """What is given to the current stream inside runs after all that was given inside before, and uses `buffer`."""

    @property
    def n_bytes(self) -> int:
        """Of the device's memory that recordings hold."""

    def finish(self) -> None:
        """Wait until no recording runs. Those made so far may be let go then, and share nothing with later ones."""


class CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, ranked: Ranked) -> None:
        self.graph, self.ranked = graph, ranked

    def replay(self) -> None:
        self.graph.replay()


_one_capture = threading.Lock()
"""It begins with a wait for the whole device, which CUDA refuses while another one is under way."""


_STREAMS = 32
"""That PyTorch hands out in turn, of each priority."""

_owners: weakref.WeakValueDictionary[tuple[torch.device, int], CudaRecorder] = weakref.WeakValueDictionary()
"""The recorder that captures on each stream."""


class CudaRecorder:
    """CUDA graphs with a pool of memory and a stream for capturing of their own.

    What is captured on a stream shares the workspace of cuBLAS for it, with work that is given to the stream, and with
    graphs at whose death PyTorch frees it. So a recorder keeps its stream for life, no two have the same, and it is of
    high priority, which hardly anybody asks for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = self._own_stream()
        self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def _own_stream(self) -> torch.cuda.Stream:
        with _one_capture:
            for _ in range(_STREAMS):
                stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
                if _owners.setdefault((self._device, stream.cuda_stream), self) is self:
                    return stream
        raise BackendUnavailable(
            f"cuda_graphs: at most {_STREAMS} engines of a process can have graphs on one device; let go of some, or "
            "use cuda_graphs=False"
        )

    def record(self, run: Callable[[], Ranked]) -> CudaRecording:
        graph = torch.cuda.CUDAGraph()
        # other threads may go on allocating and launching meanwhile
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with _one_capture:
            torch.cuda.synchronize(self._device)
            # once before, on the same stream: kernels are compiled and tables made, and cuBLAS takes its workspace
            # outside of the pool
            with torch.cuda.stream(self._stream):
                run()
            # PyTorch leaves a capture that fails on its stream
            with torch.cuda.stream(torch.cuda.current_stream(self._device)), capture:
                ranked = run()
        return CudaRecording(graph, ranked)

    @contextmanager
    def turn(self, buffer: Tensor) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._last)
        buffer.record_stream(stream)  # should the engine die before this has run
        try:
            yield
        finally:
            self._last.record(stream)

    @property
    def n_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot(self._pool)  # type: ignore[no-untyped-call]
        return sum(int(segment["total_size"]) for segment in segments)

    def finish(self) -> None:
        self._last.synchronize()
        self._pool = torch.cuda.graph_pool_handle()
