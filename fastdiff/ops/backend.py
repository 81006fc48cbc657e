"""Backends: which exist, which can run here, and the binding of one op to one of them.

This file is the only place where a backend's name is compared. A backend that is named either runs or raises with the
reason; "auto" takes the first of `PREFERENCE` that can run on the device. Nothing falls back in silence: `Op.bind`
returns the name of the backend that runs beside the function, `engine.backends` shows it, and where "auto" takes plain
PyTorch on the CPU because the C++ ops cannot be used, a UserWarning says so, once per process.

    torch   plain PyTorch, the reference of every op; runs everywhere
    cpu     vectorised C++ (csrc/cpu)
    triton  Triton kernels (kernels/), on a CUDA device; with TRITON_INTERPRET=1 also on the CPU, interpreted: for tests
    cuda    C++/CUDA (csrc/cuda), on a CUDA device
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import BackendUnavailable, InvalidArgument
from fastdiff.ops.cpu import library

BACKENDS = ("torch", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("torch",)}
"""What "auto" tries, by the type of the device. The Triton kernels run where they are named: their tests interpret and
compile them, but they have not been run on a GPU yet, so nobody gets them unasked."""
CAPTURABLE = ("triton",)
"""Backends whose launchers wait for nothing, so that a call made of them can be captured in a CUDA graph."""
DTYPES = {"cpu": (torch.float32,), "triton": (torch.float32, torch.float16, torch.bfloat16)}
"""The dtypes in which a backend computes; a backend that is not named takes any."""


def why_not(backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot compute in `dtype` on `device`, whatever the op; None where nothing stands against it."""
    device = torch.device(device)
    if backend == "torch":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"it needs the tensors on the CPU, got {device.type}"
        if dtype not in DTYPES["cpu"]:
            return f"it computes in float32, got {str(dtype).removeprefix('torch.')}"
        library.check_level()
        return library.why_not()
    if backend == "triton":
        return _why_no_triton(device, dtype)
    if backend == "cuda":
        return None if device.type == "cuda" else f"it needs a CUDA device, got {device.type}"
    raise InvalidArgument(f"backend: unknown name {backend!r}; known backends: auto, {', '.join(BACKENDS)}")


def _why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    if importlib.util.find_spec("fastdiff.kernels") is None:
        return "fastdiff.kernels is not installed: this checkout was never set up; run `make build` in it"
    if dtype not in DTYPES["triton"]:
        return f"it computes in float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        return None
    if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device, got {device.type}"
    if dtype == torch.bfloat16:
        return "Triton's interpreter computes wrongly in bfloat16; a CUDA device is needed for it"
    return None


@cache
def _warn_of_plain_torch(reason: str | None) -> None:
    """Once per process: "auto" takes plain PyTorch on the CPU only because the C++ ops cannot be used."""
    ours, depth, frame = Path(__file__).parents[1], 1, inspect.currentframe()
    while frame is not None and Path(frame.f_code.co_filename).is_relative_to(ours):  # to the line of the caller's
        depth, frame = depth + 1, frame.f_back
    warnings.warn(
        f"fastdiff runs in plain PyTorch on this CPU, many times slower than its C++ ops: {reason}. "
        "backend='torch' asks for plain PyTorch and does not warn",
        UserWarning,
        stacklevel=depth if frame is not None else 2,
    )


@dataclass(frozen=True)
class Op:
    """The single record of one op: its name, its reference, and the fast implementations that exist.

    reference        the plain PyTorch function; its docstring is the contract
    implementations  backend -> "package.module:function" with the reference's signature, imported when first bound
    """

    name: str
    reference: Callable[..., Any]
    implementations: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
        """Why this op cannot run on `backend` for tensors of `dtype` on `device`; None where it can."""
        reason = why_not(backend, device, dtype)
        if backend != "torch" and backend not in self.implementations:  # nor would it run on another device
            reason = f"this version of fastdiff has no '{backend}' implementation of {self.name}"
        return reason

    def available(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
        """The backends that can run this op for tensors of `dtype` on `device`."""
        return tuple(backend for backend in BACKENDS if self.why_not(backend, device, dtype) is None)

    def bind(self, backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> BoundOp:
        """The function to call, for a named backend or for "auto"; raises `BackendUnavailable` with the reason."""
        device = torch.device(device)
        if backend == "auto":
            order = PREFERENCE.get(device.type, ("torch",))
            backend = next(name for name in order if self.why_not(name, device, dtype) is None)
            if backend == "torch" and device.type == "cpu" and dtype == torch.float32 and "cpu" in self.implementations:
                _warn_of_plain_torch(library.why_not())
        reason = self.why_not(backend, device, dtype)
        if reason is not None:
            raise BackendUnavailable(
                f"{self.name}: backend {backend!r} cannot run: {reason}. "
                f"Usable here: {', '.join(self.available(device, dtype))}"
            )
        if backend == "torch":
            return BoundOp(self.name, backend, self.reference)
        module, _, name = self.implementations[backend].partition(":")
        function = getattr(importlib.import_module(module), name)
        return BoundOp(self.name, backend, function if device.index is None else _current_inside(device, function))


def _current_inside(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with `device` as the current CUDA device: Triton launches on that one, wherever the tensors are."""
    if device.type != "cuda":
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class BoundOp:
    """An op bound to one backend: call it like the reference; `backend` says what runs."""

    name: str
    backend: str
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def why_no_op(backend: str, device: torch.device | str) -> str | None:
    """Why no op at all runs on `backend` for tensors on `device`; None where one does."""
    from fastdiff import ops  # here, not above: the ops import this file

    reason = why_not(backend, device)
    if backend != "torch" and not any(backend in op.implementations for op in ops.ALL):
        reason = f"this version of fastdiff has no '{backend}' ops"
    return reason


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that run at least one op on `device`; `fastdiff env` prints the reasons for the others."""
    return tuple(backend for backend in BACKENDS if why_no_op(backend, device) is None)
