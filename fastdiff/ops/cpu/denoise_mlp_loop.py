"""denoise_mlp_loop in C++ (csrc/cpu/denoise_mlp_loop.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.noise import GivenNoise, Noise, PhiloxNoise, StartNoise
from fastdiff.ops.cpu.packing import join, pack_linear, pack_vector, packed
from fastdiff.ops.cpu.philox_normals import signed
from fastdiff.ops.denoise_mlp_loop import MLPWeights

_ACTIVATIONS = {"gelu": 0, "relu": 1, "silu": 2, "tanh": 3}
_NO_NORM = -1.0


def denoise_mlp_loop(
    x_t: Tensor | None,
    mlp: MLPWeights,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    time: Tensor,
    coef: Tensor,
    normalize: bool,
    noise: Noise,
) -> Tensor:
    """See `fastdiff.ops.denoise_mlp_loop.denoise_mlp_loop_ref`; float32 only. Philox draws are made inside the loop,
    other ones are asked for before it, in the same order."""
    weights, widths, activation, norm_eps = packed(mlp, _pack)
    if isinstance(noise, StartNoise):
        x_t = noise.start if x_t is None else x_t
        noise = noise.rest
    given, first, seed = None, 0, 0
    row_key = sample = None
    if isinstance(noise, PhiloxNoise):
        seed, row_key, sample = signed(noise.seed), noise.row_key, noise.sample
    else:
        x_t = noise.draw(0) if x_t is None else x_t
        given, first = _all_draws(noise, coef)
    x_0: Tensor = torch.ops.fastdiff.denoise_mlp_loop.default(
        x_t,
        weights,
        widths,
        activation,
        norm_eps,
        cond,
        uncond,
        guidance_scale,
        time,
        coef,
        normalize,
        given,
        first,
        seed,
        row_key,
        sample,
    )
    return x_0


def _all_draws(noise: Noise, coef: Tensor) -> tuple[Tensor | None, int]:
    """The steps' draws as one tensor [.., R, D], and the place of step 0 in it; None where no step draws."""
    steps = coef[:, 2].nonzero().flatten().tolist()
    if not steps:
        return None, 0
    if isinstance(noise, GivenNoise):
        return noise.noise, 1
    draws = {step: noise.draw(1 + step) for step in steps}
    unread = draws[steps[0]]
    return torch.stack([draws.get(step, unread) for step in range(steps[-1] + 1)]), 0


def _pack(mlp: MLPWeights) -> tuple[Tensor, list[int], int, float]:
    """All weights in one buffer, as csrc/cpu/denoise_mlp_loop.h says; the widths; the activation; the norm's eps."""
    hidden, dim = mlp.w_in.shape
    parts = [pack_linear(mlp.w_in[:, : dim // 2]), pack_linear(mlp.w_in[:, dim // 2 :])]
    for weight, bias in mlp.layers:
        parts += [pack_linear(weight), pack_vector(bias)]
    norm_eps = _NO_NORM
    if mlp.out_norm is not None:
        weight, bias, norm_eps = mlp.out_norm
        parts += [pack_vector(weight), pack_vector(bias)]
    widths = [dim, hidden, *(weight.shape[0] for weight, _ in mlp.layers)]
    return join(*parts), widths, _ACTIVATIONS[mlp.activation], norm_eps
