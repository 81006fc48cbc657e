"""encode_padded_history in C++ (csrc/cpu/encode_padded_history.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.cpu.packing import join, pack_vector
from fastdiff.ops.cpu.padded_transformer import pack_block
from fastdiff.ops.encode_padded_history import PaddedEncoder
from fastdiff.per_object import packed


def encode_padded_history(items: Tensor, lengths: Tensor, item_table: Tensor, encoder: PaddedEncoder) -> Tensor:
    """See `fastdiff.ops.encode_padded_history.encode_padded_history_ref`; float32 only."""
    norm_weight, norm_bias, blocks = packed(encoder, _pack)
    block = encoder.blocks[-1]
    context: Tensor = torch.ops.fastdiff.encode_padded_history.default(
        items,
        lengths,
        item_table,
        encoder.positions,
        norm_weight,
        norm_bias,
        blocks,
        block.up[0].shape[0],
        block.n_heads,
        block.activation == "gelu",
        block.eps,
        encoder.pad_id,
        encoder.empty,
    )
    return context


def _pack(encoder: PaddedEncoder) -> tuple[Tensor, Tensor, list[Tensor]]:
    last = len(encoder.blocks) - 1
    blocks = [join(*pack_block(block, i == last)) for i, block in enumerate(encoder.blocks)]
    return pack_vector(encoder.norm[0]), pack_vector(encoder.norm[1]), blocks
