"""sampler_step in C++ (csrc/cpu/sampler_step.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument


def sampler_step(
    model_output: Tensor,
    x_t: Tensor,
    noise: Tensor | None,
    c_out: float,
    c_xt: float,
    c_noise: float,
    normalize: bool = False,
) -> Tensor:
    """See `fastdiff.ops.sampler_step.sampler_step_ref`; float32 only."""
    if noise is None and c_noise:
        raise InvalidArgument(f"sampler_step: noise must be given where c_noise is not 0 (got None with {c_noise:g})")
    step: Tensor = torch.ops.fastdiff.sampler_step.default(
        model_output, x_t, noise if c_noise else None, c_out, c_xt, c_noise, normalize
    )
    return step
