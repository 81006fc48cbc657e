"""decode_context in C++ (csrc/cpu/decode_context.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.noise import Noise
from fastdiff.ops.cpu.packing import join
from fastdiff.ops.cpu.padded_transformer import pack_layer, pack_norm, scaled_queries
from fastdiff.ops.decode_context import ContextDecoder, first_step
from fastdiff.ops.step_noise import step_noise
from fastdiff.per_object import packed


def decode_context(
    context: Tensor,
    decoder: ContextDecoder,
    cross: Tensor,
    coef: Tensor,
    normalize: bool,
    num_samples: int,
    noise: Noise,
) -> Tensor:
    """See `fastdiff.ops.decode_context.decode_context_ref`; float32 only. Philox draws are made inside the loop, other
    ones are asked for before it, in the same order."""
    table = coef.tolist()
    first = first_step(table)
    x_t = None if table[first][1] == 0 else noise.draw(0)
    draws = step_noise(noise, coef, first).on_host()
    if first > 0:
        cross, coef = cross[first:], coef[first:]
    x_0: Tensor = torch.ops.fastdiff.decode_context.default(
        context,
        packed(decoder, _pack),
        decoder.n_heads,
        decoder.coupled,
        decoder.activation == "gelu",
        decoder.eps,
        cross,
        coef,
        normalize,
        num_samples,
        x_t,
        1 + first,
        *draws,
    )
    return x_0


def _pack(decoder: ContextDecoder) -> Tensor:
    """As csrc/cpu/decode_context.h says."""
    weight, bias = decoder.qkv
    dim = weight.shape[1]
    if decoder.coupled:
        scaled = scaled_queries((weight[:dim], bias[:dim]), dim // decoder.n_heads)
        gather = (torch.cat([scaled[0], weight[dim:]]), torch.cat([scaled[1], bias[dim:]]))
    else:
        gather = (weight[2 * dim :], bias[2 * dim :])
    return join(
        *pack_layer(gather),
        *pack_layer(decoder.out),
        *pack_norm(decoder.norm_1),
        *pack_layer(decoder.linear_1),
        *pack_layer(decoder.linear_2),
        *pack_norm(decoder.norm_2),
        *pack_norm(decoder.norm_3),
    )
