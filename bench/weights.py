"""Drawn weights for a config: what tests and benches run on where no trained model is needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.config import ModelConfig
from fastdiff.models import model_class

WeightsOf = Callable[[ModelConfig], dict[str, Tensor]]
"""Where a case's weights come from."""


def random_weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict with the names and shapes of `config`, at the scale of trained weights.

    1-D tensors named "weight" (of norms) are drawn around 1, other 1-D tensors (biases) around 0; embedding tables have
    standard deviation 0.3, matrices 1 / sqrt(columns). The draws are float32 whatever the dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in model_class(config.method).weight_shapes(config).items():
        draw = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            draw = 0.1 * draw + (1.0 if name.endswith("weight") else 0.0)
        elif "embedding" in name:
            draw = 0.3 * draw
        else:
            draw = draw / shape[1] ** 0.5
        weights[name] = draw.to(dtype)
    return weights
