"""sampler_step: the one affine update that every sampler is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.backend import Op


def sampler_step_ref(
    model_output: Tensor,
    x_t: Tensor,
    noise: Tensor | None,
    c_out: float,
    c_xt: float,
    c_noise: float,
    normalize: bool = False,
) -> Tensor:
    """x_prev = c_out * model_output + c_xt * x_t + c_noise * noise, then x_prev / |x_prev| where `normalize`.

    model_output, x_t  [R, D] floating, one dtype and device
    noise              [R, D] standard normal draws; None where c_noise is 0
    normalize          divide each row by its L2 norm (norms under 1e-12 count as 1e-12)
    Returns [R, D], contiguous.
    """
    x_prev = c_out * model_output
    if c_xt != 0.0:
        x_prev = x_prev + c_xt * x_t
    if c_noise != 0.0 and noise is not None:
        x_prev = x_prev + c_noise * noise
    if normalize:
        x_prev = torch.nn.functional.normalize(x_prev, p=2.0, dim=-1)
    return x_prev.contiguous()


sampler_step = Op("sampler_step", sampler_step_ref)
