"""DimeRec: Li et al., "DimeRec: A Unified Framework for Enhanced Sequential Recommendation via Generative Diffusion
Models" (WSDM 2025, arXiv 2408.12153).

Guidance extraction (GEM) turns a history s_0 .. s_{n-1} into K interest vectors, which guide a diffusion on the unit
sphere (DAM). With H_j = E[s_j] and learned positions P_j, j < n:

    g_k     = sum_j softmax_j(w_2 tanh(w_1 (H_j + P_j) + b_1) + b_2)_k H_j   "self_attention" (of Cen et al. 2020)
    g_k     = H_{n-K+k}                                                      "last_items": the last K items
    f       = MLP([x_t ; s_t ; g_1 .. g_K])                                  s_t: row t of a learned table, t = 1..T
    x_{t-1} = L2Norm(c_1 f + c_2 x_t + sigma_t z)                            Algorithm 2, with DDPM's posterior

and x_0 is scored against E by inner product. There is no public code and the paper leaves much open, so every choice is
a setting of `DimeRecConfig`; its defaults read the paper's Algorithm 2 as follows:

  - x_T is a standard normal draw put on the sphere (`normalize_start`);
  - c_1 and c_2 are DDPM's as printed, although the forward walk on the sphere has no sqrt(alphas_cumprod);
  - sigma_t is the square root of the posterior variance; the box prints the variance itself (`noise_scale="literal"`);
  - x is normalised after each update; the follow-up ADIGRec does so at the start of each step and leaves x_0 as it
    comes (`normalize="before"`);
  - the softmax runs over the items of a history; values carry no positions (`positions_in_values`), as in ComiRec;
  - an empty history has g = 0, and where "last_items" finds fewer than K items, the older places are zero;
  - the step table has T + 1 rows, and the chain's index t (from 0) reads row t + 1 (`step_offset`).

Restructured, equal up to rounding: GEM and its share of the first layer, W_g g + b, are worked out once per user; the
step table is taken through its share of that layer once per model. There is no classifier-free guidance.

Weights (the names are ours: no others exist): item_embeddings.weight [N + 1, D] with row 0 the pad row;
step_embeddings.weight [T + 1, D]; with "self_attention" position_embeddings.weight [L, D], interest.w_1 (D -> 4 D) and
interest.w_2 (4 D -> K); and denoiser.0, denoiser.1, .. the linear layers of the MLP, the first of which reads its input
in the order of `mlp_input_order`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastdiff.config import DimeRecConfig
from fastdiff.errors import InvalidArgument
from fastdiff.models.base import Histories, Model, OnStep, Weights
from fastdiff.noise import Noise
from fastdiff.ops.backend import BoundOp
from fastdiff.ops.denoise_mlp_loop import MLPSampler, MLPWeights, denoise_mlp_loop
from fastdiff.ops.encode_interests import InterestAttention, InterestExtractor, encode_interests
from fastdiff.ops.philox_normals import philox_normals
from fastdiff.ops.row_linear import LinearWeights, row_linear
from fastdiff.ops.sampler_step import sampler_step
from fastdiff.per_object import PerObject
from fastdiff.plan import StepPlan


@dataclass(frozen=True)
class DimeRecState:
    """cond [R, H], the interests' share of the first layer, with its bias; sampler: the network and the plan."""

    cond: Tensor
    sampler: MLPSampler


class DimeRec(Model[Tensor, DimeRecState]):
    """The condition is the interests g `[B, K, D]`."""

    ops = (sampler_step, philox_normals, encode_interests, row_linear, denoise_mlp_loop)
    item_table_key = "item_embeddings.weight"

    config: DimeRecConfig

    def __init__(self, config: DimeRecConfig, weights: Weights, bound: dict[str, BoundOp] | None = None) -> None:
        super().__init__(config, weights, bound)
        blocks = _input_blocks(config)
        first, *rest = ((weights[f"denoiser.{i}.weight"], weights[f"denoiser.{i}.bias"]) for i in range(_depth(config)))
        self._first = LinearWeights(first[0][:, blocks["g"]].contiguous(), first[1])
        self.mlp = MLPWeights(first[0][:, blocks["x"]].contiguous(), tuple(rest), config.mlp_activation)
        self._samplers: PerObject[MLPSampler] = PerObject()
        self._time_table = weights["step_embeddings.weight"] @ first[0][:, blocks["t"]].T
        attention = None
        if config.guidance_extractor == "self_attention":
            up, down = (
                (weights[f"interest.{name}.weight"], weights[f"interest.{name}.bias"]) for name in ("w_1", "w_2")
            )
            positions = weights["position_embeddings.weight"]
            attention = InterestAttention(positions, up, down, config.positions_in_values)
        self._extractor = InterestExtractor(config.n_interests, config.pad_id, attention)

    @classmethod
    def weight_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        dim, interests = config.hidden_size, config.n_interests
        shapes: dict[str, tuple[int, ...]] = {
            "item_embeddings.weight": (config.n_rows, dim),
            "step_embeddings.weight": (config.schedule.num_train_timesteps + 1, dim),
        }
        if config.guidance_extractor == "self_attention":
            shapes["position_embeddings.weight"] = (config.max_seq_len, dim)
            shapes |= {"interest.w_1.weight": (4 * dim, dim), "interest.w_1.bias": (4 * dim,)}
            shapes |= {"interest.w_2.weight": (interests, 4 * dim), "interest.w_2.bias": (interests,)}
        widths = ((interests + 2) * dim, *config.mlp_widths, dim)
        for i in range(_depth(config)):
            shapes |= {f"denoiser.{i}.weight": (widths[i + 1], widths[i]), f"denoiser.{i}.bias": (widths[i + 1],)}
        return shapes

    # --- guidance extraction ------------------------------------------------------------------------------------------

    def encode(self, histories: Histories, item_table: Tensor) -> Tensor:
        """g `[B, K, D]`."""
        g: Tensor = self.bound["encode_interests"](histories.items, histories.lengths, item_table, self._extractor)
        return g

    # --- the diffusion on the sphere ----------------------------------------------------------------------------------

    def prepare(self, condition: Tensor, plan: StepPlan, guidance_scale: float) -> DimeRecState:
        if guidance_scale != 1.0:
            raise InvalidArgument(
                f"dimerec: guidance_scale must be 1 (got {guidance_scale:g}); the method has no unconditional branch"
            )
        cond = self.bound["row_linear"](condition.flatten(1), self._first)
        return DimeRecState(cond, self._samplers.get(plan, self._sampler))

    def _sampler(self, plan: StepPlan) -> MLPSampler:
        """The network with a plan: the first layer's share of its step embeddings `[S, H]`, and its coefficients."""
        offset = self.config.step_offset
        rows = self.timesteps_of(plan, -offset, self._time_table.shape[0] - 1 - offset) + offset
        before, start = self.config.normalize == "before", self.config.normalize_start
        return MLPSampler(self.mlp, self._time_table[rows], plan.coef, plan.normalize, before, start)

    def repeat(self, state: DimeRecState, num_samples: int) -> DimeRecState:
        return replace(state, cond=state.cond.repeat_interleave(num_samples, dim=0))

    def start(self, noise: Noise) -> Tensor:
        x_T = super().start(noise)
        return F.normalize(x_T, dim=-1) if self.config.normalize_start else x_T

    def denoise(self, x_t: Tensor, step: int, state: DimeRecState) -> Tensor:
        return self.mlp(x_t, state.cond, state.sampler.time[step])

    def sample(self, state: DimeRecState, plan: StepPlan, noise: Noise, on_step: OnStep | None = None) -> Tensor:
        if on_step is not None:
            return super().sample(state, plan, noise, on_step)
        loop = self.bound["denoise_mlp_loop"]
        x_0: Tensor = loop(None, state.sampler, state.cond, None, 1.0, noise)  # None: the noise's draw 0
        return x_0

    def before_step(self, x_t: Tensor) -> Tensor:
        """The follow-up's reading: each step starts from x / |x|, and the last one's result stays as it is."""
        return F.normalize(x_t, dim=-1) if self.config.normalize == "before" else x_t

    # --- plans --------------------------------------------------------------------------------------------------------

    def plan(
        self,
        scheduler: str,
        num_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float = 0.0,
        spacing: str = "trailing",
    ) -> StepPlan:
        plan = super().plan(scheduler, num_steps, timesteps, eta, spacing)
        if self.config.noise_scale == "sqrt":
            return plan
        variance = plan.coef * plan.coef.new_tensor([1.0, 1.0, 0.0])
        variance[:, 2] = plan.coef[:, 2] ** 2
        return replace(plan, coef=variance, name=f"{plan.name}-literal")

    @property
    def normalizes(self) -> bool:
        return self.config.normalize == "after"


def _depth(config: DimeRecConfig) -> int:
    return len(config.mlp_widths) + 1


def _input_blocks(config: DimeRecConfig) -> dict[str, slice]:
    """The columns of the denoiser's first layer that read x_t, the step embedding and the interests."""
    dim = config.hidden_size
    width = {"x": dim, "t": dim, "g": config.n_interests * dim}
    blocks, start = {}, 0
    for name in config.mlp_input_order:
        blocks[name] = slice(start, start + width[name])
        start += width[name]
    return blocks
