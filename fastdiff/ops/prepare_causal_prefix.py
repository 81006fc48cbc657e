"""prepare_causal_prefix: what a causal denoiser's last slot attends to, once for all steps (ADRec's denoiser)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.backend import Op
from fastdiff.ops.causal_transformer import BlockWeights, Pads, RaggedRows, causal_bias, log_pads, run_block
from fastdiff.ops.denoise_attention_loop import CausalPrefix


def prepare_causal_prefix_ref(
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
    """Run the clean slots j < n - 1 of each history of n items, all but the last one, through the blocks and keep their
    keys and values:

        u_j = condition_j + input_scale y_j + time
        y_j = item_table[items_{j + 1}], on the unit sphere if `normalize`

    and, where `guided`, a second pass without the condition. Of the last block only keys and values are computed.

    condition      [N, D] packed as the same backend's `encode_causal_history` returns it; what stands beyond the sum of
                   lengths is not read
    last           [B, D] the condition at the last slot
    items, lengths, item_table, window   as there
    time           [D], what t = 0 adds
    blocks         the transformer blocks, at least one
    pads           what the pads are in each block, for G = 2 passes: conditional, unconditional
    Returns a `CausalPrefix`; a backend that does not wait for the lengths makes room for B (n - 1) slots. An empty
    history's last slot is one of its pads: it attends evenly to the others.
    """
    passes, width = 2 if guided else 1, max(items.shape[1] - 1, 0)
    rows = RaggedRows.of(lengths, items.shape[1])
    slots = RaggedRows.of((lengths - 1).clamp(min=0), width)
    target = item_table[slots.pack(items[:, 1:])]
    if normalize:
        target = F.normalize(target, p=2.0, dim=-1)
    unconditional = input_scale * target + time
    clean = slots.pack(rows.pad(condition)[:, :width])
    hidden = torch.cat([clean + unconditional, unconditional][:passes])

    pad_logits = log_pads(lengths.clamp(min=1), window, hidden.dtype)
    seen = causal_bias(pad_logits, width).repeat(passes, 1, 1, 1)
    all_slots, users = slots.repeat(passes), lengths.shape[0]
    keys_values = []
    for layer, block in enumerate(blocks[:-1]):
        pad = pads.keys_values[layer, :passes].repeat_interleave(users, dim=0)
        hidden, kept = run_block(block, hidden, all_slots, pad, seen)
        keys_values.append(kept)
    keys_values.append(blocks[-1].keys_values(hidden))
    empty = lengths == 0
    return CausalPrefix(
        cond=torch.stack([last, torch.zeros_like(last)][:passes]),
        keys_values=torch.stack([kept.reshape(passes, -1, kept.shape[-1]) for kept in keys_values]),
        lengths=slots.lengths,
        pad=pads.keys_values[:, :passes],
        log_pads=pad_logits,
        uniform=empty if bool(empty.any()) else None,
        n_heads=blocks[0].n_heads,
    )


prepare_causal_prefix = Op(
    "prepare_causal_prefix",
    prepare_causal_prefix_ref,
    {
        "cpu": "fastdiff.ops.cpu.prepare_causal_prefix:prepare_causal_prefix",
        "triton": "fastdiff.kernels.prepare_causal_prefix:prepare_causal_prefix",
    },
)
