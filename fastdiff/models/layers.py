"""Blocks that several models share, in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InvalidArgument


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


@dataclass(frozen=True)
class RaggedRows:
    """Sequences of different lengths, packed one after another `[N, ..]` or left-aligned in a rectangle `[B, n, ..]`.

    lengths  [B] int64       width  n, at least the longest length
    index    [N] int64, the place of each packed row in the flattened rectangle
    """

    lengths: Tensor
    width: int
    index: Tensor

    @classmethod
    def of(cls, lengths: Tensor, width: int) -> RaggedRows:
        inside = torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
        return cls(lengths, width, inside.flatten().nonzero().squeeze(1))

    @property
    def full(self) -> bool:
        """Whether every sequence fills its row: then the two forms are views of each other."""
        return self.index.shape[0] == self.lengths.shape[0] * self.width

    def pack(self, padded: Tensor) -> Tensor:
        """[B, n, ..] -> [N, ..]"""
        flat = padded.flatten(0, 1)
        return flat if self.full else flat[self.index]

    def pad(self, packed: Tensor) -> Tensor:
        """[N, ..] -> [B, n, ..], zeros beyond each row's length"""
        shape = (self.lengths.shape[0], self.width, *packed.shape[1:])
        if self.full:
            return packed.view(shape)
        flat = packed.new_zeros(shape[0] * shape[1], *shape[2:])
        flat[self.index] = packed
        return flat.view(shape)

    def last(self, packed: Tensor, otherwise: Tensor) -> Tensor:
        """The last row of each sequence `[B, D]`; `otherwise` `[D]` for an empty one. packed [N, D]"""
        ends = torch.where(self.lengths > 0, self.lengths.cumsum(0) - 1, self.index.shape[0])
        return torch.cat([packed, otherwise.unsqueeze(0)])[ends]

    def repeat(self, times: int) -> RaggedRows:
        """The same sequences `times` times over, packed rows likewise."""
        if times == 1:
            return self
        shift = self.lengths.shape[0] * self.width
        index = torch.cat([self.index + shift * i for i in range(times)])
        return RaggedRows(self.lengths.repeat(times), self.width, index)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[.., n, D] -> [.., H, n, D / H], a view where strides allow."""
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """[.., H, n, D / H] -> [.., n, D], contiguous."""
    return x.transpose(-2, -3).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(query key^T + bias) value, head by head; queries hold their scale already.

    query  [B, H, Q, D / H]      key, value  [B, H, K, D / H]      bias  [B, 1, Q, K], -inf where a key is not seen
    Returns [B, Q, D].
    """
    return merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0))
