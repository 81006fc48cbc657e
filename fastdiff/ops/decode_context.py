"""decode_context: all steps of a sampler whose denoiser reads the user's context and the step alone (CDDRec)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastdiff.noise import Noise
from fastdiff.ops.backend import Op
from fastdiff.ops.causal_transformer import merge_heads, split_heads
from fastdiff.ops.padded_transformer import ACTIVATIONS, Layer
from fastdiff.ops.sampler_step import sampler_step_ref


@dataclass(frozen=True)
class ContextDecoder:
    """A post-norm decoder layer whose memory is one row per step.

        a = LN_1(c + out(attend(c)))        x = LN_2(a + cross_i)        mu_i = LN_3(x + linear_2(act(linear_1(x))))

    qkv         ([3 D, D], [3 D]) of queries, keys, values     out, linear_1, linear_2  linear layers
    norm_1 .. norm_3  LayerNorms      activation  "gelu" (exact) or "relu"
    coupled     c attends over the users of the batch; otherwise each user is alone, where attention over one key is
                W_v c + b_v
    """

    qkv: Layer
    out: Layer
    norm_1: Layer
    linear_1: Layer
    linear_2: Layer
    norm_2: Layer
    norm_3: Layer
    n_heads: int
    coupled: bool
    activation: str = "gelu"
    eps: float = 1e-5

    def attend(self, context: Tensor) -> Tensor:
        """a [B, D] of the users' contexts c [B, D]."""
        dim = context.shape[-1]
        weight, bias = self.qkv
        if self.coupled:
            packed = F.linear(context, weight, bias)
            q, k, v = (split_heads(part.unsqueeze(0), self.n_heads) for part in packed.chunk(3, dim=-1))
            gathered = merge_heads(F.scaled_dot_product_attention(q, k, v)).squeeze(0)
        else:
            gathered = F.linear(context, weight[2 * dim :], bias[2 * dim :])
        return F.layer_norm(context + F.linear(gathered, *self.out), (dim,), *self.norm_1, self.eps)

    def step(self, attended: Tensor, cross: Tensor) -> Tensor:
        """mu [.., D] of a [.., D] and one step's cross-attention [D]."""
        shape = attended.shape[-1:]
        x = F.layer_norm(attended + cross, shape, *self.norm_2, self.eps)
        hidden = F.linear(ACTIVATIONS[self.activation](F.linear(x, *self.linear_1)), *self.linear_2)
        return F.layer_norm(x + hidden, shape, *self.norm_3, self.eps)


def first_step(table: list[list[float]]) -> int:
    """The last step (c_out, c_xt, c_noise) whose c_xt is 0: it forgets what came before it. 0 where there is none."""
    return max((i for i, step in enumerate(table) if step[1] == 0), default=0)


def decode_context_ref(
    context: Tensor,
    decoder: ContextDecoder,
    cross: Tensor,
    coef: Tensor,
    normalize: bool,
    num_samples: int,
    noise: Noise,
) -> Tensor:
    """x_{i+1} = sampler_step(mu_i, x_i, noise 1 + i, *coef[i]), where mu_i = LN_3(..) of `ContextDecoder`.

    The steps before the last one that forgets x_t (c_xt = 0) are not run; where every step remembers, x_T is draw 0.

    context      [B, D]
    cross        [S, D] the cross-attention of each step
    coef         [S, 3] float64, see `StepPlan`
    num_samples  rows per user: R = B * num_samples, which differ in their noise
    noise        draw 1 + i is asked for at each step i that is run and whose coef[i, 2] is not 0
    Returns x_0 [R, D].
    """
    attended = decoder.attend(context)
    table = coef.tolist()
    first = first_step(table)
    x_t = context if table[first][1] == 0 else noise.draw(0)  # not read where the first step forgets it
    for i in range(first, len(table)):
        c_out, c_xt, c_noise = table[i]
        output = decoder.step(attended, cross[i]).repeat_interleave(num_samples, dim=0)
        draw = noise.draw(1 + i) if c_noise else None
        x_t = sampler_step_ref(output, x_t, draw, c_out, c_xt, c_noise, normalize)
    return x_t


decode_context = Op(
    "decode_context",
    decode_context_ref,
    {
        "cpu": "fastdiff.ops.cpu.decode_context:decode_context",
        "triton": "fastdiff.kernels.decode_context:decode_context",
    },
)
