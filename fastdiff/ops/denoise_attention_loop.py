"""denoise_attention_loop: all steps of a sampler whose denoiser is a causal transformer on a cached prefix (ADRec)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.noise import Noise
from fastdiff.ops.backend import Op
from fastdiff.ops.causal_transformer import BlockWeights, RaggedRows, key_bias, split_heads
from fastdiff.ops.denoise_mlp_loop import guided
from fastdiff.ops.sampler_step import sampler_step_ref


@dataclass(frozen=True)
class CausalPrefix:
    """What the steps attend to: the keys and values of the slots before the one that is denoised, for B users.

    G is 1, or 2 under guidance: then entry 0 is the conditional pass and entry 1 the unconditional one. Slots of all
    users are packed one after another; before a user's own slots stands one key for all of its pads. There is room for
    N slots, at least as many as there are; what stands beyond them is not read. The "cpu" loop takes no more room than
    that: its own `prepare_causal_prefix` leaves none.

    cond         [G, B, D] the condition at the denoised slot; zeros in the unconditional pass
    keys_values  [n_blocks, G, N, 2 D] contiguous: a slot's keys of all heads, then its values
    lengths      [B] int64, how many slots each user has, 0 or more; their sum is at most N
    pad          [n_blocks, G, 2 D] contiguous: the pads' common key and value, the same for all users
    log_pads     [B] added to the logit of the pad key: log(how many pads), -inf where the user has none
    uniform      [B] bool: users whose logits are 0 before log_pads, so that they attend evenly; None where nobody's are
    n_heads      H, in each of which a key has D / H dims
    """

    cond: Tensor
    keys_values: Tensor
    lengths: Tensor
    pad: Tensor
    log_pads: Tensor
    uniform: Tensor | None
    n_heads: int

    @property
    def n_users(self) -> int:
        return self.lengths.shape[0]

    @cached_property
    def by_head(self) -> tuple[Tensor, Tensor]:
        """Keys [n_blocks, G B H, D / H, P] and values [n_blocks, G B H, P, D / H], the pad's in front, zeros where a
        user has none: what a row of logits is one matrix product with."""
        blocks, branches, _, width = self.keys_values.shape
        rows = RaggedRows.of(self.lengths, int(self.lengths.max()) if self.n_users else 0)
        own = rows.pad(self.keys_values.movedim(2, 0)).movedim((0, 1), (2, 3))
        pad = self.pad[:, :, None, None].expand(blocks, branches, self.n_users, 1, width)
        key, value = torch.cat([pad, own], dim=3).chunk(2, dim=-1)
        keys, values = split_heads(key, self.n_heads).transpose(-1, -2), split_heads(value, self.n_heads)
        return keys.flatten(1, 3).contiguous(), values.flatten(1, 3).contiguous()

    @cached_property
    def flat_bias(self) -> Tensor:
        """[G B H, 1, P], the bias of every row of logits."""
        return self._per_head(key_bias(self.log_pads, self.lengths, self.by_head[0].shape[-1] - 1))

    @cached_property
    def flat_query_scale(self) -> Tensor | None:
        """[G B H, 1, 1]: 0 for the users of `uniform`, 1 for the others; None where all are 1."""
        if self.uniform is None:
            return None
        return self._per_head((~self.uniform).to(self.cond.dtype).unsqueeze(1))

    def _per_head(self, per_user: Tensor) -> Tensor:
        branches, users = self.cond.shape[:2]
        expanded = per_user[None, :, None].expand(branches, users, self.n_heads, per_user.shape[-1])
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
    keys, values = prefix.by_head[0][layer], prefix.by_head[1][layer]
    heads, width, length = prefix.n_heads, keys.shape[1], keys.shape[2]
    rows = keys.shape[0] // heads
    samples = qkv.shape[0] // max(rows, 1)
    by_head = qkv.view(rows, samples, 3, heads, width).permute(2, 0, 3, 1, 4).reshape(3, rows * heads, samples, width)
    query, key, value = by_head.unbind(0)
    if prefix.flat_query_scale is not None:
        query = query * prefix.flat_query_scale
    # A row's own key and value change with the step, so they stay out of the cache and are weighed in beside it.
    own = (query * key).sum(dim=-1, keepdim=True)
    cached = torch.baddbmm(prefix.flat_bias, query, keys)
    weights = torch.softmax(torch.cat([cached, own], dim=-1), dim=-1)
    mixed = torch.baddbmm(weights[..., length:] * value, weights[..., :length], values)
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


denoise_attention_loop = Op(
    "denoise_attention_loop",
    denoise_attention_loop_ref,
    {
        "cpu": "fastdiff.ops.cpu.denoise_attention_loop:denoise_attention_loop",
        "triton": "fastdiff.kernels.denoise_attention_loop:denoise_attention_loop",
    },
)
