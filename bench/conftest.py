"""`pytest bench/ --benchmark-only`: the cases of `python -m bench` under pytest-benchmark, checked before timing."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.cases import COMPILED, Absent, Case, Options, all_cases
from bench.harness import Checked, check
from bench.timing import Budget

OPTIONS = Options()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" in metafunc.fixturenames:
        pairs = [
            pytest.param((case, label), id=f"{case.id}/{label}")
            for case in all_cases(OPTIONS.device)
            if not case.heavy
            for label in case.labels(OPTIONS)
            if OPTIONS.compile or not label.endswith(COMPILED)
        ]
        metafunc.parametrize("contender", pairs, indirect=True)


@lru_cache(maxsize=1)
def _checked(case_id: str, build: Callable[[Options], Any]) -> dict[str, Checked | Absent]:
    """The providers of one case, which its tests share; `build` is a part of the key for its own sake only."""
    found: dict[str, Checked | Absent] = {}
    with torch.inference_mode():
        for provider in build(OPTIONS):
            if isinstance(provider, Absent):
                found[provider.name] = provider
            elif provider.once:
                found[provider.label] = Absent(provider.name, "it is run once only; python -m bench measures it")
            else:
                found[provider.label] = check(provider, OPTIONS)
    return found


@pytest.fixture
def contender(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], None]:
    """Times one provider of one case; fails where its output is wrong, skips where it is absent."""
    case, label = request.param
    assert isinstance(case, Case)

    def run() -> None:
        found = _checked(case.id, case.build)
        one = found.get(label) or found[label.partition("[")[0]]
        if isinstance(one, Absent):
            pytest.skip(one.reason)
        gate = one.gate
        if not gate.passed:
            pytest.fail(f"WRONG: error {gate.error:.2g} > {gate.tolerance:g} against {gate.against}")
        benchmark.group = case.id
        benchmark.extra_info.update(error=gate.error, flops=one.flops, bytes=one.provider.bytes)
        rounds, iterations = Budget().plan(one.estimate)
        with torch.inference_mode():
            benchmark.pedantic(one.provider.run, rounds=rounds, iterations=iterations, warmup_rounds=1)

    return run
