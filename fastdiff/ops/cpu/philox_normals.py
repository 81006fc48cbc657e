"""philox_normals in C++ (csrc/cpu/philox_normals.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor


def signed(seed: int | Tensor) -> int:
    """The 64 bits of a seed as the signed integer that a C++ op takes."""
    if isinstance(seed, Tensor):
        return int(seed)
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def philox_normals(
    seed: int | Tensor, row_key: Tensor, sample: Tensor, first_draw: int, n_draws: int, dim: int
) -> Tensor:
    """See `fastdiff.ops.philox_normals.philox_normals_ref`."""
    normals: Tensor = torch.ops.fastdiff.philox_normals.default(signed(seed), row_key, sample, first_draw, n_draws, dim)
    return normals
