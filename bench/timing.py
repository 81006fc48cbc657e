"""Timing: contenders take turns, samples are long enough for the clock, and quantiles are kept instead of a best.

Contenders of one case are timed in rounds. In each round every one of them takes its share of samples, and the order
turns around from round to round, so that whatever else the machine does hits all alike. A turn starts with a pause, in
which threads that the contender before left spinning go to sleep (OpenBLAS's do after some 25 ms), and, where a call is
short, with one that is not timed, since the turn before it left the caches cold.
"""

from __future__ import annotations

import gc
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]

SAMPLE_SECONDS = 2e-4
"""A sample lasts at least this long: calls that are shorter are repeated inside it. The clock costs some 5e-8."""

MOST_ROUNDS = 6
COLD_BELOW = 1e-1
"""Calls shorter than this start a turn with one call that is not timed."""


@dataclass(frozen=True)
class Budget:
    """How long one contender is timed: for `seconds`, within bounds on the number of samples; slow ones get at least
    `few_samples`, or as many as fit in `max_seconds`; one that is longer than that is timed once."""

    seconds: float = 1.0
    min_samples: int = 7
    max_samples: int = 300
    few_samples: int = 3
    max_seconds: float = 8.0
    pause: float = 0.05

    def plan(self, estimate: float) -> tuple[int, int]:
        """(samples, calls per sample) for a call that takes about `estimate` seconds."""
        calls = max(1, math.ceil(SAMPLE_SECONDS / estimate))
        sample = calls * estimate
        samples = min(max(math.ceil(self.seconds / sample), self.min_samples), self.max_samples)
        if samples * sample > self.max_seconds:
            few = self.few_samples if sample <= self.max_seconds else 1
            samples = max(few, int(self.max_seconds / sample))
        return samples, calls


@dataclass(frozen=True)
class Timing:
    """Seconds per call of each sample, and how many calls a sample was."""

    samples: tuple[float, ...]
    calls_per_sample: int

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.samples, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p10(self) -> float:
        return self.quantile(0.1)

    @property
    def p90(self) -> float:
        return self.quantile(0.9)


class Clock(ABC):
    """Seconds per call of `calls` calls in a row."""

    @abstractmethod
    def sample(self, call: Call, calls: int) -> float: ...


class WallClock(Clock):
    def sample(self, call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


class CudaClock(Clock):
    """CUDA events around each call, after a write over a buffer larger than the L2 cache, so that it starts cold.

    The host's part counts where it is what takes the time: the end event cannot be reached before the host submits it.
    """

    BUFFER_BYTES = 256 << 20

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(self.BUFFER_BYTES, dtype=torch.int8, device=device)

    def sample(self, call: Call, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._buffer.zero_()
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end) / 1000.0
        return total / calls


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else WallClock()


def estimate_seconds(call: Call, clock: Clock, enough: float = 0.05) -> float:
    """A first idea of how long a call takes: the best of two calls, and of more until they took `enough`. Warms up."""
    best, spent = math.inf, 0.0
    for number in range(1, 21):
        taken = clock.sample(call, 1)
        best, spent = min(best, taken), spent + taken
        if number >= 2 and spent > enough:
            break
    return max(best, 1e-7)


def interleaved(
    calls: Mapping[str, Call], estimates: Mapping[str, float], budget: Budget, clock: Clock
) -> dict[str, Timing]:
    """Time `calls` in turns; `estimates` are seconds per call (`estimate_seconds`)."""
    if not calls:
        return {}
    plans = {name: budget.plan(estimates[name]) for name in calls}
    rounds = min(min(samples for samples, _ in plans.values()), MOST_ROUNDS)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                samples, per_sample = plans[name]
                time.sleep(budget.pause)
                if estimates[name] < COLD_BELOW:
                    calls[name]()
                for _ in range(samples * (turn + 1) // rounds - samples * turn // rounds):
                    taken[name].append(clock.sample(calls[name], per_sample))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values), plans[name][1]) for name, values in taken.items()}
