"""Ops where a backend runs, for tests that stay on the CPU.

A test draws its tensors on the CPU and works out the truth there, in float64. What it calls is a `Placed` op: that
moves its arguments to the device of its backend and its results back. So one body serves every place:

    torch       plain PyTorch on the CPU       cpu     the C++ ops
    torch-cuda  plain PyTorch on a GPU         triton  the kernels: on a GPU where there is one; else interpreted on the
                                                       CPU, where TRITON_INTERPRET=1 asks for that
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.noise import GeneratorNoise, GivenNoise, Noise, PhiloxNoise, StartNoise
from fastdiff.ops.backend import BoundOp, Op
from fastdiff.per_object import PerObject

GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
TRITON_DEVICE = "cuda" if GPU else "cpu"
PLACES = {"torch": ("torch", "cpu"), "cpu": ("cpu", "cpu"), "triton": ("triton", TRITON_DEVICE)}
"""Name -> backend and device."""
if GPU:
    PLACES["torch-cuda"] = ("torch", "cuda")

needs_gpu = pytest.mark.skipif(not GPU, reason="it needs a GPU: too large to be interpreted")

STAYS = "coef"
"""A plan's coefficients are on the CPU wherever the op runs, as an argument or as a field."""


def places(*ops: Op, dtype: torch.dtype = torch.float32) -> list[str]:
    """The places where all of these ops can run in `dtype`."""
    return [place for place in PLACES if all(why_not(op, place, dtype) is None for op in ops)]


def why_not(op: Op, place: str, dtype: torch.dtype = torch.float32) -> str | None:
    return op.why_not(*PLACES[place], dtype)


@dataclass(frozen=True)
class Placed(BoundOp):
    """An op at a place: called like the reference, with tensors of the CPU."""

    op: Op
    device: str

    @property
    def interpreted(self) -> bool:
        """Where a kernel takes a second: tests ask for less, never for other things."""
        return (self.backend, self.device) == ("triton", "cpu")

    def needs(self, dtype: torch.dtype) -> None:
        """Skip the test where the op cannot compute in `dtype` here."""
        reason = self.op.why_not(self.backend, self.device, dtype)
        if reason is not None:
            pytest.skip(reason)


def place_op(op: Op, place: str, dtype: torch.dtype = torch.float32) -> Placed:
    """`op` at a place; raises `BackendUnavailable` where it cannot run there in `dtype`."""
    backend, device = PLACES[place]
    function = op.bind(backend, device, dtype).function
    return Placed(op.name, backend, function if device == "cpu" else moving(op, function, device), op, device)


def place_all(ops: tuple[Op, ...], place: str, dtype: torch.dtype = torch.float32) -> dict[str, BoundOp]:
    """What a model takes as `bound`: the model stays on the CPU, its ops run at a place."""
    return {op.name: place_op(op, place, dtype) for op in ops}


def moving(op: Op, function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function`, which runs on `device`, for arguments and results that are on the CPU."""
    signature, kept = inspect.signature(op.reference), PerObject[Any]()

    def run(*arguments: Any, **keywords: Any) -> Any:
        bound = signature.bind(*arguments, **keywords).arguments
        return move(function(**{name: _argument(name, part, device, kept) for name, part in bound.items()}), "cpu")

    return run


def _argument(name: str, value: Any, device: str, kept: PerObject[Any] | None) -> Any:
    return value if name == STAYS else move(value, device, kept)


def move(value: Any, device: str, kept: PerObject[Any] | None = None) -> Any:
    """A value with every tensor in it on `device`, strides and all: in tuples, lists, dataclasses, and noise.

    kept  where dataclasses are remembered, so that one moves once, and one that is moved twice stays one object
    """
    if isinstance(value, Tensor):
        return _with_strides(value, device)
    if isinstance(value, (tuple, list)):
        parts = [move(part, device, kept) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Noise):
        return _noise(value, device)
    if is_dataclass(value) and not isinstance(value, type):
        return _moved_fields(value, device, None) if kept is None else kept.get(value, _mover(device, kept))
    return value


def _mover(device: str, kept: PerObject[Any]) -> Callable[[Any], Any]:
    return lambda value: _moved_fields(value, device, kept)


def _moved_fields(value: Any, device: str, kept: PerObject[Any] | None) -> Any:
    parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    return replace(value, **{name: _argument(name, part, device, kept) for name, part in parts.items()})


def _with_strides(tensor: Tensor, device: str) -> Tensor:
    """`Tensor.to` closes the gaps of a slice, which a test may be about."""
    if tensor.is_contiguous() and tensor.storage_offset() == 0:
        return tensor.to(device)
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    return (
        tensor.as_strided((stored,), (1,), 0)
        .to(device)
        .as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    )


def _noise(noise: Noise, device: str) -> Noise:
    if isinstance(noise, GivenNoise):
        return GivenNoise(_with_strides(noise.noise, device))
    if isinstance(noise, StartNoise):
        return StartNoise(_with_strides(noise.start, device), _noise(noise.rest, device))
    if isinstance(noise, PhiloxNoise):
        seed, keys, sample = (move(part, device) for part in (noise.seed, noise.row_key, noise.sample))
        return PhiloxNoise(seed, keys, sample, noise.dim, noise.dtype)
    if isinstance(noise, GeneratorNoise):
        moved = copy(noise)
        moved.device = torch.device(device)
        return moved
    return _Draws(noise, device)


class _Draws(Noise):
    """Draws of a kind of noise that a test made."""

    def __init__(self, noise: Noise, device: str) -> None:
        self.noise, self.device = noise, device

    def draw(self, index: int) -> Tensor:
        return self.noise.draw(index).to(self.device)
