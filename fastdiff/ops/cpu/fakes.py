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


@torch.library.register_fake("fastdiff::denoise_attention_loop")
def _denoise_attention_loop(x_t: Tensor, *_: object) -> Tensor:
    return x_t.new_empty(x_t.shape)


@torch.library.register_fake("fastdiff::denoise_mlp_loop")
def _denoise_mlp_loop(
    x_t: Tensor | None, weights: Tensor, widths: list[int], activation: int, norm_eps: float, cond: Tensor, *_: object
) -> Tensor:
    return cond.new_empty((cond.shape[0], widths[0]))
