"""Timing of the stages of a call without waiting for the GPU: events there, the clock elsewhere."""

from __future__ import annotations

import time

import torch

from fastdiff.arithmetic import device_type


class Stopwatch:
    """`lap(name)` ends a stage; `seconds()` waits for the device, if any, and gives the length of each."""

    __slots__ = ("_laps", "_mark", "_start")

    def __init__(self, device: torch.device) -> None:
        self._mark = _event if device_type(device) == "cuda" else time.perf_counter
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []
        self._start: float | torch.cuda.Event = self._mark()

    def lap(self, name: str) -> None:
        self._laps.append((name, self._mark()))

    def seconds(self) -> dict[str, float]:
        starts = [self._start, *(end for _, end in self._laps)]
        return {name: _between(start, end) for start, (name, end) in zip(starts, self._laps, strict=False)}


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000.0
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start
