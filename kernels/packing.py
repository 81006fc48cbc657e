"""Weights as the kernels read them: inputs by outputs, zeros up to whole blocks, for tiles that need no masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.runtime import next_power_of_2
from fastdiff.per_object import packed

LEAST = 16
"""What tl.dot takes at least, of each extent."""


def block_of(n: int) -> int:
    """The block that n features stand in: a power of two, and at least what tl.dot takes."""
    return max(LEAST, next_power_of_2(n))


def blocks_of_64(n: int) -> int:
    """The extent of features that a kernel takes in blocks of at most 64: one block of its own, or whole ones of 64."""
    return block_of(n) if n <= 64 else -(-n // 64) * 64


def pack_weight(weight: Tensor, n_in: int, n_out: int) -> Tensor:
    """A layer's weight [outputs, inputs] as [n_in, n_out], 0 beyond its own inputs and outputs."""
    outputs, inputs = weight.shape
    return F.pad(weight.detach().T, (0, n_out - outputs, 0, n_in - inputs)).contiguous()


def pack_vector(values: Tensor, n: int) -> Tensor:
    """A bias or a norm's weight as [n], 0 beyond its own length."""
    return F.pad(values.detach(), (0, n - values.shape[0])).contiguous()


def join(*parts: Tensor) -> Tensor:
    """Packed parts one after another in one buffer; a kernel finds each by the sizes of those before it."""
    return torch.cat([part.flatten() for part in parts])


def coef_on(coef: Tensor, device: torch.device) -> Tensor:
    """A plan's coefficients [S, 3] in float32 on `device`, copied there once."""
    tables = packed(coef, _no_tables)
    if device not in tables:
        tables.setdefault(device, coef.to(device, torch.float32))
    return tables[device]


def _no_tables(coef: Tensor) -> dict[torch.device, Tensor]:
    return {}
