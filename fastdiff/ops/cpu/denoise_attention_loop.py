"""denoise_attention_loop in C++ (csrc/cpu/denoise_attention_loop.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.noise import Noise
from fastdiff.ops.causal_transformer import BlockWeights
from fastdiff.ops.cpu.transformer import packed_blocks
from fastdiff.ops.denoise_attention_loop import CausalPrefix
from fastdiff.ops.step_noise import step_noise


def denoise_attention_loop(
    x_t: Tensor,
    blocks: tuple[BlockWeights, ...],
    prefix: CausalPrefix,
    guidance_scale: float,
    input_scale: float,
    time: Tensor,
    coef: Tensor,
    normalize: bool,
    noise: Noise,
) -> Tensor:
    """See `fastdiff.ops.denoise_attention_loop.denoise_attention_loop_ref`; float32 only."""
    if x_t.shape[0] % max(prefix.n_users, 1):
        raise InvalidArgument(
            f"denoise_attention_loop: x_t must hold the same number of rows for each of the prefix's {prefix.n_users} "
            f"users (got {x_t.shape[0]} rows)"
        )
    x_0: Tensor = torch.ops.fastdiff.denoise_attention_loop.default(
        x_t,
        packed_blocks(blocks),
        blocks[0].up_bias.shape[0],
        blocks[0].n_heads,
        blocks[0].eps,
        prefix.cond,
        prefix.keys_values,
        prefix.lengths,
        prefix.pad,
        prefix.log_pads,
        prefix.uniform,
        guidance_scale,
        input_scale,
        time,
        coef,
        normalize,
        *step_noise(noise, coef).on_host(),
    )
    return x_0
