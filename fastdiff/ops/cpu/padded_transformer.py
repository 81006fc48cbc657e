"""PaddedBlock as csrc/cpu/encode_padded_history.h reads it."""

from __future__ import annotations

import math

from torch import Tensor, cat

from fastdiff.ops.cpu.packing import pack_linear, pack_vector
from fastdiff.ops.padded_transformer import Layer, PaddedBlock


def pack_layer(layer: Layer) -> list[Tensor]:
    weight, bias = layer
    return [pack_linear(weight), pack_vector(bias)]


def pack_norm(norm: Layer) -> list[Tensor]:
    return [pack_vector(part) for part in norm]


def scaled_queries(layer: Layer, head_dim: int) -> Layer:
    """A query layer that holds the factor of the scores."""
    weight, bias = layer
    return weight / math.sqrt(head_dim), bias / math.sqrt(head_dim)


def pack_block(block: PaddedBlock, last: bool) -> list[Tensor]:
    """qkv; or for the last block the queries, then of each head the key map [D, D / H] and the values; the rest."""
    dim = block.query[0].shape[0]
    head_dim = dim // block.n_heads
    query = scaled_queries(block.query, head_dim)
    if last:
        first = pack_layer(query)
        keys = block.key[0].view(-1, head_dim, dim)
        values, biases = block.value[0].view(-1, head_dim, dim), block.value[1].view(-1, head_dim)
        first += [pack_linear(of_head.T) for of_head in keys.unbind(0)]
        for layer in zip(values.unbind(0), biases.unbind(0), strict=True):
            first += pack_layer(layer)
    else:
        layers = (query, block.key, block.value)
        first = pack_layer((cat([weight for weight, _ in layers]), cat([bias for _, bias in layers])))
    return [
        *first,
        *pack_layer(block.out),
        *pack_norm(block.norm_1),
        *pack_layer(block.up),
        *pack_layer(block.down),
        *pack_norm(block.norm_2),
    ]
