"""sampler_step: the one affine update that every sampler is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
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

    model_output, x_t  [R, D] floating, one dtype and device; half precision is computed in float32 and rounded once
    noise              [R, D] standard normal draws; may be None where c_noise is 0, and is not read there
    normalize          divide each row by its L2 norm (norms under 1e-12 count as 1e-12)
    Returns [R, D], contiguous, in the dtype of `model_output`. Raises InvalidArgument where noise is missing.
    """
    wide = torch.promote_types(model_output.dtype, torch.float32)
    x_prev = c_out * model_output.to(wide)
    if c_xt != 0.0:
        x_prev = x_prev + c_xt * x_t.to(wide)
    if c_noise != 0.0:
        if noise is None:
            raise InvalidArgument(
                f"sampler_step: noise must be given where c_noise is not 0 (got None with {c_noise:g})"
            )
        x_prev = x_prev + c_noise * noise.to(wide)
    if normalize:
        x_prev = torch.nn.functional.normalize(x_prev, p=2.0, dim=-1)
    return x_prev.to(model_output.dtype).contiguous()


sampler_step = Op(
    "sampler_step",
    sampler_step_ref,
    {"cpu": "fastdiff.ops.cpu.sampler_step:sampler_step", "triton": "fastdiff.kernels.sampler_step:sampler_step"},
)
