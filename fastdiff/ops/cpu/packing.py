"""Weights as the C++ kernels read them (csrc/cpu/linear.h)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
"""Outputs that stand side by side in a packed layer, at every CPU level."""


def padded(n: int) -> int:
    """n rounded up to whole panels."""
    return -(-n // PANEL) * PANEL


def pack_linear(weight: Tensor) -> Tensor:
    """A layer's weight [n_out, n_in] as panels [ceil(n_out / 16), n_in, 16] float32; outputs beyond n_out are 0."""
    n_out, n_in = weight.shape
    whole = F.pad(weight.detach().to(torch.float32), (0, 0, 0, padded(n_out) - n_out))
    return whole.view(whole.shape[0] // PANEL, PANEL, n_in).transpose(1, 2).contiguous()


def pack_vector(values: Tensor) -> Tensor:
    """A bias or a norm's weight [n] as [padded(n)] float32, 0 beyond n."""
    n = values.shape[0]
    return F.pad(values.detach().to(torch.float32), (0, padded(n) - n)).contiguous()


def join(*parts: Tensor) -> Tensor:
    """Packed parts one after another in one buffer: a kernel takes one tensor and finds the parts by their sizes."""
    return torch.cat([part.flatten() for part in parts])
