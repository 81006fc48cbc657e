"""What every launcher needs: whether kernels are interpreted, and how sizes become blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastdiff.errors import InvalidArgument

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1: kernels run in NumPy on tensors of the CPU, for tests. Decided when kernels are decorated."""


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, 1 for 0: the extents of Triton's blocks are powers of two."""
    return 1 << max(0, n - 1).bit_length()


def device_int(value: int | Tensor, device: torch.device) -> Tensor:
    """[1] int64 on `device`, made without waiting for it. A seed goes to a kernel as a tensor, so that a captured CUDA
    graph can be replayed with another one; a tensor is taken as it is; values from 2^63 to 2^64 - 1 wrap to negative
    ones."""
    if isinstance(value, Tensor):
        return value
    unsigned = value & 0xFFFFFFFFFFFFFFFF
    return torch.full((1,), unsigned - (unsigned >> 63 << 64), dtype=torch.int64, device=device)


def rows_together(x: Tensor) -> Tensor:
    """x [.., D] with a row's numbers side by side, and no copy where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; an H200's number where kernels are interpreted."""
    return 132 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; an H200's where kernels are interpreted."""
    if device.type == "cpu":
        return 227 << 10
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub does not know all of them
    return int(properties.shared_memory_per_block_optin)


def require(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise InvalidArgument where an argument of an op has not this shape and dtype: a kernel would read beyond it."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise InvalidArgument(
            f"{op}: {name} must have shape {list(shape)} and dtype {dtype} (got {list(tensor.shape)}, {tensor.dtype})"
        )
