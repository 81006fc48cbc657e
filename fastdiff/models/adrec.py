"""ADRec: per-token diffusion over a clean history, conditioned by a causal encoder.

Paper: "Unlocking the Power of Diffusion Models in Sequential Recommendation: A Simple and Effective Approach"
(KDD 2025, arXiv 2505.19544). Where the paper is silent, what the authors' published inference does is meant here.

Equations, for a history s_1 .. s_n padded on the left to L slots (slots are counted from 0):

    condition        c = CAM(LN(E[s]))                              causal transformer, one row per slot
    slots j < L - 1  hold the next slot's item, clean, at t = 0:    y_j = E[s at slot j + 1], E[0] at pad slots
    slot L - 1       holds the sample x_t at its own t
    denoiser         x_start = ADM(c + lambda (y + tau(t)))         causal transformer; or an MLP, slot by slot
    time             tau(t) = W_2 silu(W_1 sinusoid(1000 t / T) + b_1) + b_2
    update           x_prev = c_1 x_start + c_2 x_t + sqrt(beta_t) z,    no noise at t = 0
    guidance         u + g (c - u), u the output where the condition is zero in every slot
    score            x_0 . E^T

Both transformers are post-norm: h = LN(x + attention(x)), out = LN(h + W_2 gelu_tanh(W_1 h)), LayerNorm eps 1e-12.

What is constant over the steps is computed once. Attention is causal and the slots before the last are clean, so the
encoder, the denoiser's prefix and its keys and values do not change: a step is one token. Of the prefix in the
denoiser's last block only keys and values are needed; of the encoder's last block, under the MLP decoder, one row.

Padding. A real slot attends to the pads before it; `fastdiff.ops.causal_transformer` says how, and why all of a user's
pads are one key.

Shapes: B users, L window, n longest history of the batch, D hidden, H heads, G passes (2 under guidance), S steps,
R = B x samples rows, N tokens of all prefixes together (packed, without padding).

    encode   items [B, n] -> conditions [N, D] of all slots, c_last [B, D]
    prepare  keys and values of the slots before the last, [blocks, G, N - B, 2 D]; time [S, D]
    denoise  x_t [R, D] -> x_start [R, D]

Weights (the authors' names; * is a block number):

    item_embedding.weight [N + 1, D]         E; row 0, the pad, is not zero, and their ranking can recommend it
    hist_norm.{weight, bias} [D]
    diffu.ag_encoder.transformer_blocks.*    CAM
    diffu.net.decoder.transformer_blocks.*   ADM
        .attention.linear_layers.{0, 1, 2}   queries, keys, values      .attention.w_layer   output projection
        .feed_forward.{w_1, w_2}                                        .{input, output}_sublayer.norm
    diffu.net.decoder.{0, 2, 3}              the MLP decoder: Linear D -> 4 D, SiLU, Linear 4 D -> D, LN (eps 1e-5)
    diffu.net.time_embed.{0, 2}              W_1, W_2 of tau

Quirks kept: sigma is sqrt(beta_t), not the posterior's; there are no positions; `geodesic` puts targets and, after each
update, x on the unit sphere; the sinusoids are float32 whatever the dtype of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.config import ADRecConfig
from fastdiff.models.base import Histories, Model, OnStep, Weights
from fastdiff.models.layers import sinusoidal_embedding
from fastdiff.noise import Noise
from fastdiff.ops.backend import BoundOp
from fastdiff.ops.causal_transformer import BlockWeights, Pads
from fastdiff.ops.denoise_attention_loop import CausalPrefix, denoise_attention_loop, denoise_attention_step_ref
from fastdiff.ops.denoise_mlp_loop import MLPSampler, MLPWeights, denoise_mlp_loop, denoise_mlp_step_ref
from fastdiff.ops.encode_causal_history import encode_causal_history
from fastdiff.ops.prepare_causal_prefix import prepare_causal_prefix
from fastdiff.ops.row_linear import LinearWeights, row_linear
from fastdiff.per_object import PerObject
from fastdiff.plan import StepPlan

NORM_EPS = 1e-12
MLP_NORM_EPS = 1e-5


@dataclass(frozen=True)
class ADRecCondition:
    """What was encoded; rows [N, D], c at every slot, packed (none under the MLP decoder); last [B, D], at the last."""

    histories: Histories
    item_table: Tensor
    rows: Tensor
    last: Tensor


@dataclass(frozen=True)
class AttentionState:
    """prefix: what the last slot attends to; time [S, D], lambda tau(t) of each step."""

    prefix: CausalPrefix
    time: Tensor
    guidance_scale: float


@dataclass(frozen=True)
class MLPState:
    """cond [R, 4 D] and uncond [1, 4 D]: what each adds to the first layer; sampler: the network and the plan."""

    cond: Tensor
    uncond: Tensor | None
    guidance_scale: float
    sampler: MLPSampler


ADRecState = AttentionState | MLPState


class ADRec(Model[ADRecCondition, ADRecState]):
    """ADRec with either decoder; see the module's docstring."""

    ops = (
        *Model.ops,
        encode_causal_history,
        prepare_causal_prefix,
        row_linear,
        denoise_mlp_loop,
        denoise_attention_loop,
    )
    item_table_key = "item_embedding.weight"
    config: ADRecConfig

    def __init__(self, config: ADRecConfig, weights: Weights, bound: dict[str, BoundOp] | None = None) -> None:
        super().__init__(config, weights, bound)
        self.lambda_ = config.lambda_uncertainty
        self.clean_time = self.lambda_ * self.time_embedding(torch.zeros(1, device=self.device))[0]
        pad_item = self.item_table[config.pad_id]

        self.hist_norm = (weights["hist_norm.weight"], weights["hist_norm.bias"], NORM_EPS)
        self.encoder = tuple(
            _block(weights, f"{_ENCODER}.{layer}", config.n_heads) for layer in range(config.n_encoder_layers)
        )
        self.encoder_pads = Pads.of(self.encoder, self.normed(pad_item).unsqueeze(0))
        self._times: PerObject[Tensor] = PerObject()
        if config.decoder == "mlp":
            self.mlp = self._mlp()
            self._samplers: PerObject[MLPSampler] = PerObject()
            first = "diffu.net.decoder.0"
            self.mlp_condition = LinearWeights(weights[f"{first}.weight"], weights[f"{first}.bias"])
            return
        self.decoder = tuple(
            _block(weights, f"{_DECODER}.{layer}", config.n_heads) for layer in range(config.n_decoder_layers)
        )
        pad_input = self.lambda_ * self.target(pad_item) + self.clean_time
        with_condition = self.encoder_pads.output[0] + pad_input
        self.decoder_pads = Pads.of(self.decoder, torch.stack([with_condition, pad_input]))

    @classmethod
    def weight_shapes(cls, config: ADRecConfig) -> dict[str, tuple[int, ...]]:
        dim = config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"item_embedding.weight": (config.n_rows, dim)}
        shapes |= _norm_shapes("hist_norm", dim)
        shapes |= _linear_shapes("diffu.net.time_embed.0", dim, 4 * dim)
        shapes |= _linear_shapes("diffu.net.time_embed.2", 4 * dim, dim)
        blocks = [f"{_ENCODER}.{layer}" for layer in range(config.n_encoder_layers)]
        if config.decoder == "mlp":
            shapes |= _linear_shapes("diffu.net.decoder.0", dim, 4 * dim)
            shapes |= _linear_shapes("diffu.net.decoder.2", 4 * dim, dim)
            shapes |= _norm_shapes("diffu.net.decoder.3", dim)
        else:
            blocks += [f"{_DECODER}.{layer}" for layer in range(config.n_decoder_layers)]
        for block in blocks:
            for part in ("linear_layers.0", "linear_layers.1", "linear_layers.2", "w_layer"):
                shapes |= _linear_shapes(f"{block}.attention.{part}", dim, dim)
            shapes |= _linear_shapes(f"{block}.feed_forward.w_1", dim, 4 * dim)
            shapes |= _linear_shapes(f"{block}.feed_forward.w_2", 4 * dim, dim)
            shapes |= _norm_shapes(f"{block}.input_sublayer.norm", dim)
            shapes |= _norm_shapes(f"{block}.output_sublayer.norm", dim)
        return shapes

    @property
    def normalizes(self) -> bool:
        return self.config.geodesic

    # --- pieces -------------------------------------------------------------------------------------------------------

    def normed(self, embeddings: Tensor) -> Tensor:
        """The history stream: LN(E[s])."""
        return F.layer_norm(embeddings, embeddings.shape[-1:], *self.hist_norm)

    def target(self, embeddings: Tensor) -> Tensor:
        """The target stream: E[s], on the unit sphere where the model is geodesic."""
        return F.normalize(embeddings, p=2.0, dim=-1) if self.config.geodesic else embeddings

    def time_embedding(self, timesteps: Tensor) -> Tensor:
        """tau [S, D] of training timesteps [S]."""
        fed = timesteps.to(torch.float32)
        if self.config.rescale_timesteps:
            fed = fed * (1000.0 / self.schedule.num_train_timesteps)
        sinusoid = sinusoidal_embedding(fed, self.config.hidden_size, "cos_sin", "half").to(self.dtype)
        return self._linear("diffu.net.time_embed.2", F.silu(self._linear("diffu.net.time_embed.0", sinusoid)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _mlp(self) -> MLPWeights:
        """W_1 (c + lambda (x + tau)) + b_1 = (lambda W_1) x + (W_1 c + b_1) + W_1 (lambda tau)."""
        weights, name = self.weights, "diffu.net.decoder"
        return MLPWeights(
            w_in=self.lambda_ * weights[f"{name}.0.weight"],
            layers=((weights[f"{name}.2.weight"], weights[f"{name}.2.bias"]),),
            activation="silu",
            out_norm=(weights[f"{name}.3.weight"], weights[f"{name}.3.bias"], MLP_NORM_EPS),
        )

    # --- the protocol -------------------------------------------------------------------------------------------------

    def encode(self, histories: Histories, item_table: Tensor) -> ADRecCondition:
        rows, last = self.bound["encode_causal_history"](
            histories.items,
            histories.lengths,
            item_table,
            self.hist_norm,
            self.encoder,
            self.encoder_pads,
            self.config.max_seq_len,
            self.config.decoder == "mlp",
        )
        return ADRecCondition(histories, item_table, rows, last)

    def prepare(self, condition: ADRecCondition, plan: StepPlan, guidance_scale: float) -> ADRecState:
        if self.config.decoder == "attention":
            time = self._times.get(plan, self._time_of)
            prefix = self.bound["prepare_causal_prefix"](
                condition.rows,
                condition.last,
                condition.histories.items,
                condition.histories.lengths,
                condition.item_table,
                self.lambda_,
                self.config.geodesic,
                self.clean_time,
                self.decoder,
                self.decoder_pads,
                self.config.max_seq_len,
                guidance_scale != 1.0,
            )
            return AttentionState(prefix, time, guidance_scale)
        uncond = None if guidance_scale == 1.0 else self.mlp_condition.bias.unsqueeze(0)
        cond = self.bound["row_linear"](condition.last, self.mlp_condition)
        return MLPState(cond, uncond, guidance_scale, self._samplers.get(plan, self._sampler))

    def _sampler(self, plan: StepPlan) -> MLPSampler:
        return MLPSampler(self.mlp, self._time_of(plan), plan.coef, plan.normalize)

    def _time_of(self, plan: StepPlan) -> Tensor:
        """lambda tau(t) [S, D] of each step, or what the MLP decoder's first layer makes of it [S, 4 D]."""
        time = self.lambda_ * self.time_embedding(self.timesteps_of(plan, 0, self.schedule.num_train_timesteps))
        return time @ self.mlp_condition.weight.T if self.config.decoder == "mlp" else time

    def repeat(self, state: ADRecState, num_samples: int) -> ADRecState:
        if isinstance(state, AttentionState):
            return state  # a user's samples share its prefix
        return replace(state, cond=state.cond.repeat_interleave(num_samples, dim=0))

    def denoise(self, x_t: Tensor, step: int, state: ADRecState) -> Tensor:
        if isinstance(state, AttentionState):
            return denoise_attention_step_ref(
                x_t, self.decoder, state.prefix, state.guidance_scale, self.lambda_, state.time[step]
            )
        scale, time = state.guidance_scale, state.sampler.time[step]
        return denoise_mlp_step_ref(x_t, self.mlp, state.cond, state.uncond, scale, time)

    def sample(self, state: ADRecState, plan: StepPlan, noise: Noise, on_step: OnStep | None = None) -> Tensor:
        if on_step is not None:
            return super().sample(state, plan, noise, on_step)
        x_0: Tensor
        scale = state.guidance_scale
        if isinstance(state, AttentionState):
            x_0 = self.bound["denoise_attention_loop"](
                self.start(noise),
                self.decoder,
                state.prefix,
                scale,
                self.lambda_,
                state.time,
                plan.coef,
                plan.normalize,
                noise,
            )
        else:
            x_0 = self.bound["denoise_mlp_loop"](None, state.sampler, state.cond, state.uncond, scale, noise)
        return x_0


# --- weights ----------------------------------------------------------------------------------------------------------

_ENCODER = "diffu.ag_encoder.transformer_blocks"
_DECODER = "diffu.net.decoder.transformer_blocks"


def _block(weights: Weights, name: str, n_heads: int) -> BlockWeights:
    """A block from the authors' parameters: three projections fused, the logits' scale folded into the queries."""

    def pair(part: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"]

    (w_q, b_q), (w_k, b_k), (w_v, b_v) = (pair(f"attention.linear_layers.{i}") for i in range(3))
    scale = math.sqrt(w_q.shape[0] / n_heads)
    out, up, down = pair("attention.w_layer"), pair("feed_forward.w_1"), pair("feed_forward.w_2")
    return BlockWeights(
        qkv_weight=torch.cat([w_q / scale, w_k, w_v]),
        qkv_bias=torch.cat([b_q / scale, b_k, b_v]),
        out_weight=out[0],
        out_bias=out[1],
        norm_1=pair("input_sublayer.norm"),
        up_weight=up[0],
        up_bias=up[1],
        down_weight=down[0],
        down_bias=down[1],
        norm_2=pair("output_sublayer.norm"),
        n_heads=n_heads,
        eps=NORM_EPS,
    )


def _linear_shapes(name: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def _norm_shapes(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
