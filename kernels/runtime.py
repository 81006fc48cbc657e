"""What every launcher needs: whether kernels are interpreted, and how sizes become blocks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1: kernels run in NumPy on tensors of the CPU, for tests. Decided when kernels are decorated."""


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, 1 for 0: the extents of Triton's blocks are powers of two."""
    return 1 << max(0, n - 1).bit_length()


def device_int(value: int, device: torch.device) -> Tensor:
    """[1] int64 on `device`, made without waiting for it. A seed goes to a kernel as a tensor, so that a captured CUDA
    graph can be replayed with another one; values from 2^63 to 2^64 - 1 wrap to negative ones."""
    unsigned = value & 0xFFFFFFFFFFFFFFFF
    return torch.full((1,), unsigned - (unsigned >> 63 << 64), dtype=torch.int64, device=device)
