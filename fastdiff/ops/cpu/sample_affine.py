"""sample_affine in C++ (csrc/cpu/sample_affine.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.closed_form import ClosedForm
from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.cpu.packing import join, pack_linear, pack_vector
from fastdiff.ops.cpu.philox_normals import signed
from fastdiff.per_object import packed


def sample_affine(form: ClosedForm, cond: Tensor, uncond: Tensor | None, guidance_scale: float, noise: Noise) -> Tensor:
    """See `fastdiff.ops.sample_affine.sample_affine_ref`; float32 only. Philox draws are made inside."""
    weights = packed(form, _pack)
    x_0: Tensor
    if isinstance(noise, PhiloxNoise):
        x_0 = torch.ops.fastdiff.sample_affine.default(
            cond, uncond, guidance_scale, weights, None, signed(noise.seed), noise.row_key, noise.sample
        )
    else:
        x_0 = torch.ops.fastdiff.sample_affine.default(
            cond, uncond, guidance_scale, weights, noise.draw(0), 0, None, None
        )
    return x_0


def _pack(form: ClosedForm) -> Tensor:
    return join(pack_linear(form.gain), pack_vector(form.offset), pack_linear(form.factor))
