"""Blocks that several models share, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.causal_transformer import RaggedRows, attend, merge_heads, split_heads

__all__ = ["RaggedRows", "attend", "merge_heads", "sinusoidal_embedding", "split_heads"]


def sinusoidal_embedding(timesteps: Tensor, dim: int, order: str, spacing: str) -> Tensor:
    """tau(t) = concat of cos(t f_k) and sin(t f_k), f_k = 10000^(-k / n), k = 0 .. dim/2 - 1.

    timesteps  [S] floating or integer; may be fractional
    order      "sin_cos" or "cos_sin": which half comes first
    spacing    "half": n = dim/2 (ADRec); "half_minus_one": n = dim/2 - 1, whose last frequency is 1/10000 (DreamRec)
    Returns [S, dim] float32, the precision in which all of the authors evaluate it; the caller casts.
    Raises InvalidArgument for an odd dim, an unknown order or an unknown spacing.
    Source: Vaswani et al. 2017, section 3.5, in the two spellings that diffusion code inherited.
    """
    if dim < 2 or dim % 2:
        raise InvalidArgument(f"sinusoidal_embedding: dim must be an even number of at least 2 (got {dim})")
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    if spacing == "half":
        frequencies = torch.exp(-math.log(10000) * index / half)
    elif spacing == "half_minus_one":
        # With one frequency there is nothing to space: it is 1.
        frequencies = torch.exp(index * -(math.log(10000) / max(half - 1, 1)))
    else:
        raise InvalidArgument(f"sinusoidal_embedding: spacing must be 'half' or 'half_minus_one' (got {spacing!r})")
    angles = timesteps.to(torch.float32)[:, None] * frequencies[None, :]
    if order == "sin_cos":
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
    if order == "cos_sin":
        return torch.cat([angles.cos(), angles.sin()], dim=-1)
    raise InvalidArgument(f"sinusoidal_embedding: order must be 'sin_cos' or 'cos_sin' (got {order!r})")
