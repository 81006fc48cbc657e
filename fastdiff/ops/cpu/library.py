"""The C++ ops library, fastdiff/libfastdiff.so: whether it is there, and which instruction sets it uses.

The library registers its ops as torch.ops.fastdiff.*; it holds no Python, so C++ programs can load it too. It is loaded
when an op is first bound to it, never by importing fastdiff.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from fastdiff.errors import InvalidArgument

LIBRARY = Path(__file__).resolve().parents[2] / "libfastdiff.so"
LEVELS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
"""Instruction sets, each with all before it: what the kernels are compiled for."""

BUILD = "pip install --no-build-isolation . (a C++17 compiler, torch and ninja are needed; in a checkout: make build)"
"""How the C++ parts are built, as messages say it."""


@cache
def why_not() -> str | None:
    """Why the library cannot be used, None where it can; loads it."""
    if not LIBRARY.exists():
        return f"{LIBRARY} is not there: the C++ ops were not built with this fastdiff{_hidden()}; build them: {BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} does not load into this torch ({error}); build it again: {BUILD}"
    from fastdiff.ops.cpu import fakes  # noqa: F401  what the ops look like to torch.export and torch.compile

    _wrong_level()
    return None


@cache
def _wrong_level() -> str | None:
    """What is wrong with FASTDIFF_CPU_CAPABILITY; where nothing is, its level is set. Only of a loaded library."""
    wrong = _symbols().fastdiff_set_cpu_capability(os.environ.get("FASTDIFF_CPU_CAPABILITY", "").encode())
    if wrong is None:
        return None
    reason = bytes(wrong).decode()
    _symbols().fastdiff_set_cpu_capability(b"")  # for the packing of tables, which serves every backend
    return reason


def check_level() -> None:
    """Raise InvalidArgument where the library is there and FASTDIFF_CPU_CAPABILITY names no level of this machine."""
    if why_not() is None and (wrong := _wrong_level()) is not None:
        raise InvalidArgument(wrong)


def _hidden() -> str:
    """Where another fastdiff is installed that this one hides: Python looks in the current folder first."""
    package = LIBRARY.parent
    for distribution in importlib.metadata.distributions(name="fastdiff"):
        other = Path(str(distribution.locate_file("fastdiff"))).resolve()
        if other != package and other.is_dir():
            return (
                f", and it hides the fastdiff that is installed in {other.parent}, as a source checkout in the "
                "current folder does (start Python in another folder to use that one)"
            )
    return ""


def _library() -> ctypes.CDLL:
    reason = why_not()
    if reason is not None:
        raise InvalidArgument(f"CPU level: {reason}")
    check_level()
    return _symbols()


@cache
def _symbols() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("fastdiff_cpu_capability", "fastdiff_cpu_highest", "fastdiff_set_cpu_capability"):
        getattr(library, name).restype = ctypes.c_char_p
    library.fastdiff_set_cpu_capability.argtypes = [ctypes.c_char_p]
    return library


def capability() -> str:
    """The level in use: the machine's highest, unless FASTDIFF_CPU_CAPABILITY says less."""
    return bytes(_library().fastdiff_cpu_capability()).decode()


def available_levels() -> tuple[str, ...]:
    """The levels that this machine has, lowest first."""
    highest = bytes(_library().fastdiff_cpu_highest()).decode()
    return LEVELS[: LEVELS.index(highest) + 1]


def set_capability(level: str) -> None:
    """Use a lower level in this process; "" is the highest. Raises InvalidArgument for levels that are not there."""
    wrong = _library().fastdiff_set_cpu_capability(level.encode())
    if wrong is not None:
        raise InvalidArgument(bytes(wrong).decode())


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Run a block at a level, then go back to the one before."""
    before = capability()
    set_capability(level)
    try:
        yield
    finally:
        set_capability(before)
