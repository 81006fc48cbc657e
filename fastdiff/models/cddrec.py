"""CDDRec: Conditional Denoising Diffusion for sequential Recommendation (PAKDD 2024, arXiv 2304.11433).

    h_j   = LN(E[s_j] + P_j)               slots j = 0 .. L-1, left-padded: the newest item always stands at L-1
    c     = Encoder(h)_{L-1}               post-norm blocks, attention causal and over slots that hold an item
    mu_t  = Decoder(c, memory = Time[t])   the mean of x_{t-1}; x_t itself is never fed
    x_0   = mu_0 + sigma_0 z               inference runs t = 0 alone; sigma_0^2 is the posterior variance at t = 1

The authors' code evaluates this on whole (B, L, D) tensors. What is different here, each exact:

- Only slot L-1 is read, so the last encoder layer has one query row per user, and its keys need no projection:
  q . (W_k x_j + b_k) = (W_k^T q) . x_j + a constant that softmax ignores, and the value map follows the weighted sum.
- The decoder's memory is one row repeated, so cross-attention is W_o (W_v Time[t] + b_v) + b_o whatever the query:
  a table [T, D].
- The decoder's self-attention does not know t: it is run once per call, not once per step.
- A history without any item is the same for everybody, so its encoding is computed once, in the published arithmetic:
  all its keys carry the additive mask -10000, which leaves a softmax over the raw scores of all L slots, future ones
  included.

The published decoder layer is fed (B, L, D) where it expects (L, B, D): its self-attention runs over the users of the
batch. That is `batch_coupling = "published"`. With `"none"` each user is alone in it, where attention over one key is
W_o (W_v c + b_v) + b_o.

Weights keep the authors' names: `item_embeddings`, `position_embeddings`, `time_embeddings`, `LayerNorm`,
`conditional_encoder.layer.{i}.{attention,intermediate}`, `decoder` (a `torch.nn.TransformerDecoderLayer`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import plan as plans
from fastdiff.config import CDDRecConfig
from fastdiff.errors import InvalidArgument
from fastdiff.models.base import Histories, Model, OnStep, Weights
from fastdiff.models.layers import merge_heads
from fastdiff.noise import Noise
from fastdiff.ops.backend import BoundOp
from fastdiff.ops.decode_context import ContextDecoder, decode_context
from fastdiff.ops.encode_padded_history import PaddedEncoder, encode_padded_history
from fastdiff.ops.padded_transformer import Layer, PaddedBlock
from fastdiff.per_object import PerObject
from fastdiff.plan import StepPlan

ENCODER_EPS = 1e-12
DECODER_EPS = 1e-5
PUBLISHED_MASK = -10000.0


@dataclass(frozen=True)
class CDDRecState:
    """context [B, D]   cross [S, D], the cross-attention of each step   num_samples, rows per user"""

    context: Tensor
    cross: Tensor
    decoder: ContextDecoder
    num_samples: int = 1

    @cached_property
    def attended(self) -> Tensor:
        """[R, D] the decoder's rows after self-attention, for the loop that is written out."""
        return self.decoder.attend(self.context).repeat_interleave(self.num_samples, dim=0)


class CDDRec(Model[Tensor, CDDRecState]):
    """The condition of a batch is the encoder's last slot, [B, D]."""

    ops = (*Model.ops, encode_padded_history, decode_context)
    item_table_key = "item_embeddings.weight"
    config: CDDRecConfig

    @classmethod
    def weight_shapes(cls, config: CDDRecConfig) -> dict[str, tuple[int, ...]]:
        dim = config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "item_embeddings.weight": (config.n_rows, dim),
            "position_embeddings.weight": (config.max_seq_len, dim),
            "time_embeddings.weight": (config.schedule.num_train_timesteps, dim),
        }

        def linear(name: str, width_out: int, width_in: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width_out, width_in), (width_out,)

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)

        norm("LayerNorm")
        for i in range(config.n_layers):
            layer = f"conditional_encoder.layer.{i}"
            for name in ("query", "key", "value", "dense"):
                linear(f"{layer}.attention.{name}", dim, dim)
            norm(f"{layer}.attention.LayerNorm")
            linear(f"{layer}.intermediate.dense_1", 4 * dim, dim)
            linear(f"{layer}.intermediate.dense_2", dim, 4 * dim)
            norm(f"{layer}.intermediate.LayerNorm")
        for attention in ("self_attn", "multihead_attn"):
            shapes[f"decoder.{attention}.in_proj_weight"] = (3 * dim, dim)
            shapes[f"decoder.{attention}.in_proj_bias"] = (3 * dim,)
            linear(f"decoder.{attention}.out_proj", dim, dim)
        linear("decoder.linear1", dim, dim)
        linear("decoder.linear2", dim, dim)
        for name in ("norm1", "norm2", "norm3"):
            norm(f"decoder.{name}")
        return shapes

    def __init__(self, config: CDDRecConfig, weights: Weights, bound: dict[str, BoundOp] | None = None) -> None:
        super().__init__(config, weights, bound)
        blocks = tuple(self._block(i) for i in range(config.n_layers))
        norm, positions = self._layer("LayerNorm"), weights["position_embeddings.weight"]
        empty = _encode_empty_history(self.item_table[config.pad_id], positions, norm, blocks)
        self._encoder = PaddedEncoder(positions, norm, blocks, config.pad_id, empty)
        self._decoder = self._context_decoder()
        # W_o (W_v Time[t] + b_v) + b_o
        name, dim = "decoder.multihead_attn", config.hidden_size
        weight, bias = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
        values = F.linear(weights["time_embeddings.weight"], weight[2 * dim :], bias[2 * dim :])
        self._cross = F.linear(values, *self._layer(f"{name}.out_proj"))
        self._cross_of_plan: PerObject[Tensor] = PerObject()

    def _layer(self, name: str) -> Layer:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _block(self, i: int) -> PaddedBlock:
        name, config = f"conditional_encoder.layer.{i}", self.config
        query, key, value, out = (
            self._layer(f"{name}.attention.{part}") for part in ("query", "key", "value", "dense")
        )
        return PaddedBlock(
            query,
            key,
            value,
            out,
            self._layer(f"{name}.attention.LayerNorm"),
            self._layer(f"{name}.intermediate.dense_1"),
            self._layer(f"{name}.intermediate.dense_2"),
            self._layer(f"{name}.intermediate.LayerNorm"),
            config.n_heads,
            config.hidden_act,
            ENCODER_EPS,
        )

    def _context_decoder(self) -> ContextDecoder:
        config = self.config
        return ContextDecoder(
            (self.weights["decoder.self_attn.in_proj_weight"], self.weights["decoder.self_attn.in_proj_bias"]),
            self._layer("decoder.self_attn.out_proj"),
            self._layer("decoder.norm1"),
            self._layer("decoder.linear1"),
            self._layer("decoder.linear2"),
            self._layer("decoder.norm2"),
            self._layer("decoder.norm3"),
            config.n_heads,
            config.coupled,
            config.hidden_act,
            DECODER_EPS,
        )

    # --- the protocol -------------------------------------------------------------------------------------------------

    def encode(self, histories: Histories, item_table: Tensor) -> Tensor:
        """c [B, D]. Pad rows inside a history keep their slot and are never attended to, as published."""
        context: Tensor = self.bound["encode_padded_history"](
            histories.items, histories.lengths, item_table, self._encoder
        )
        return context

    def prepare(self, condition: Tensor, plan: StepPlan, guidance_scale: float) -> CDDRecState:
        """The plan's cross-attention rows."""
        if guidance_scale != 1.0:
            raise InvalidArgument(
                f"generate: guidance_scale must be 1: CDDRec has no unconditional branch (got {guidance_scale:g})"
            )
        return CDDRecState(condition, self._cross_of_plan.get(plan, self._cross_rows), self._decoder)

    def _cross_rows(self, plan: StepPlan) -> Tensor:
        return self._cross[self.timesteps_of(plan, 0, self._cross.shape[0] - 1)]

    def repeat(self, state: CDDRecState, num_samples: int) -> CDDRecState:
        return CDDRecState(state.context, state.cross, state.decoder, state.num_samples * num_samples)

    def denoise(self, x_t: Tensor, step: int, state: CDDRecState) -> Tensor:
        """mu_t [R, D]; `x_t` is not looked at, as published."""
        return state.decoder.step(state.attended, state.cross[step])

    def sample(self, state: CDDRecState, plan: StepPlan, noise: Noise, on_step: OnStep | None = None) -> Tensor:
        """x_0 [R, D]. A step whose c_xt is 0 forgets what came before it, and all steps of CDDRec's own plans do: only
        the last of them is run, unless a callback wants to see the others, and x_T is never drawn."""
        if on_step is None:
            x_0: Tensor = self.bound["decode_context"](
                state.context, state.decoder, state.cross, plan.coef, plan.normalize, state.num_samples, noise
            )
            return x_0
        x_t = state.attended if plan.coef[0, 1] == 0 else self.start(noise)
        return self.run_steps(x_t, state, plan, noise, on_step)

    @property
    def uses_start(self) -> bool:
        return False

    def one_step_plan(self) -> StepPlan:
        """t = 0 alone, with its noise: what the authors' inference runs."""
        config = self.config
        return plans.ddpm(
            self.schedule, [0], config.prediction_type, config.variance_type, config.noise_at_last_step, self.normalizes
        )


def _encode_empty_history(pad: Tensor, positions: Tensor, norm: Layer, blocks: tuple[PaddedBlock, ...]) -> Tensor:
    """c [1, D] of a history of pads alone, as published: scores + (-10000) for every slot, then softmax.

    The addition rounds the scores to the spacing of floats at 10000, which is part of the result; in a half dtype
    nothing would be left of them, so there the whole is done in float32. pad [D], the pad's row   positions [L, D]
    """
    dtype = pad.dtype if pad.dtype in (torch.float32, torch.float64) else torch.float32
    weight, bias = norm
    x = pad.to(dtype) + positions.to(dtype)
    x = F.layer_norm(x, x.shape[-1:], weight.to(dtype), bias.to(dtype), ENCODER_EPS)
    for block in (block.to(dtype) for block in blocks):
        q, k, v = block.project(x)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1]) + PUBLISHED_MASK
        x = block.finish(x, merge_heads(torch.matmul(torch.softmax(scores, dim=-1), v)))
    return x[-1:].to(pad.dtype)
