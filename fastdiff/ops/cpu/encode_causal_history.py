"""encode_causal_history in C++ (csrc/cpu/causal_history.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.causal_transformer import BlockWeights, Pads
from fastdiff.ops.cpu.packing import pack_vector
from fastdiff.ops.cpu.transformer import packed_blocks
from fastdiff.per_object import packed


def encode_causal_history(
    items: Tensor,
    lengths: Tensor,
    item_table: Tensor,
    norm: tuple[Tensor, Tensor, float],
    blocks: tuple[BlockWeights, ...],
    pads: Pads,
    window: int,
    only_last: bool,
) -> tuple[Tensor, Tensor]:
    """See `fastdiff.ops.encode_causal_history.encode_causal_history_ref`; float32 only."""
    weight, bias, norm_eps = norm
    block = blocks[0]
    encoded: tuple[Tensor, Tensor] = torch.ops.fastdiff.encode_causal_history.default(
        items,
        lengths,
        item_table,
        packed(weight, pack_vector),
        packed(bias, pack_vector),
        norm_eps,
        packed_blocks(blocks),
        block.up_bias.shape[0],
        block.n_heads,
        block.eps,
        pads.keys_values,
        pads.output,
        window,
        only_last,
    )
    return encoded
