"""Every case and provider, for pytest-benchmark: `pytest bench/ --benchmark-only -k tarec`."""

from __future__ import annotations

from collections.abc import Callable


def test_case(contender: Callable[[], None]) -> None:
    contender()
