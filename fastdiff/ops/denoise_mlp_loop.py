"""denoise_mlp_loop: all steps of a sampler whose denoiser is an MLP (DreamRec, TA-Rec, DimeRec, ADRec's "mlp")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.noise import Noise
from fastdiff.ops.backend import Op
from fastdiff.ops.sampler_step import sampler_step_ref

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class MLPWeights:
    """A denoiser MLP whose first layer is split by what it reads: the state, the condition, the time.

        h = w_in x_t + cond + time;  for each (weight, bias) of `layers`: h = weight act(h) + bias;  then `out_norm`

    w_in      [H, D], the columns of the first layer that read x_t
    layers    (weight [H', H], bias [H']) of the layers after the first; empty makes the denoiser linear
    activation  a key of `ACTIVATIONS`, applied between layers
    out_norm  (weight [D], bias [D], eps) of a final LayerNorm, or None
    """

    w_in: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    activation: str = "gelu"
    out_norm: tuple[Tensor, Tensor, float] | None = None

    @property
    def is_linear(self) -> bool:
        return not self.layers and self.out_norm is None

    def __call__(self, x_t: Tensor, cond: Tensor, time: Tensor) -> Tensor:
        h = x_t @ self.w_in.T + cond + time
        act = ACTIVATIONS[self.activation]
        for weight, bias in self.layers:
            h = F.linear(act(h), weight, bias)
        if self.out_norm is not None:
            weight, bias, eps = self.out_norm
            h = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
        return h


@dataclass(frozen=True)
class MLPSampler:
    """Everything of a run that is the same for all users: the network, and what each step of a plan reads.

    Made once per network and plan, and never changed, so that a backend may keep its own form of it.

    mlp   the network
    time  [S, H] its first layer's share of each step's time embedding
    coef  [S, 3] float64, see `StepPlan`
    normalize, normalize_before, normalize_start  put x on the unit sphere after every step; before it; x_T alone
    """

    mlp: MLPWeights
    time: Tensor
    coef: Tensor
    normalize: bool = False
    normalize_before: bool = False
    normalize_start: bool = False


def guided(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: u + g (c - u) (Ho & Salimans 2022); g = 1 is off."""
    return uncond + guidance_scale * (cond - uncond)


def _fold(mlp: MLPWeights, cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
    """(cond, uncond); of a linear network, guidance of its outputs is guidance of its conditions: (guided, None)."""
    if uncond is None or not mlp.is_linear:
        return cond, uncond
    return guided(uncond, cond, guidance_scale), None


def denoise_mlp_step_ref(
    x_t: Tensor, mlp: MLPWeights, cond: Tensor, uncond: Tensor | None, guidance_scale: float, time: Tensor
) -> Tensor:
    """One call of the denoiser: mlp(x_t, cond, time), guided where there is an `uncond`.

    Arguments as in `denoise_mlp_loop_ref`, but time is the step's own `[H]`. Returns [R, D].
    """
    cond, uncond = _fold(mlp, cond, uncond, guidance_scale)
    output = mlp(x_t, cond, time)
    return output if uncond is None else guided(mlp(x_t, uncond, time), output, guidance_scale)


def denoise_mlp_loop_ref(
    x_t: Tensor | None,
    sampler: MLPSampler,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    noise: Noise,
) -> Tensor:
    """Run S steps: output_i = mlp(x_i, cond, time[i]); x_{i+1} = sampler_step(output_i, x_i, noise 1 + i, *coef[i]).

    x_t             [R, D] the start, x_T; None is draw 0 of `noise`
    cond            [R, H] the first layer's share of the condition, with its bias
    uncond          [R, H] or [1, H] the same for the unconditional pass; None where guidance is off
    guidance_scale  g of u + g (c - u); used only with `uncond`
    noise           draw 1 + i is asked for at step i where coef[i, 2] is not 0
    Returns x_0 [R, D].
    """
    cond, uncond = _fold(sampler.mlp, cond, uncond, guidance_scale)
    x_t = noise.draw(0) if x_t is None else x_t
    x_t = F.normalize(x_t, dim=-1) if sampler.normalize_start else x_t
    for i, (c_out, c_xt, c_noise) in enumerate(sampler.coef.tolist()):
        x_t = F.normalize(x_t, dim=-1) if sampler.normalize_before else x_t
        output = denoise_mlp_step_ref(x_t, sampler.mlp, cond, uncond, guidance_scale, sampler.time[i])
        draw = noise.draw(1 + i) if c_noise else None
        x_t = sampler_step_ref(output, x_t, draw, c_out, c_xt, c_noise, sampler.normalize)
    return x_t


denoise_mlp_loop = Op(
    "denoise_mlp_loop",
    denoise_mlp_loop_ref,
    {
        "cpu": "fastdiff.ops.cpu.denoise_mlp_loop:denoise_mlp_loop",
        "triton": "fastdiff.kernels.denoise_mlp_loop:denoise_mlp_loop",
    },
)
