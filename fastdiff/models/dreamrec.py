"""DreamRec: Yang et al., "Generate What You Prefer: Reshaping Sequential Recommendation via Guided Diffusion" (NeurIPS
2023, arXiv 2310.20453).

A history s_0 .. s_{n-1} (n <= L, right-padded with row N) is encoded by one causal transformer block, whose last row is
the guidance h; a denoiser predicts x_start, the embedding of the next item, under classifier-free guidance:

    e_j = (E[s_j] + P_j) 1[s_j != N]        q = W_q LN1(e_{n-1}) + b_q    k_j = W_k e_j + b_k    v_j = W_v e_j + b_v
    y   = sum_j softmax_j(q . k_j / sqrt(D)) v_j + LN1(e_{n-1})           z = LN2(y)
    h   = LN3(o)                            o = LN_ff(W_2 relu(W_1 z + b_1) + b_2 + z) 1[s_{n-1} != N]
    f(x_t, h, t) = diffuser([x_t ; h ; tau(t)])                           tau(t) = step_mlp([sin ; cos](t))
    x_start = u + g (c - u)                 c = f(x_t, h, t)              u = f(x_t, null, t)    g = 1 + w

sampled by DDPM with sigma_t = sqrt(posterior variance) and no noise at t = 0; scores are x_0 . E.

What the authors' code does beyond its paper, and so does this:
  - a key whose features sum to exactly 0 is masked, and so is the attention of a query whose LN1 row does; where every
    key of a row is masked, the softmax is uniform over all L places (padding and future are masked by one number);
  - the residual of the attention is LN1(e), that of the feed-forward is z, and attention has no output projection;
  - an empty history is one pad: o = 0, so h = LN3.bias exactly.

What is restructured, equal up to rounding:
  - h needs one query and the keys up to it: the other rows of the block are not computed. W_k moves to the query and
    W_v out of the sum (softmax ignores q . b_k; its weights sum to 1), so that no key or value is ever formed;
  - the first layer of the diffuser is split by columns: W_h h + b once per user, as the encoder's last layer, and
    W_t tau(t) once per step;
  - "mlp1" is one linear layer, so its ops fold guidance into the condition: u + g (c - u) of W_h h + b and
    W_h null + b; "mlp2" runs a second, unconditional branch behind its first layer.

Weights: the authors' names. s_fc, emb_mlp and diff_mlp are in their checkpoints and are never read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.closed_form import AffineDenoiser
from fastdiff.config import DreamRecConfig
from fastdiff.models.base import Histories, Model, OnStep, Weights
from fastdiff.models.layers import sinusoidal_embedding
from fastdiff.noise import Noise
from fastdiff.ops.backend import BoundOp
from fastdiff.ops.denoise_mlp_loop import MLPSampler, MLPWeights, denoise_mlp_loop, denoise_mlp_step_ref
from fastdiff.ops.encode_last_item import LastItemBlock, encode_last_item
from fastdiff.ops.philox_normals import philox_normals
from fastdiff.ops.sample_affine import sample_affine
from fastdiff.ops.sampler_step import sampler_step
from fastdiff.per_object import PerObject
from fastdiff.plan import StepPlan


class DreamRecState(NamedTuple):
    """What the denoiser reads besides x_t: the shares of its first layer that do not depend on x_t.

    cond     [R, H] with the bias     uncond  [1, H], or None where guidance is off
    sampler  the network and the plan
    """

    cond: Tensor
    uncond: Tensor | None
    guidance_scale: float
    sampler: MLPSampler


class DreamRec(Model[Tensor, DreamRecState]):
    """The condition is c = W_h h + b `[B, H]`, what the first layer of the diffuser makes of h."""

    ops = (sampler_step, philox_normals, encode_last_item, denoise_mlp_loop, sample_affine)
    item_table_key = "item_embeddings.weight"

    config: DreamRecConfig

    def __init__(self, config: DreamRecConfig, weights: Weights, bound: dict[str, BoundOp] | None = None) -> None:
        super().__init__(config, weights, bound)
        dim = config.hidden_size
        first = weights["diffuser.0.weight"]
        w_t = first[:, 2 * dim :]
        head = (first[:, dim : 2 * dim].contiguous(), weights["diffuser.0.bias"])
        self._uncond = F.linear(weights["none_embedding.weight"], *head)
        layers: tuple[tuple[Tensor, Tensor], ...] = ()
        if config.denoiser == "mlp2":
            layers = ((weights["diffuser.2.weight"], weights["diffuser.2.bias"]),)
        self.mlp = MLPWeights(first[:, :dim].contiguous(), layers, "gelu")
        # one row more than the chain has steps: the shifted grids of TDM and PreferDiff feed T itself
        timesteps = torch.arange(config.schedule.num_train_timesteps + 1, device=self.device)
        self._time_table = self._embed_time(timesteps) @ w_t.T
        self._samplers: PerObject[MLPSampler] = PerObject()

        def layer(name: str) -> tuple[Tensor, Tensor]:
            weight = weights[f"{name}.weight"]
            return (weight.squeeze(-1) if weight.ndim == 3 else weight), weights[f"{name}.bias"]

        self._block = LastItemBlock(
            weights["positional_embeddings.weight"],
            LastItemBlock.fold_key(layer("mh_attn.linear_q"), weights["mh_attn.linear_k.weight"]),
            layer("mh_attn.linear_v"),
            layer("feed_forward.w_1"),
            layer("feed_forward.w_2"),
            layer("ln_1"),
            layer("ln_2"),
            layer("feed_forward.layer_norm"),
            layer("ln_3"),
            config.pad_id,
            head,
        )

    @classmethod
    def weight_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        dim = config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "item_embeddings.weight": (config.n_rows, dim),
            "none_embedding.weight": (1, dim),
            "positional_embeddings.weight": (config.max_seq_len, dim),
        }
        for norm in ("ln_1", "ln_2", "ln_3", "feed_forward.layer_norm"):
            shapes |= {f"{norm}.weight": (dim,), f"{norm}.bias": (dim,)}
        for part in ("q", "k", "v"):
            shapes |= {f"mh_attn.linear_{part}.weight": (dim, dim), f"mh_attn.linear_{part}.bias": (dim,)}
        for part in ("w_1", "w_2"):
            shapes |= {f"feed_forward.{part}.weight": (dim, dim, 1), f"feed_forward.{part}.bias": (dim,)}
        shapes |= {"step_mlp.1.weight": (2 * dim, dim), "step_mlp.1.bias": (2 * dim,)}
        shapes |= {"step_mlp.3.weight": (dim, 2 * dim), "step_mlp.3.bias": (dim,)}
        hidden = 2 * dim if config.denoiser == "mlp2" else dim
        shapes |= {"diffuser.0.weight": (hidden, 3 * dim), "diffuser.0.bias": (hidden,)}
        if config.denoiser == "mlp2":
            shapes |= {"diffuser.2.weight": (dim, hidden), "diffuser.2.bias": (dim,)}
        return shapes

    @classmethod
    def unused_weights(cls) -> tuple[str, ...]:
        return ("s_fc.", "emb_mlp.", "diff_mlp.")

    # --- the encoder ------------------------------------------------------------------------------------------------

    def encode(self, histories: Histories, item_table: Tensor) -> Tensor:
        """c `[B, H]`, from the last row h of the transformer block."""
        c: Tensor = self.bound["encode_last_item"](histories.items, histories.lengths, item_table, self._block)
        return c

    # --- the denoiser -----------------------------------------------------------------------------------------------

    def prepare(self, condition: Tensor, plan: StepPlan, guidance_scale: float) -> DreamRecState:
        sampler = self._samplers.get(plan, self._sampler)
        return DreamRecState(condition, None if guidance_scale == 1.0 else self._uncond, guidance_scale, sampler)

    def repeat(self, state: DreamRecState, num_samples: int) -> DreamRecState:
        return state._replace(cond=state.cond.repeat_interleave(num_samples, dim=0))

    def denoise(self, x_t: Tensor, step: int, state: DreamRecState) -> Tensor:
        scale, time = state.guidance_scale, state.sampler.time[step]
        return denoise_mlp_step_ref(x_t, self.mlp, state.cond, state.uncond, scale, time)

    def sample(self, state: DreamRecState, plan: StepPlan, noise: Noise, on_step: OnStep | None = None) -> Tensor:
        if on_step is not None:
            return super().sample(state, plan, noise, on_step)
        loop = self.bound["denoise_mlp_loop"]
        x_0: Tensor = loop(None, state.sampler, state.cond, state.uncond, state.guidance_scale, noise)  # None: draw 0
        return x_0

    def affine(self, state: DreamRecState, plan: StepPlan) -> AffineDenoiser | None:
        if not self.mlp.is_linear:
            return None
        return AffineDenoiser(self.mlp.w_in, state.cond, state.sampler.time, state.uncond, state.guidance_scale)

    def _sampler(self, plan: StepPlan) -> MLPSampler:
        """The network with a plan: W_t tau(t) `[S, H]` of its timesteps, and its coefficients."""
        time = self._time_table[self.timesteps_of(plan, 0, self._time_table.shape[0] - 1)]
        return MLPSampler(self.mlp, time, plan.coef, plan.normalize)

    def _embed_time(self, timesteps: Tensor) -> Tensor:
        """tau(t) `[S, D]`. The sinusoids are float32, as the authors compute them, whatever the weights are."""
        w = self.weights
        tau = sinusoidal_embedding(timesteps, self.config.hidden_size, "sin_cos", "half_minus_one").to(self.dtype)
        tau = F.gelu(F.linear(tau, w["step_mlp.1.weight"], w["step_mlp.1.bias"]))
        return F.linear(tau, w["step_mlp.3.weight"], w["step_mlp.3.bias"])
