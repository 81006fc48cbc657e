"""encode_interests: the interest vectors of a history (DimeRec)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.backend import Op


@dataclass(frozen=True)
class InterestAttention:
    """The learned extractor: which places of a history each interest looks at.

    positions  [L, D], L the window
    up, down   (weight [H, D], bias [H]) and (weight [K, H], bias [K]) of the two layers behind the logits
    positions_in_values  whether the positions are added to what is averaged too
    """

    positions: Tensor
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    positions_in_values: bool = False


@dataclass(frozen=True)
class InterestExtractor:
    """How a history becomes K interests; never changed, so that a backend may keep its own form of it.

    pad_id     the row of the table that stands for no item
    attention  None takes the last K items as they are
    """

    n_interests: int
    pad_id: int
    attention: InterestAttention | None = None


def encode_interests_ref(items: Tensor, lengths: Tensor, item_table: Tensor, extractor: InterestExtractor) -> Tensor:
    """g [B, K, D], over the places j < length that hold an item (not the pad); H_j = E[s_j], zero rows elsewhere:

        with attention   g_k = sum_j softmax_j(down(tanh(up(H_j + P_j))))_k v_j,    v_j = H_j, or H_j + P_j
        without          g_k = H_{length - K + k}                                   zeros before the first place

    A history without items has g = 0.

    items    [B, n] int64 rows of the table, left-aligned, n perhaps 0; at most L with attention    lengths  [B] int64
    item_table  [N, D] floating
    """
    attention = extractor.attention
    if items.shape[1] == 0:
        return item_table.new_zeros(items.shape[0], extractor.n_interests, item_table.shape[1])
    if attention is None:
        return _last_items(items, lengths, item_table, extractor)
    places = torch.arange(items.shape[1], device=items.device)
    present = ((places < lengths[:, None]) & (items != extractor.pad_id))[..., None]
    embedded = item_table[items] * present
    placed = embedded + attention.positions[places]
    logits = F.linear(torch.tanh(F.linear(placed, *attention.up)), *attention.down)
    weights = torch.softmax(logits.masked_fill(~present, torch.finfo(logits.dtype).min), dim=1)
    values = placed * present if attention.positions_in_values else embedded
    return weights.transpose(1, 2) @ values


def _last_items(items: Tensor, lengths: Tensor, item_table: Tensor, extractor: InterestExtractor) -> Tensor:
    places = lengths[:, None] - extractor.n_interests + torch.arange(extractor.n_interests, device=items.device)
    rows = torch.gather(items, 1, places.clamp(min=0))
    present = (places >= 0) & (rows != extractor.pad_id)
    return item_table[rows] * present[..., None]


encode_interests = Op(
    "encode_interests",
    encode_interests_ref,
    {
        "cpu": "fastdiff.ops.cpu.encode_interests:encode_interests",
        "triton": "fastdiff.kernels.encode_interests:encode_interests",
    },
)
