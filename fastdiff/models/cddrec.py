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

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import plan as plans
from fastdiff.config import CDDRecConfig
from fastdiff.errors import InvalidArgument
from fastdiff.models.base import Histories, Model, OnStep, Weights
from fastdiff.models.layers import merge_heads, split_heads
from fastdiff.noise import Noise
from fastdiff.ops.backend import BoundOp
from fastdiff.plan import StepPlan

ENCODER_EPS = 1e-12
DECODER_EPS = 1e-5
PUBLISHED_MASK = -10000.0


@dataclass(frozen=True)
class CDDRecState:
    """attended [R, D]: the decoder's rows after self-attention   cross [S, D]: the cross-attention of each step"""

    attended: Tensor
    cross: Tensor


class CDDRec(Model[Tensor, CDDRecState]):
    """The condition of a batch is the encoder's last slot, [B, D]."""

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
        self._activation = F.gelu if config.hidden_act == "gelu" else F.relu
        self._cross = self._constant_attention("decoder.multihead_attn", weights["time_embeddings.weight"])
        self._empty = self._encode_empty_history()

    # --- encode -------------------------------------------------------------------------------------------------------

    def encode(self, histories: Histories, item_table: Tensor) -> Tensor:
        """c [B, D]. Pad rows inside a history keep their slot and are never attended to, as published."""
        items, lengths = histories.items, histories.lengths
        n_users, width = items.shape
        if n_users == 0 or width == 0:
            return self._empty.expand(n_users, -1)
        place = torch.arange(width, device=items.device)
        slot = self.config.max_seq_len - lengths[:, None] + place
        is_key = (place < lengths[:, None]) & (items != self.config.pad_id)
        has_key = is_key.any(dim=1, keepdim=True)
        positions = F.embedding(slot.clamp(max=self.config.max_seq_len - 1), self.weights["position_embeddings.weight"])
        x = self._norm("LayerNorm", F.embedding(items, item_table) + positions, ENCODER_EPS)
        last = self.config.n_layers - 1
        for i in range(last):
            x = self._full_layer(i, x, is_key)
        newest = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[-1])
        # a row without any key attends to everything here: finite, and replaced below
        context = self._last_layer(last, x, x.gather(1, newest).squeeze(1), is_key | ~has_key)
        return torch.where(has_key, context, self._empty)

    def _full_layer(self, i: int, x: Tensor, is_key: Tensor) -> Tensor:
        """Layer i on every slot: x [B, n, D], is_key [B, n]."""
        n_slots = x.shape[1]
        causal = torch.ones(n_slots, n_slots, dtype=torch.bool, device=x.device).tril()
        allowed = causal & is_key[:, None, :]
        # a slot that may attend to nothing is never read by one that counts; only NaN must be kept out of its row
        allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        q, k, v = self._project(i, x)
        context = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None]))
        return self._finish_layer(i, x, context)

    def _last_layer(self, i: int, x: Tensor, query: Tensor, is_key: Tensor) -> Tensor:
        """Layer i for one row per user: x [B, n, D], query [B, D] (one of its rows), is_key [B, n]."""
        name, heads = f"conditional_encoder.layer.{i}.attention", self.config.n_heads
        n_users, dim = query.shape
        head_dim = dim // heads
        key_map = self.weights[f"{name}.key.weight"].view(heads, head_dim, dim)
        value_map = self.weights[f"{name}.value.weight"].view(heads, head_dim, dim)
        q = self._linear(f"{name}.query", query).view(n_users, heads, head_dim).transpose(0, 1)  # [H, B, d]
        keyed = torch.bmm(q, key_map).transpose(0, 1)  # [B, H, D]
        scores = torch.bmm(keyed, x.transpose(1, 2)) / math.sqrt(head_dim)  # [B, H, n]
        probabilities = torch.softmax(scores.masked_fill(~is_key[:, None], -math.inf), dim=-1)
        mixed = torch.bmm(probabilities, x).transpose(0, 1)  # [H, B, D]
        context = torch.bmm(mixed, value_map.transpose(1, 2)).transpose(0, 1).flatten(1)
        return self._finish_layer(i, query, context + self.weights[f"{name}.value.bias"])

    def _project(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of layer i, [.., H, n, d] each, for x [.., n, D]."""
        name, heads = f"conditional_encoder.layer.{i}.attention", self.config.n_heads
        q, k, v = (split_heads(self._linear(f"{name}.{part}", x), heads) for part in ("query", "key", "value"))
        return q, k, v

    def _finish_layer(self, i: int, x: Tensor, context: Tensor) -> Tensor:
        """Output projection, residual, norm; feed-forward, residual, norm."""
        name = f"conditional_encoder.layer.{i}"
        x = self._norm(f"{name}.attention.LayerNorm", self._linear(f"{name}.attention.dense", context) + x, ENCODER_EPS)
        hidden = self._activation(self._linear(f"{name}.intermediate.dense_1", x))
        hidden = self._linear(f"{name}.intermediate.dense_2", hidden)
        return self._norm(f"{name}.intermediate.LayerNorm", hidden + x, ENCODER_EPS)

    def _encode_empty_history(self) -> Tensor:
        """c [1, D] of a history of pads alone, as published: scores + (-10000) for every slot, then softmax.

        The addition rounds the scores to the spacing of floats at 10000, which is part of the result; in a half dtype
        nothing would be left of them, so there the whole is done in float32.
        """
        dtype = self.dtype if self.dtype in (torch.float32, torch.float64) else torch.float32
        pad = self.item_table[self.config.pad_id].to(dtype)
        x = self._norm("LayerNorm", pad + self.weights["position_embeddings.weight"].to(dtype), ENCODER_EPS)
        for i in range(self.config.n_layers):
            q, k, v = self._project(i, x)
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1]) + PUBLISHED_MASK
            x = self._finish_layer(i, x, merge_heads(torch.matmul(torch.softmax(scores, dim=-1), v)))
        return x[-1:].to(self.dtype)

    # --- prepare, denoise, sample -------------------------------------------------------------------------------------

    def prepare(self, condition: Tensor, plan: StepPlan, guidance_scale: float) -> CDDRecState:
        """The decoder's self-attention, over the batch or each user alone, and the plan's cross-attention rows."""
        if guidance_scale != 1.0:
            raise InvalidArgument(
                f"generate: guidance_scale must be 1: CDDRec has no unconditional branch (got {guidance_scale:g})"
            )
        timesteps = self.timesteps_of(plan, 0, self._cross.shape[0] - 1)
        context = self._attend_batch(condition) if self.config.coupled else self._attend_alone(condition)
        attended = self._norm("decoder.norm1", condition + context, DECODER_EPS)
        return CDDRecState(attended, self._cross[timesteps])

    def _attend_batch(self, x: Tensor) -> Tensor:
        """Every user attends to all users of the batch: x [B, D]."""
        name, heads = "decoder.self_attn", self.config.n_heads
        packed = F.linear(x, self.weights[f"{name}.in_proj_weight"], self.weights[f"{name}.in_proj_bias"])
        q, k, v = (split_heads(part.unsqueeze(0), heads) for part in packed.chunk(3, dim=-1))
        return self._linear(f"{name}.out_proj", merge_heads(F.scaled_dot_product_attention(q, k, v)).squeeze(0))

    def _attend_alone(self, x: Tensor) -> Tensor:
        return self._constant_attention("decoder.self_attn", x)

    def _constant_attention(self, name: str, x: Tensor) -> Tensor:
        """Attention where all keys are one row x [.., D], so that scores do not matter: W_o (W_v x + b_v) + b_o."""
        dim = self.config.hidden_size
        weight, bias = self.weights[f"{name}.in_proj_weight"], self.weights[f"{name}.in_proj_bias"]
        return self._linear(f"{name}.out_proj", F.linear(x, weight[2 * dim :], bias[2 * dim :]))

    def repeat(self, state: CDDRecState, num_samples: int) -> CDDRecState:
        return CDDRecState(state.attended.repeat_interleave(num_samples, dim=0), state.cross)

    def denoise(self, x_t: Tensor, step: int, state: CDDRecState) -> Tensor:
        """mu_t [R, D]; `x_t` is not looked at, as published."""
        x = self._norm("decoder.norm2", state.attended + state.cross[step], DECODER_EPS)
        hidden = self._linear("decoder.linear2", self._activation(self._linear("decoder.linear1", x)))
        return self._norm("decoder.norm3", x + hidden, DECODER_EPS)

    def sample(self, state: CDDRecState, plan: StepPlan, noise: Noise, on_step: OnStep | None = None) -> Tensor:
        """x_0 [R, D]. A step whose c_xt is 0 forgets what came before it, and all steps of CDDRec's own plans do: only
        the last of them is run, unless a callback wants to see the others, and x_T is never drawn."""
        coef = plan.coef.tolist()
        forgetting = [i for i, (_, c_xt, _) in enumerate(coef) if c_xt == 0]
        first = forgetting[-1] if forgetting and on_step is None else 0
        x_t = state.attended if coef[first][1] == 0 else self.start(noise)
        return self.run_steps(x_t, state, plan, noise, on_step, first)

    @property
    def uses_start(self) -> bool:
        return False

    def one_step_plan(self) -> StepPlan:
        """t = 0 alone, with its noise: what the authors' inference runs."""
        config = self.config
        return plans.ddpm(
            self.schedule, [0], config.prediction_type, config.variance_type, config.noise_at_last_step, self.normalizes
        )

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """In the dtype of x: the weights' own, but for the empty history of a half model."""
        return F.linear(x, self.weights[f"{name}.weight"].to(x.dtype), self.weights[f"{name}.bias"].to(x.dtype))

    def _norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"].to(x.dtype), self.weights[f"{name}.bias"].to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
