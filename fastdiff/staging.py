"""The way up to a CUDA device without waiting for it: one pinned buffer and one copy for all that goes together.

A copy from ordinary memory makes the host wait. From pinned memory it is queued on the current stream, and PyTorch's
allocator keeps the memory for itself until that copy is done; it hands the same blocks out again, so a stream of calls
pins as much as the calls that are under way at one time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 16
"""Each tensor of a buffer begins at a multiple of this many numbers, 128 bytes: kernels are compiled for aligned
pointers, and would be compiled once more for others."""


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """int64 tensors of the host, contiguous on `device`: views of one buffer, copied on the current stream."""
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.numel() // ALIGNED) * ALIGNED
    there = _fill(tensors, starts, total, device).to(device, non_blocking=True)
    return [there[lo : lo + tensor.numel()].view(tensor.shape) for lo, tensor in zip(starts, tensors, strict=True)]


def finish(device: torch.device) -> None:
    """Wait for what the current stream of a CUDA device has been given: before something is kept for later calls, which
    may come from other threads, on other streams."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _fill(tensors: Sequence[Tensor], starts: Sequence[int], total: int, device: torch.device) -> Tensor:
    here = torch.empty(total, dtype=torch.int64, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, tensors, strict=True):
        here[start : start + tensor.numel()] = tensor.reshape(-1)
    return here
