"""The transformer of ADRec's authors as they run it: every pad computed, the mask on query rows. Without dropout."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data import UserSequence
from fastdiff.train.data import TrainingData, leave_one_out
from fastdiff.train.layers import CausalTransformer


def padded_transformer(network: CausalTransformer, x: Tensor, real: Tensor) -> Tensor:
    """x [B, L, D], real [B, L] bool -> [B, L, D]"""
    for block in network.transformer_blocks:
        x = _norm(block.input_sublayer, x + _attention(block.attention, x, real))
        forward = block.feed_forward
        up = forward.w_1(x)
        up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = _norm(block.output_sublayer, x + forward.w_2(up))
    return x


def _norm(sublayer, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        sublayer.norm.weight * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-12)
        + sublayer.norm.bias
    )


def _attention(attention, x: Tensor, real: Tensor) -> Tensor:
    users, slots, dim = x.shape
    heads = attention.n_heads
    q, k, v = (layer(x).view(users, slots, heads, dim // heads).transpose(1, 2) for layer in attention.linear_layers)
    logits = q @ k.transpose(-2, -1) / math.sqrt(dim // heads)
    logits = logits.masked_fill(~real[:, None, :, None], -1e9)
    logits = logits + torch.full((slots, slots), -torch.inf, dtype=x.dtype).triu(1)
    gathered = F.softmax(logits, dim=-1) @ v
    return attention.w_layer(gathered.transpose(1, 2).reshape(users, slots, dim))


def ring_data(n_users: int = 9, n_items: int = 12, longest: int = 11, seed: int = 0) -> TrainingData:
    """Users with 3 .. `longest` items (so 1 .. longest - 2 to learn from), each following a ring of the items."""
    rng = np.random.default_rng(seed)
    lengths = [3 + at % (longest - 2) for at in range(n_users)]
    starts = rng.integers(0, n_items, n_users)
    users = [
        UserSequence(str(at), [int((start + i) % n_items) + 1 for i in range(length)], "here")
        for at, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    return leave_one_out(users)
