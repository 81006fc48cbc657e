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
