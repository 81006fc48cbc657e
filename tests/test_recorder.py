"""In which order a `CudaRecorder` speaks to CUDA. What it says is checked against the signatures of torch."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastdiff.catalog import TopK
from fastdiff.errors import BackendUnavailable
from fastdiff.pipeline import Ranked
from fastdiff.recorder import CudaRecorder

GPU = torch.device("cuda:0")
REAL = {name: getattr(torch.cuda, name) for name in ("graph", "Event", "Stream", "CUDAGraph", "memory_snapshot")}


class Device:
    """Stands for torch.cuda, and writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.current, self.n_streams, self.pool = "caller", 0, (0, 6)

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pool = 0, self.pool[1] + 1
        return self.pool

    def synchronize(self, device: torch.device) -> None:
        assert device == GPU
        self.told.append("wait for the device")

    def memory_snapshot(self, *args: Any, **kwargs: Any) -> list[dict[str, int]]:
        asked = inspect.signature(REAL["memory_snapshot"]).bind(*args, **kwargs)
        assert asked.arguments["mempool_id"] == self.pool
        return [{"total_size": 1 << 20}, {"total_size": 3}]

    def current_stream(self, device: torch.device) -> Any:
        assert device == GPU
        return Stream(self, self.current)

    def Stream(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 (as torch calls it)
        asked = inspect.signature(REAL["Stream"].__new__).bind(None, *args, **kwargs).arguments
        assert (asked["device"], asked["priority"]) == (GPU, -1)
        self.n_streams += 1
        return Stream(self, "capturing", self.n_streams % 32)

    def Event(self) -> Any:  # noqa: N802
        event = mock.create_autospec(REAL["Event"], instance=True)
        event.record.side_effect = lambda stream: self.told.append(f"record on {stream.name}")
        event.synchronize.side_effect = lambda: self.told.append("wait on the host")
        return event

    def CUDAGraph(self) -> Any:  # noqa: N802
        graph = mock.create_autospec(REAL["CUDAGraph"], instance=True)
        graph.replay.side_effect = lambda: self.told.append(f"replay on {self.current}")
        return graph

    def stream(self, stream: Any) -> Any:
        return On(self, stream.name)

    def graph(self, *args: Any, **kwargs: Any) -> Any:
        asked = inspect.signature(REAL["graph"]).bind(*args, **kwargs).arguments
        assert asked["pool"] == self.pool
        assert asked["capture_error_mode"] == "thread_local"
        return Capture(self, asked["stream"].name)


class Stream:
    def __init__(self, device: Device, name: str, cuda_stream: int = 0) -> None:
        self.device, self.name, self.cuda_stream = device, name, cuda_stream

    def wait_event(self, event: Any) -> None:
        self.device.told.append(f"{self.name} waits for the last turn")


class On:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name

    def __enter__(self) -> None:
        self.before, self.device.current = self.device.current, self.name

    def __exit__(self, *error: object) -> None:
        self.device.current = self.before


class Capture(On):
    def __enter__(self) -> None:
        super().__enter__()
        self.device.told.append(f"capture on {self.name}")

    def __exit__(self, *error: object) -> None:
        self.device.told.append("end of capture")
        if error[0] is not None:  # so does torch.cuda.graph, which is left on its stream by that
            raise RuntimeError("operation failed due to a previous error during capture")
        super().__exit__(*error)


def test_what_is_told_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr("fastdiff.recorder.torch.cuda", device)
    buffer, marked = torch.zeros(3), mock.create_autospec(Tensor, instance=True)
    marked.record_stream.side_effect = lambda stream: device.told.append(f"buffer in use on {stream.name}")

    def run() -> Ranked:
        device.told.append(f"run on {device.current}")
        return Ranked(buffer, TopK(buffer, buffer))

    recorder = CudaRecorder(GPU)
    with recorder.turn(marked):
        recording = recorder.record(run)
        recording.replay()
    turn = ["caller waits for the last turn", "buffer in use on caller"]
    assert device.told == [
        *turn,
        "wait for the device",
        "run on capturing",
        "capture on capturing",
        "run on capturing",
        "end of capture",
        "replay on caller",
        "record on caller",
    ]
    device.told.clear()
    with pytest.raises(KeyError), recorder.turn(marked):
        raise KeyError
    assert device.told == [*turn, "record on caller"]
    assert recorder.n_bytes == (1 << 20) + 3
    recorder.finish()
    assert device.told[-1] == "wait on the host"
    assert device.pool == (0, 8)
    with recorder.turn(marked):
        recorder.record(run)


def test_a_capture_that_fails_leaves_the_callers_stream_current(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr("fastdiff.recorder.torch.cuda", device)
    buffer = torch.zeros(3)

    def run() -> Ranked:
        if device.told[-1] == "capture on capturing":
            raise RuntimeError("operation not permitted when stream is capturing")
        return Ranked(buffer, TopK(buffer, buffer))

    recorder = CudaRecorder(GPU)
    with (
        recorder.turn(mock.create_autospec(Tensor, instance=True)),
        pytest.raises(RuntimeError, match="previous error"),
    ):
        recorder.record(run)
    assert device.current == "caller"
    assert device.told[-1] == "record on caller"


def test_no_two_capture_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.recorder.torch.cuda", Device())
    recorders = [CudaRecorder(GPU) for _ in range(31)]
    torch.cuda.Stream(GPU, priority=-1)  # somebody else's
    recorders.append(CudaRecorder(GPU))
    assert len({recorder._stream.cuda_stream for recorder in recorders}) == 32
    with pytest.raises(BackendUnavailable, match="at most 32 engines"):
        CudaRecorder(GPU)
    freed = recorders.pop(5)._stream.cuda_stream
    assert CudaRecorder(GPU)._stream.cuda_stream == freed
