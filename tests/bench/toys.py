"""A toy case for the tests of the bench: right and wrong answers, and a session that listens."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import machine
from bench.cases import Absent, Case, Gate, Options, Provider, relative_error
from bench.harness import Session
from bench.timing import Budget

QUICK = Budget(seconds=0.002, min_samples=2, max_samples=3, pause=0.0)
CEILINGS = {"gflops": 100.0, "gflops_bfloat16": 200.0, "gbps": 10.0, "gbps_of": [[1 << 20, 40.0], [1 << 30, 10.0]]}


class Listener:
    """Collects what a session says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str) -> None:
        self.lines.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def session_of(listener: Listener) -> Session:
    options = Options()
    return Session(options, QUICK, machine.facts(options.device), CEILINGS, listener)


def case_of(*providers: Provider | Absent) -> Case:
    return Case("toy", {"batch": 2}, "a toy", lambda _: list(providers), ())


def exact(output: Tensor) -> Gate:
    return Gate(relative_error(output, torch.ones(3)), 1e-6, "ones")


RIGHT = Provider("published", lambda: torch.ones(3), exact)
