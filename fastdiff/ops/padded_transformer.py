"""Causal post-norm transformers over left-padded histories whose pads are no keys (CDDRec): weights and formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.causal_transformer import merge_heads, split_heads

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}

Layer = tuple[Tensor, Tensor]
"""(weight [out, in], bias [out]) of a linear layer, or (weight [D], bias [D]) of a LayerNorm."""


@dataclass(frozen=True)
class PaddedBlock:
    """One block.

        h = LN_1(x + out(attend(x)))        output = LN_2(h + down(act(up(h))))

    query, key, value, out, up, down  linear layers        norm_1, norm_2  LayerNorms
    activation  of the feed-forward part: "gelu" (exact) or "relu"
    eps         added to the variance inside the root of both LayerNorms
    """

    query: Layer
    key: Layer
    value: Layer
    out: Layer
    norm_1: Layer
    up: Layer
    down: Layer
    norm_2: Layer
    n_heads: int
    activation: str = "gelu"
    eps: float = 1e-12

    def to(self, dtype: torch.dtype) -> PaddedBlock:
        """The block with its weights in another dtype."""
        names = ("query", "key", "value", "out", "norm_1", "up", "down", "norm_2")
        layers = {name: tuple(weight.to(dtype) for weight in getattr(self, name)) for name in names}
        return replace(self, **layers)  # type: ignore[arg-type]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [.., H, n, D / H] of x [.., n, D]; queries are not scaled."""
        q, k, v = (split_heads(F.linear(x, *layer), self.n_heads) for layer in (self.query, self.key, self.value))
        return q, k, v

    def gather_last(self, x: Tensor, query: Tensor, is_key: Tensor) -> Tensor:
        """What the heads gather for one row per user: x [B, n, D], query [B, D] (one of its rows), is_key [B, n].

        Keys and values are not projected: q . (W_k x_j + b_k) = (W_k^T q) . x_j + a constant that softmax ignores, and
        the value map follows the weighted sum.
        """
        heads = self.n_heads
        n_users, dim = query.shape
        head_dim = dim // heads
        key_map, value_map = (layer[0].view(heads, head_dim, dim) for layer in (self.key, self.value))
        q = F.linear(query, *self.query).view(n_users, heads, head_dim).transpose(0, 1)  # [H, B, d]
        keyed = torch.bmm(q, key_map).transpose(0, 1)  # [B, H, D]
        scores = torch.bmm(keyed, x.transpose(1, 2)) / math.sqrt(head_dim)  # [B, H, n]
        probabilities = torch.softmax(scores.masked_fill(~is_key[:, None], -math.inf), dim=-1)
        mixed = torch.bmm(probabilities, x).transpose(0, 1)  # [H, B, D]
        return torch.bmm(mixed, value_map.transpose(1, 2)).transpose(0, 1).flatten(1) + self.value[1]

    def gather_all(self, x: Tensor, is_key: Tensor) -> Tensor:
        """What the heads gather for every row, from the keys up to it: x [B, n, D], is_key [B, n]."""
        n = x.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        allowed = causal & is_key[:, None, :]
        # a slot that may attend to nothing is never read by one that counts; only NaN must be kept out of its row
        allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        return merge_heads(F.scaled_dot_product_attention(*self.project(x), attn_mask=allowed[:, None]))

    def finish(self, x: Tensor, gathered: Tensor) -> Tensor:
        """The block's output from its input x and what its heads gathered, both [.., D]."""
        shape = x.shape[-1:]
        h = F.layer_norm(F.linear(gathered, *self.out) + x, shape, *self.norm_1, self.eps)
        hidden = F.linear(ACTIVATIONS[self.activation](F.linear(h, *self.up)), *self.down)
        return F.layer_norm(hidden + h, shape, *self.norm_2, self.eps)
