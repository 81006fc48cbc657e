"""encode_last_item in C++ (csrc/cpu/encode_last_item.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.cpu.packing import join, pack_linear, pack_vector
from fastdiff.ops.encode_last_item import LastItemBlock
from fastdiff.per_object import packed


def encode_last_item(items: Tensor, lengths: Tensor, item_table: Tensor, block: LastItemBlock) -> Tensor:
    """See `fastdiff.ops.encode_last_item.encode_last_item_ref`; float32 only.

    A sum of features is taken for 0 where it is 0 in float64: sums that are 0 in exact arithmetic are found whatever
    their order, and those that float32 rounds to 0 by chance are not masked.
    """
    weights, window, outputs = packed(block, _pack)
    h: Tensor = torch.ops.fastdiff.encode_last_item.default(
        items, lengths, item_table, weights, window, outputs, block.pad_id, block.eps
    )
    return h


def _pack(block: LastItemBlock) -> tuple[Tensor, int, int]:
    """All weights in one buffer, as csrc/cpu/encode_last_item.h says; the window; the head's outputs, 0 without one."""
    layers = [block.qk, block.value, block.up, block.down, *([] if block.head is None else [block.head])]
    norms = [block.norm_1, block.norm_2, block.norm_ff, block.norm_3]
    parts = [part for weight, bias in layers for part in (pack_linear(weight), pack_vector(bias))]
    parts += [pack_vector(values) for norm in norms for values in norm]
    weights = join(*parts, *(pack_vector(position) for position in block.positions))
    return weights, block.positions.shape[0], 0 if block.head is None else block.head[1].shape[0]
