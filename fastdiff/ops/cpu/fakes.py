"""What the C++ ops return, in shape and dtype, for torch.export, torch.compile and opcheck."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("fastdiff::sampler_step")
def _sampler_step(
    model_output: Tensor,
    x_t: Tensor,
    noise: Tensor | None,
    c_out: float,
    c_xt: float,
    c_noise: float,
    normalize: bool,
) -> Tensor:
    return model_output.new_empty(model_output.shape)


@torch.library.register_fake("fastdiff::philox_normals")
def _philox_normals(seed: int, row_key: Tensor, sample: Tensor, first_draw: int, n_draws: int, dim: int) -> Tensor:
    return row_key.new_empty((n_draws, row_key.shape[0], dim), dtype=torch.float32)
