from __future__ import annotations

import pytest

from bench.harness import Session
from tests.bench.toys import Listener, session_of


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def session(listener: Listener) -> Session:
    return session_of(listener)
