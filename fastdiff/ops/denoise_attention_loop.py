"""denoise_attention_loop: all steps of a sampler whose denoiser is a causal transformer on a cached prefix (ADRec)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.noise import Noise
from fastdiff.ops.backend import Op
from fastdiff.ops.denoise_mlp_loop import guided
from fastdiff.ops.sampler_step import sampler_step_ref


@dataclass(frozen=True)
class BlockWeights:
    """A post-norm transformer block.

        h = LN_1(x + W_o attend(x) + b_o)        out = LN_2(h + W_down gelu_tanh(W_up h + b_up) + b_down)

    qkv_weight   [3 D, D] rows of queries, keys, values; the query rows hold the factor 1 / sqrt(D / n_heads) already
    qkv_bias     [3 D]            out_weight  [D, D]           out_bias   [D]
    norm_1       ([D], [D])       norm_2      ([D], [D])       weight and bias of the two LayerNorms
    up_weight    [F, D]           up_bias     [F]              down_weight [D, F]    down_bias [D]
    eps          added to the variance inside the root of both LayerNorms
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm_1: tuple[Tensor, Tensor]
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    norm_2: tuple[Tensor, Tensor]
    n_heads: int
    eps: float = 1e-12

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values `[.., 3 D]` of x `[.., D]`."""
        return F.linear(x, self.qkv_weight, self.qkv_bias)

    def queries(self, x: Tensor) -> Tensor:
        """Queries `[.., D]` alone."""
        dim = x.shape[-1]
        return F.linear(x, self.qkv_weight[:dim], self.qkv_bias[:dim])

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys and values `[.., 2 D]` alone."""
        dim = x.shape[-1]
        return F.linear(x, self.qkv_weight[dim:], self.qkv_bias[dim:])

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output from its input x and what its heads gathered, both `[.., D]`."""
        shape = x.shape[-1:]
        h = F.layer_norm(x + F.linear(attended, self.out_weight, self.out_bias), shape, *self.norm_1, self.eps)
        up = F.gelu(F.linear(h, self.up_weight, self.up_bias), approximate="tanh")
        return F.layer_norm(h + F.linear(up, self.down_weight, self.down_bias), shape, *self.norm_2, self.eps)


@dataclass(frozen=True)
class CausalPrefix:
    """What the steps attend to: the keys and values of the slots before the one that is denoised, for B users.

    G is 1, or 2 under guidance: then entry 0 is the conditional pass and entry 1 the unconditional one. P is the
    longest prefix of the batch; a key may stand for many equal ones.

    cond      [G, B, D] the condition at the denoised slot; zeros in the unconditional pass
    keys      [n_blocks, G, B, H, D / H, P] contiguous, so that a row of logits is one matrix product
    values    [n_blocks, G, B, H, P, D / H] contiguous
    key_bias  [B, P] added to the logits: log(m) for a key that stands for m equal ones, 0 for a single key, -inf where
              the user has none (the keys and values there must be finite)
    uniform   [B] bool: users whose logits are 0 before the bias, so that they attend evenly; None where nobody's are
    """

    cond: Tensor
    keys: Tensor
    values: Tensor
    key_bias: Tensor
    uniform: Tensor | None = None

    @property
    def n_users(self) -> int:
        return self.keys.shape[2]

    @cached_property
    def flat_keys(self) -> Tensor:
        """[n_blocks, G B H, D / H, P], a view."""
        return self.keys.flatten(1, 3)

    @cached_property
    def flat_values(self) -> Tensor:
        """[n_blocks, G B H, P, D / H], a view."""
        return self.values.flatten(1, 3)

    @cached_property
    def flat_bias(self) -> Tensor:
        """[G B H, 1, P], the bias of every row of logits."""
        return self._per_head(self.key_bias)

    @cached_property
    def flat_query_scale(self) -> Tensor | None:
        """[G B H, 1, 1]: 0 for the users of `uniform`, 1 for the others; None where all are 1."""
        if self.uniform is None:
            return None
        return self._per_head((~self.uniform).to(self.cond.dtype).unsqueeze(1))

    def _per_head(self, per_user: Tensor) -> Tensor:
        _, branches, users, heads = self.keys.shape[:4]
        expanded = per_user[None, :, None].expand(branches, users, heads, per_user.shape[-1])
        return expanded.flatten(0, 2).unsqueeze(1)


def denoise_attention_step_ref(
    x_t: Tensor,
    blocks: tuple[BlockWeights, ...],
    prefix: CausalPrefix,
    guidance_scale: float,
    input_scale: float,
    time: Tensor,
) -> Tensor:
    """One call of the denoiser for the last slot: blocks(cond + time + input_scale x_t | prefix), guided where G = 2.

    Arguments as in `denoise_attention_loop_ref`, but time is the step's own `[D]`. Returns [R, D].
    """
    branches, users, dim = prefix.cond.shape
    samples = x_t.shape[0] // max(users, 1)
    fixed = (prefix.cond + time).unsqueeze(2)
    h = torch.add(fixed, x_t.reshape(users, samples, dim), alpha=input_scale).flatten(0, 2)
    for layer, block in enumerate(blocks):
        h = block.finish(h, _attend(block.project(h), prefix, layer))
    if branches == 1:
        return h
    cond, uncond = h.view(2, -1, dim)
    return guided(uncond, cond, guidance_scale)


def _attend(qkv: Tensor, prefix: CausalPrefix, layer: int) -> Tensor:
    """Each row's query over its user's prefix and over itself: qkv [G R, 3 D] -> [G R, D]."""
    _, branches, users, heads, width, length = prefix.keys.shape
    rows = branches * users
    samples = qkv.shape[0] // max(rows, 1)
    by_head = qkv.view(rows, samples, 3, heads, width).permute(2, 0, 3, 1, 4).reshape(3, rows * heads, samples, width)
    query, key, value = by_head.unbind(0)
    if prefix.flat_query_scale is not None:
        query = query * prefix.flat_query_scale
    # A row's own key and value change with the step, so they stay out of the cache and are weighed in beside it.
    own = (query * key).sum(dim=-1, keepdim=True)
    cached = torch.baddbmm(prefix.flat_bias, query, prefix.flat_keys[layer])
    weights = torch.softmax(torch.cat([cached, own], dim=-1), dim=-1)
    mixed = torch.baddbmm(weights[..., length:] * value, weights[..., :length], prefix.flat_values[layer])
    return mixed.view(rows, heads, samples, width).transpose(1, 2).reshape(rows * samples, heads * width)


def denoise_attention_loop_ref(
    x_t: Tensor,
    blocks: tuple[BlockWeights, ...],
    prefix: CausalPrefix,
    guidance_scale: float,
    input_scale: float,
    time: Tensor,
    coef: Tensor,
    normalize: bool,
    noise: Noise,
) -> Tensor:
    """Run S steps of one token over a cached prefix:

        u_i      = cond + input_scale x_i + time[i]
        output_i = blocks(u_i), where each block's attention sees the prefix's keys and values and the token's own
        x_{i+1}  = sampler_step(output_i, x_i, noise 1 + i, *coef[i])

    x_t             [R, D] the start, x_T; R = B x samples rows, those of one user side by side: they share its prefix
    blocks          the transformer blocks, see `BlockWeights`
    prefix          keys, values, condition, see `CausalPrefix`; with G = 2 the output is u + g (c - u) of two passes
    guidance_scale  g; used only where the prefix has two passes
    input_scale     factor of x_t in the input (ADRec's lambda)
    time            [S, D] the time embedding of each step, times `input_scale`
    coef            [S, 3] float64, see `StepPlan`
    noise           draw 1 + i is asked for at step i where coef[i, 2] is not 0
    Tensors share one floating dtype and device, but for coef. Returns x_0 [R, D].
    Raises InvalidArgument where R is not a multiple of B.
    """
    if x_t.shape[0] % max(prefix.n_users, 1):
        raise InvalidArgument(
            f"denoise_attention_loop: x_t must hold the same number of rows for each of the prefix's {prefix.n_users} "
            f"users (got {x_t.shape[0]} rows)"
        )
    for i, (c_out, c_xt, c_noise) in enumerate(coef.tolist()):
        output = denoise_attention_step_ref(x_t, blocks, prefix, guidance_scale, input_scale, time[i])
        x_t = sampler_step_ref(output, x_t, noise.draw(1 + i) if c_noise else None, c_out, c_xt, c_noise, normalize)
    return x_t


denoise_attention_loop = Op("denoise_attention_loop", denoise_attention_loop_ref)
