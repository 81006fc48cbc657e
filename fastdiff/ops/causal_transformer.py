"""Causal post-norm transformers over histories with pads in front (ADRec): weights, and the plain PyTorch of their ops.

Padding. The authors' mask replaces the scores of masked QUERY rows, so real slots attend to the pads before them, and a
pad slot attends evenly to the slots up to itself, all of them pads. So in every layer the pad slots of all users hold
one and the same vector, which depends on weights only (`Pads`), and are one key with log(number of pads) added to its
logit. An empty history's last slot is a pad itself: it attends evenly to the pads before it and to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BlockWeights:
    """A post-norm transformer block.

        h = LN_1(x + W_o attend(x) + b_o)        out = LN_2(h + W_down gelu_tanh(W_up h + b_up) + b_down)

    qkv_weight   [3 D, D] rows of queries, keys, values; the query rows hold the factor 1 / sqrt(D / n_heads) already
    qkv_bias     [3 D]            out_weight  [D, D]           out_bias   [D]
    norm_1       ([D], [D])       norm_2      ([D], [D])       weight and bias of the two LayerNorms
    up_weight    [F, D]           up_bias     [F]              down_weight [D, F]    down_bias [D]
    eps          added to the variance inside the root of both LayerNorms
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm_1: tuple[Tensor, Tensor]
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    norm_2: tuple[Tensor, Tensor]
    n_heads: int
    eps: float = 1e-12

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values `[.., 3 D]` of x `[.., D]`."""
        return F.linear(x, self.qkv_weight, self.qkv_bias)

    def queries(self, x: Tensor) -> Tensor:
        """Queries `[.., D]` alone."""
        dim = x.shape[-1]
        return F.linear(x, self.qkv_weight[:dim], self.qkv_bias[:dim])

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys and values `[.., 2 D]` alone."""
        dim = x.shape[-1]
        return F.linear(x, self.qkv_weight[dim:], self.qkv_bias[dim:])

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output from its input x and what its heads gathered, both `[.., D]`."""
        shape = x.shape[-1:]
        h = F.layer_norm(x + F.linear(attended, self.out_weight, self.out_bias), shape, *self.norm_1, self.eps)
        up = F.gelu(F.linear(h, self.up_weight, self.up_bias), approximate="tanh")
        return F.layer_norm(h + F.linear(up, self.down_weight, self.down_bias), shape, *self.norm_2, self.eps)


@dataclass(frozen=True)
class Pads:
    """The vector that all pad slots share, block by block, for G passes.

    keys_values  [n_blocks, G, 2 D] its key and value in each block        output  [G, D] what it becomes after the last
    """

    keys_values: Tensor
    output: Tensor

    @classmethod
    def of(cls, blocks: Sequence[BlockWeights], hidden: Tensor) -> Pads:
        """From the pad's input `[G, D]`: it attends evenly to pads only, so what it gathers is their common value."""
        keys_values, dim = [], hidden.shape[-1]
        for block in blocks:
            keys_values.append(block.keys_values(hidden))
            hidden = block.finish(hidden, keys_values[-1][:, dim:])
        return cls(torch.stack(keys_values), hidden)


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
        """[N or more, ..] -> [B, n, ..], zeros beyond each row's length"""
        packed, shape = packed[: self.index.shape[0]], (self.lengths.shape[0], self.width, *packed.shape[1:])
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


def log_pads(lengths: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """[B]: log of the pads in front of histories `[B]` in a window; -inf where there are none."""
    return torch.log((window - lengths).to(dtype))


def with_pad_key(keys_values: Tensor, pad: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, 1 + n, D / H], the pad's in front. keys_values [B, n, 2 D]   pad [B or 1, 2 D]"""
    first = pad.unsqueeze(1).expand(keys_values.shape[0], -1, -1)
    key, value = torch.cat([first, keys_values], dim=1).chunk(2, dim=-1)
    return split_heads(key, n_heads), split_heads(value, n_heads)


def run_block(
    block: BlockWeights, hidden: Tensor, rows: RaggedRows, pad: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """A block over packed rows [N, D], and their keys and values [N, 2 D]. pad as in `with_pad_key`, bias `attend`."""
    dim = hidden.shape[-1]
    qkv = block.project(hidden)
    padded = rows.pad(qkv)
    key, value = with_pad_key(padded[..., dim:], pad, block.n_heads)
    gathered = attend(split_heads(padded[..., :dim], block.n_heads), key, value, bias)
    return block.finish(hidden, rows.pack(gathered)), qkv[:, dim:]


def causal_bias(log_pads: Tensor, width: int) -> Tensor:
    """[B, 1, n, 1 + n]: log(number of pads) on the pad key, then 0 up to the query's own slot and -inf after it."""
    later = torch.full((width, width), -torch.inf, dtype=log_pads.dtype, device=log_pads.device).triu(1)
    users = log_pads.shape[0]
    pads = log_pads.view(users, 1, 1, 1).expand(users, 1, width, 1)
    return torch.cat([pads, later.expand(users, 1, width, width)], dim=-1)


def key_bias(log_pads: Tensor, lengths: Tensor, width: int) -> Tensor:
    """[B, 1 + n]: log(number of pads) on the pad key, then 0 on a user's own keys and -inf beyond them."""
    absent = torch.arange(width, device=lengths.device) >= lengths.unsqueeze(1)
    items = torch.zeros(absent.shape, dtype=log_pads.dtype, device=log_pads.device)
    return torch.cat([log_pads.unsqueeze(1), items.masked_fill(absent, -torch.inf)], dim=1)
