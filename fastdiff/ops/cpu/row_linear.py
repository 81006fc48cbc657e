"""row_linear in C++ (csrc/cpu/row_linear.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.cpu.packing import join, pack_linear, pack_vector
from fastdiff.ops.row_linear import LinearWeights
from fastdiff.per_object import packed


def row_linear(x: Tensor, layer: LinearWeights) -> Tensor:
    """See `fastdiff.ops.row_linear.row_linear_ref`; float32 only. A row's bits do not depend on the other rows."""
    y: Tensor = torch.ops.fastdiff.row_linear.default(x, packed(layer, _pack), layer.bias.shape[0])
    return y


def _pack(layer: LinearWeights) -> Tensor:
    return join(pack_linear(layer.weight), pack_vector(layer.bias))
