"""decode_context in C++ (csrc/cpu/decode_context.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.cpu.packing import join, packed
from fastdiff.ops.cpu.padded_transformer import pack_layer, pack_norm, scaled_queries
from fastdiff.ops.cpu.philox_normals import signed
from fastdiff.ops.decode_context import ContextDecoder, first_step


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
    if first > 0:
        table, cross, coef = table[first:], cross[first:], coef[first:]
    x_t = None if table[0][1] == 0 else noise.draw(0)
    given, seed, row_key, sample = None, 0, None, None
    if isinstance(noise, PhiloxNoise):
        seed, row_key, sample = signed(noise.seed), noise.row_key, noise.sample
    else:
        draws = {i: noise.draw(1 + first + i) for i, (_, _, c_noise) in enumerate(table) if c_noise}
        if draws:
            unread = next(iter(draws.values()))
            places = [draws.get(i, unread) for i in range(max(draws) + 1)]
            given = places[0].unsqueeze(0) if len(places) == 1 else torch.stack(places)
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
        given,
        1 + first,
        seed,
        row_key,
        sample,
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
