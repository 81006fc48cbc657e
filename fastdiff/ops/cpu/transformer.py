"""Transformer blocks as csrc/cpu/transformer_block.h reads them."""

from __future__ import annotations

from torch import Tensor

from fastdiff.ops.causal_transformer import BlockWeights
from fastdiff.ops.cpu.packing import join, pack_linear, pack_vector
from fastdiff.per_object import packed


def pack_block(block: BlockWeights) -> Tensor:
    """One buffer: qkv, out, norm_1, up, down, norm_2; of a layer its panels and bias, of a norm its weight and bias."""
    return join(
        pack_linear(block.qkv_weight),
        pack_vector(block.qkv_bias),
        pack_linear(block.out_weight),
        pack_vector(block.out_bias),
        *map(pack_vector, block.norm_1),
        pack_linear(block.up_weight),
        pack_vector(block.up_bias),
        pack_linear(block.down_weight),
        pack_vector(block.down_bias),
        *map(pack_vector, block.norm_2),
    )


def packed_blocks(blocks: tuple[BlockWeights, ...]) -> list[Tensor]:
    return [packed(block, pack_block) for block in blocks]
