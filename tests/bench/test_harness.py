"""From a case to rows: what is wrong is not timed, what raises does not stop the run, what is slow is run once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import report, tables
from bench.cases import Absent, Gate, Measured, Provider
from bench.harness import Session, measure
from bench.rows import seconds, size
from bench.timing import Budget, Clock, interleaved
from tests.bench.toys import RIGHT, Listener, case_of, exact


@pytest.mark.parametrize(
    "value", [torch.tensor([1.0, 1.0, 1.1]), torch.full((3,), float("nan")), torch.ones(4)], ids=["off", "nan", "shape"]
)
def test_a_wrong_provider_prints_WRONG_and_gets_no_time(  # noqa: N802 - WRONG is the word that is printed
    value: Tensor, session: Session, listener: Listener
) -> None:
    calls = []
    wrong = Provider("fastdiff", lambda: calls.append(1) or value, exact, backend="torch")
    rows = measure(case_of(RIGHT, wrong), session)

    assert [row["status"] for row in rows] == ["ok", "WRONG"]
    assert len(calls) == 1, "a wrong provider is run for its check and never again"
    assert not [name for name in rows[1] if name.endswith("_s")]
    (line,) = [line for line in listener.lines if "fastdiff[torch]" in line]
    assert "WRONG" in line
    assert " s" not in line.split("WRONG")[1]
    table = tables.headline_table(rows)
    assert "WRONG" in table
    assert "WRONG" in report.markdown(rows, {})


def test_the_checked_call_is_the_one_with_given_draws(session: Session) -> None:
    random = Provider("fastdiff", lambda: torch.randn(3), exact, gated=lambda: torch.ones(3), backend="torch")
    (row,) = measure(case_of(random), session)
    assert row["status"] == "ok"
    assert row["median_s"] > 0


def test_an_absent_provider_says_why_once(session: Session, listener: Listener) -> None:
    case = case_of(RIGHT, Absent("faiss", "it is not installed"))
    rows = measure(case, session) + measure(case, session)
    assert [row["provider"] for row in rows] == ["published"] * 2
    assert listener.text.count("faiss is absent: it is not installed") == 1


def test_flops_of_a_kernel_are_those_of_the_torch_backend(session: Session) -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 16)

    def check(_: Any) -> Gate:
        return Gate(0.0, 0.0, "nothing")

    rows = measure(
        case_of(
            Provider("fastdiff", lambda: a @ b, check, backend="torch"),
            Provider("fastdiff", lambda: None, check, backend="cpu"),
        ),
        session,
    )
    assert [row["flops"] for row in rows] == [2 * 4 * 8 * 16] * 2


def test_a_provider_that_raises_does_not_stop_the_others(session: Session, listener: Listener) -> None:
    def broken() -> Tensor:
        raise RuntimeError("no kernel for this")

    rows = measure(case_of(Provider("fastdiff", broken, exact, backend="cpu"), RIGHT), session)
    assert [row["status"] for row in rows] == ["WRONG", "ok"]
    assert "it raised RuntimeError: no kernel for this" in listener.text


def test_a_provider_that_measures_itself_is_run_once(session: Session, listener: Listener) -> None:
    calls = []

    def once() -> Measured:
        calls.append(1)
        return Measured(torch.ones(3), 0.25, 3e6)

    (row,) = measure(case_of(Provider("fastdiff", once, exact, backend="torch", once=True)), session)
    assert len(calls) == 1
    assert (row["median_s"], row["samples"], row["peak_bytes"]) == (0.25, 1, 3e6)
    assert "3 MB more memory" in listener.text


def test_a_slow_provider_with_a_check_of_its_own_is_timed_once(session: Session) -> None:
    calls: list[str] = []
    provider = Provider(
        "published",
        lambda: calls.append("run"),
        exact,
        gated=lambda: calls.append("gated") or torch.ones(3),
        once=True,
    )
    (row,) = measure(case_of(provider), session)
    assert calls == ["gated", "run"]
    assert row["samples"] == 1


# --- timing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimate", "samples", "calls"),
    [(3e-6, 300, 67), (1e-2, 100, 1), (0.5, 7, 1), (2.0, 4, 1), (5.0, 3, 1), (60.0, 1, 1)],
    ids=["micro", "milli", "min", "bounded", "few", "once"],
)
def test_budget(estimate: float, samples: int, calls: int) -> None:
    assert Budget().plan(estimate) == (samples, calls)


def test_contenders_take_turns() -> None:
    order: list[str] = []

    class FakeClock(Clock):
        def __init__(self) -> None:
            self.ticks = itertools.count(1)

        def sample(self, call: Any, calls: int) -> float:
            call()
            return float(next(self.ticks))

    calls = {"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}
    budget = Budget(seconds=1.0, min_samples=3, max_samples=6, pause=0.0)
    timings = interleaved(calls, {"slow": 0.5, "fast": 0.11}, budget, FakeClock())
    assert order == ["slow", "fast", "fast", "fast", "fast", "slow", "slow", "fast", "fast"]
    assert len(timings["slow"].samples) == 3
    assert len(timings["fast"].samples) == 6
    assert timings["slow"].p10 <= timings["slow"].median <= timings["slow"].p90


def test_units() -> None:
    assert [seconds(value) for value in (2.0, 0.0123, 4.56e-6, 7e-8)] == ["2 s", "12.3 ms", "4.56 µs", "70 ns"]
    assert seconds(1394.0) == "1,394 s"
    assert [size(value) for value in (2.5e9, 1e6, 12.0)] == ["2.5 GB", "1 MB", "12 bytes"]
