"""row_linear: one linear layer over rows, y = x W^T + b."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.backend import Op


@dataclass(frozen=True)
class LinearWeights:
    """weight [H', H], bias [H']; never changed, so that a backend may keep its own form of them."""

    weight: Tensor
    bias: Tensor


def row_linear_ref(x: Tensor, layer: LinearWeights) -> Tensor:
    """y = x W^T + b. x [R, H] in the dtype of the weights; returns [R, H']."""
    return F.linear(x, layer.weight, layer.bias)


row_linear = Op(
    "row_linear",
    row_linear_ref,
    {"cpu": "fastdiff.ops.cpu.row_linear:row_linear", "triton": "fastdiff.kernels.row_linear:row_linear"},
)
