"""encode_interests in C++ (csrc/cpu/encode_interests.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.cpu.packing import join, pack_linear, pack_vector
from fastdiff.ops.encode_interests import InterestExtractor
from fastdiff.per_object import packed


def encode_interests(items: Tensor, lengths: Tensor, item_table: Tensor, extractor: InterestExtractor) -> Tensor:
    """See `fastdiff.ops.encode_interests.encode_interests_ref`; float32 only. Bits do not depend on the batch."""
    weights, window, hidden, positions_in_values = packed(extractor, _pack)
    g: Tensor = torch.ops.fastdiff.encode_interests.default(
        items,
        lengths,
        item_table,
        weights,
        window,
        hidden,
        extractor.n_interests,
        extractor.pad_id,
        positions_in_values,
    )
    return g


def _pack(extractor: InterestExtractor) -> tuple[Tensor | None, int, int, bool]:
    """The weights in one buffer, as csrc/cpu/encode_interests.h says; window; hidden width; positions_in_values."""
    attention = extractor.attention
    if attention is None:
        return None, 0, 0, False
    parts = [
        part for weight, bias in (attention.up, attention.down) for part in (pack_linear(weight), pack_vector(bias))
    ]
    window, hidden = attention.positions.shape[0], attention.up[1].shape[0]
    weights = join(*parts, *(pack_vector(position) for position in attention.positions))
    return weights, window, hidden, attention.positions_in_values
