"""encode_last_item: the last row of one causal transformer block over a history, or a linear layer of it (DreamRec)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.backend import Op


@dataclass(frozen=True)
class LastItemBlock:
    """The block's weights, so arranged that neither keys nor values are ever formed.

        q . (W_k e_j) = (W_k^T q) . e_j,    sum_j a_j W_v e_j = W_v sum_j a_j e_j

    positions  [L, D], L the window
    qk         (W_k^T W_q / sqrt(D) [D, D], W_k^T b_q / sqrt(D) [D]); softmax does not see q . b_k
    value, up, down  (weight [D, D], bias [D]) of the values and of the two layers of the feed-forward
    norm_1, norm_2, norm_ff, norm_3  (weight [D], bias [D])
    pad_id     the row of the table that stands for no item
    head       (weight [H, D], bias [H]) of a layer that reads the row; None leaves the row as it is
    """

    positions: Tensor
    qk: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    norm_1: tuple[Tensor, Tensor]
    norm_2: tuple[Tensor, Tensor]
    norm_ff: tuple[Tensor, Tensor]
    norm_3: tuple[Tensor, Tensor]
    pad_id: int
    head: tuple[Tensor, Tensor] | None = None
    eps: float = 1e-5

    @staticmethod
    def fold_key(query: tuple[Tensor, Tensor], key_weight: Tensor) -> tuple[Tensor, Tensor]:
        """`qk` from the query's (weight, bias) and the key's weight."""
        scaled = key_weight / math.sqrt(key_weight.shape[0])
        return scaled.T @ query[0], scaled.T @ query[1]


def encode_last_item_ref(items: Tensor, lengths: Tensor, item_table: Tensor, block: LastItemBlock) -> Tensor:
    """head(h) [B, H], or h [B, D] where there is no head, of the last row

        h = LN3(LN_ff(W_2 relu(W_1 z + b_1) + b_2 + z) 1[s_last is an item]),    z = LN2(q + attention(q)),

        e_j = (E[s_j] + P_j) 1[s_j != pad]    q = LN1(e_last)    attention = W_v sum_j softmax_j(qk(q) . e_j) e_j + b_v

    over the places j = 0 .. last. As the authors have it, a key whose features sum to exactly 0 is masked, and so is
    the attention of a query whose own do; where every key of a row is masked, each of all L places weighs 1 / L. An
    empty history is one pad.

    items    [B, n] int64 rows of the table, left-aligned, n at most L and perhaps 0     lengths  [B] int64
    item_table  [N, D] floating
    """
    if items.shape[1] == 0:
        items = torch.full_like(lengths, block.pad_id)[:, None]
    places = torch.arange(items.shape[1], device=items.device)
    inside = (places < lengths[:, None]) & (items != block.pad_id)
    e = (item_table[items] + block.positions[places]) * inside[..., None]

    rows, last = torch.arange(items.shape[0], device=items.device), (lengths - 1).clamp(min=0)
    query = _norm(block.norm_1, e[rows, last], block)
    y = query + _attend(query, e, places <= last[:, None], block)
    z = _norm(block.norm_2, y, block)
    hidden = F.linear(F.relu(F.linear(z, *block.up)), *block.down)
    out = _norm(block.norm_ff, hidden + z, block) * inside[rows, last][:, None]
    h = _norm(block.norm_3, out, block)
    return h if block.head is None else F.linear(h, *block.head)


def _attend(query: Tensor, e: Tensor, visible: Tensor, block: LastItemBlock) -> Tensor:
    """Attention of one query `[B, D]` per user over those of its places e `[B, n, D]` that are `visible [B, n]`."""
    logits = torch.einsum("bd,bnd->bn", F.linear(query, *block.qk), e)
    allowed = visible & _has_features(e)
    weights = torch.softmax(logits.masked_fill(~allowed, torch.finfo(logits.dtype).min), dim=-1)
    # with no key left, each of all L places weighs the same; those beyond the n given are zero rows
    weights = torch.where(allowed.any(dim=-1, keepdim=True), weights, 1.0 / block.positions.shape[0])
    mixed = torch.einsum("bn,bnd->bd", weights, e)
    return F.linear(mixed, *block.value) * _has_features(query)[:, None]


def _norm(weights: tuple[Tensor, Tensor], x: Tensor, block: LastItemBlock) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *weights, block.eps)


def _has_features(x: Tensor) -> Tensor:
    """False where the authors' masks strike: the features of a row sum to exactly 0.

    Sums of half-precision numbers do so by chance, which would drop real items: there, only rows of zeros count.
    """
    if x.dtype in (torch.float32, torch.float64):
        return x.sum(dim=-1) != 0
    return (x != 0).any(dim=-1)


encode_last_item = Op(
    "encode_last_item",
    encode_last_item_ref,
    {
        "cpu": "fastdiff.ops.cpu.encode_last_item:encode_last_item",
        "triton": "fastdiff.kernels.encode_last_item:encode_last_item",
    },
)
