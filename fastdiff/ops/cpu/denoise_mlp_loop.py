"""denoise_mlp_loop in C++ (csrc/cpu/denoise_mlp_loop.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.cpu.packing import PANEL, join, pack_linear, pack_vector, padded
from fastdiff.ops.denoise_mlp_loop import MLPSampler, MLPWeights
from fastdiff.ops.step_noise import step_noise
from fastdiff.per_object import packed

_ACTIVATIONS = {"gelu": 0, "relu": 1, "silu": 2, "tanh": 3}
_NO_NORM = -1.0


def denoise_mlp_loop(
    x_t: Tensor | None,
    sampler: MLPSampler,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    noise: Noise,
) -> Tensor:
    """See `fastdiff.ops.denoise_mlp_loop.denoise_mlp_loop_ref`; float32 only. Philox draws are made inside the loop,
    other ones are asked for before it, in the same order."""
    network, steps, dim = packed(sampler, _pack)
    if x_t is None and not isinstance(noise, PhiloxNoise):
        x_t = noise.draw(0)
    x_0: Tensor = torch.ops.fastdiff.denoise_mlp_loop.default(
        x_t, network, steps, dim, cond, uncond, guidance_scale, *step_noise(noise, sampler.coef).on_host()
    )
    return x_0


def _pack(sampler: MLPSampler) -> tuple[Tensor, Tensor, int]:
    """The network, the table of the steps, as csrc/cpu/denoise_mlp_loop.h says, and D."""
    n_steps, hidden = sampler.time.shape
    table = torch.zeros(n_steps, PANEL + padded(hidden))
    table[:, :3] = sampler.coef
    table[:, 3] = float(sampler.normalize_before)
    if n_steps and sampler.normalize_start:
        table[0, 3] = 1.0
    table[:, 4] = float(sampler.normalize)
    table[:, PANEL : PANEL + hidden] = sampler.time
    return packed(sampler.mlp, _pack_network), table, sampler.mlp.w_in.shape[1]


def _pack_network(mlp: MLPWeights) -> Tensor:
    """What the network is, then its weights."""
    hidden, dim = mlp.w_in.shape
    parts = [pack_linear(mlp.w_in[:, : dim // 2]), pack_linear(mlp.w_in[:, dim // 2 :])]
    for weight, bias in mlp.layers:
        parts += [pack_linear(weight), pack_vector(bias)]
    norm_eps = _NO_NORM
    if mlp.out_norm is not None:
        weight, bias, norm_eps = mlp.out_norm
        parts += [pack_vector(weight), pack_vector(bias)]
    widths = [dim, hidden, *(weight.shape[0] for weight, _ in mlp.layers)]
    header = torch.zeros(PANEL)
    facts = [len(mlp.layers), _ACTIVATIONS[mlp.activation], norm_eps, *widths][:PANEL]
    header[: len(facts)] = torch.tensor(facts)
    return join(header, *parts)
