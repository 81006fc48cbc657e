"""encode_padded_history: the newest slot of a causal transformer over left-padded histories (CDDRec's encoder)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.backend import Op
from fastdiff.ops.padded_transformer import Layer, PaddedBlock


@dataclass(frozen=True)
class PaddedEncoder:
    """The weights of the encoder.

    positions  [L, D] one per slot of the window      norm  LayerNorm of the sums of items and positions
    blocks     at least one, all of the same number of heads, activation and eps, which is the eps of `norm` too
    pad_id     the row of the item table that is no item
    empty      [1, D] what a history without any item gives
    """

    positions: Tensor
    norm: Layer
    blocks: tuple[PaddedBlock, ...]
    pad_id: int
    empty: Tensor


def encode_padded_history_ref(items: Tensor, lengths: Tensor, item_table: Tensor, encoder: PaddedEncoder) -> Tensor:
    """c = blocks(LN(item_table[s_j] + positions[j]))_{L-1}, causal, over the slots j that hold an item.

    items       [B, n] int64 rows of the table, left-aligned; item i of a user stands in slot L - length + i. The pad's
                row keeps its slot and is no key; what stands beyond a row's length is not looked at
    lengths     [B] int64 in 0 .. min(n, L)
    item_table  [rows, D]
    Returns c [B, D]; `encoder.empty` for a user without any key.
    """
    n_users, width = items.shape
    if n_users == 0 or width == 0:
        return encoder.empty.expand(n_users, -1).contiguous()
    window = encoder.positions.shape[0]
    place = torch.arange(width, device=items.device)
    inside = place < lengths[:, None]
    is_key = inside & (items != encoder.pad_id)
    has_key = is_key.any(dim=1, keepdim=True)
    slot = (window - lengths[:, None] + place).clamp(max=window - 1)
    embeddings = F.embedding(items.masked_fill(~inside, encoder.pad_id), item_table)
    eps = encoder.blocks[0].eps
    x = embeddings + F.embedding(slot, encoder.positions)
    x = F.layer_norm(x, x.shape[-1:], *encoder.norm, eps)
    for block in encoder.blocks[:-1]:
        x = block.finish(x, block.gather_all(x, is_key))
    newest = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[-1])
    last = x.gather(1, newest).squeeze(1)
    # a row without any key attends to everything here: finite, and replaced
    gathered = encoder.blocks[-1].gather_last(x, last, is_key | ~has_key)
    return torch.where(has_key, encoder.blocks[-1].finish(last, gathered), encoder.empty)


encode_padded_history = Op(
    "encode_padded_history",
    encode_padded_history_ref,
    {
        "cpu": "fastdiff.ops.cpu.encode_padded_history:encode_padded_history",
        "triton": "fastdiff.kernels.encode_padded_history:encode_padded_history",
    },
)
