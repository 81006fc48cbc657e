"""Work on a device that can be done again: captured once, replayed with one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

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
        """Wait until no recording runs."""


class CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, ranked: Ranked) -> None:
        self.graph, self.ranked = graph, ranked

    def replay(self) -> None:
        self.graph.replay()


_one_capture = threading.Lock()
"""A capture begins with a wait for the whole device, which CUDA refuses while another one is under way."""


class CudaRecorder:
    """CUDA graphs with a pool of memory and a stream for capturing of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], Ranked]) -> CudaRecording:
        # run once on the capturing stream: kernels are compiled and tables made, and cuBLAS takes its workspace outside
        # of the pool
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
        graph = torch.cuda.CUDAGraph()
        # it waits for the device before it begins; other threads may go on allocating and launching meanwhile
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with _one_capture, capture:
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
