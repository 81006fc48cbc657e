"""prepare_causal_prefix in C++ (csrc/cpu/causal_history.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.causal_transformer import BlockWeights, Pads
from fastdiff.ops.cpu.transformer import packed_blocks
from fastdiff.ops.denoise_attention_loop import CausalPrefix


def prepare_causal_prefix(
    condition: Tensor,
    last: Tensor,
    items: Tensor,
    lengths: Tensor,
    item_table: Tensor,
    input_scale: float,
    normalize: bool,
    time: Tensor,
    blocks: tuple[BlockWeights, ...],
    pads: Pads,
    window: int,
    guided: bool,
) -> CausalPrefix:
    """See `fastdiff.ops.prepare_causal_prefix.prepare_causal_prefix_ref`; float32 only."""
    block = blocks[0]
    keys_values, slots, log_pads = torch.ops.fastdiff.prepare_causal_prefix.default(
        condition,
        items,
        lengths,
        item_table,
        input_scale,
        normalize,
        time,
        packed_blocks(blocks),
        block.up_bias.shape[0],
        block.n_heads,
        block.eps,
        pads.keys_values,
        window,
        guided,
    )
    cond = torch.stack([last, torch.zeros_like(last)]) if guided else last.unsqueeze(0)
    pad = pads.keys_values if guided else pads.keys_values[:, :1]
    return CausalPrefix(cond, keys_values, slots, pad, log_pads, lengths == 0, block.n_heads)
