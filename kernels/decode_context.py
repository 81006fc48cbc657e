"""decode_context in Triton.

The mean mu_i of a step reads the users' rows and i alone, so the steps do not wait for each other: one launch makes the
means of all steps that are run, programs side by side over users and steps, and one walks through the updates of a row
with its state in registers. Where one step is run, as published, the update is the end of the first launch.

Users alone attend to one key, so W_o W_v is one matrix. Coupled users attend to each other in PyTorch: two launches
before, a matrix product and a flash attention, that a kernel of ours would do no better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastdiff.kernels.decode_context_steps import GIVEN, NONE, PHILOX, means_kernel, update_kernel
from fastdiff.kernels.packing import block_of, coef_on
from fastdiff.kernels.padded_transformer import (
    Finish,
    dtype_key,
    finish_candidates,
    finish_types,
    pack_vectors,
)
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import device_int
from fastdiff.kernels.tuning import Config, Problem, bucket, choose
from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.causal_transformer import merge_heads, split_heads
from fastdiff.ops.decode_context import ContextDecoder, first_step
from fastdiff.ops.padded_transformer import Layer
from fastdiff.ops.step_noise import step_noise
from fastdiff.per_object import packed

_NUMBERS = ((2048, 4), (1024, 4), (512, 2))  # that a program of `update` keeps, and its warps


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    """finish  all but the second LayerNorm, which is norm_2 [2, BLOCK_D]: weight and bias, float32"""

    finish: Finish
    norm_2: Tensor


def _pack(decoder: ContextDecoder) -> _Packed:
    out = decoder.out
    if not decoder.coupled:
        dim = out[0].shape[0]
        value, value_bias = (part.detach()[2 * dim :].double() for part in decoder.qkv)
        weight = out[0].detach().double()
        out = ((weight @ value).to(out[0].dtype), weight @ value_bias + out[1].detach().double())
    finish = Finish.of(out, decoder.norm_1, decoder.linear_1, decoder.linear_2, decoder.norm_3)
    return _Packed(finish, pack_vectors(finish.out.shape[1], *decoder.norm_2))


# --- the launcher -----------------------------------------------------------------------------------------------------


def decode_context(
    context: Tensor,
    decoder: ContextDecoder,
    cross: Tensor,
    coef: Tensor,
    normalize: bool,
    num_samples: int,
    noise: Noise,
) -> Tensor:
    """See `fastdiff.ops.decode_context.decode_context_ref`. Philox draws are made in the kernels, other ones are asked
    for before them, in the same order."""
    table = coef.tolist()
    first = first_step(table)
    starts = NONE if table[first][1] == 0 else PHILOX if isinstance(noise, PhiloxNoise) else GIVEN
    x_t = noise.draw(0) if starts == GIVEN else None
    draws = step_noise(noise, coef, first)
    n_users, dim = context.shape
    device, dtype = context.device, context.dtype
    n_steps, n_rows = len(table) - first, n_users * num_samples
    x_0 = torch.empty(n_rows, dim, dtype=dtype, device=device)
    if x_0.numel() == 0:
        return x_0
    context = context.contiguous()
    cross = (cross if cross.stride(1) == 1 else cross.contiguous())[first:]
    weights, unread = packed(decoder, _pack), context
    gathered = _attend(context, decoder) if decoder.coupled else context
    kind, given, random = NONE, unread.unsqueeze(0), (unread, unread, unread)
    if draws.given is not None:
        kind, given = GIVEN, _last_dense(draws.given)
    elif draws.row_key is not None and draws.sample is not None:
        kind, random = PHILOX, (device_int(draws.seed, device), draws.row_key.contiguous(), draws.sample.contiguous())

    at_once = n_steps == 1 and num_samples == 1 and starts == NONE
    y = x_0 if at_once else torch.empty(n_steps, n_users, dim, device=device)
    finish, block_d = weights.finish, weights.finish.out.shape[1]
    key = (bucket(n_users * n_steps, least=16), block_d, dtype_key(dtype))
    config = choose("decode_context", key, finish_candidates, device)
    block_r = config.constants["BLOCK_R"]
    programs = triton.cdiv(n_users, block_r)
    c_out, _, c_noise = table[-1]
    means_kernel[(programs, n_steps)](
        gathered,
        context,
        finish.out,
        finish.rows,
        finish.up,
        finish.up_bias,
        finish.down,
        context.new_empty(programs * n_steps * block_r, block_d),
        weights.norm_2,
        cross,
        given,
        *random,
        y,
        gathered.stride(0),
        cross.stride(0),
        given.stride(1),
        1 + first,
        c_out,
        c_noise,
        finish.depth,
        n_users,
        decoder.eps,
        UPDATE=at_once,
        NOISE=kind if at_once and c_noise else NONE,
        NORMALIZE=normalize,
        GELU=decoder.activation == "gelu",
        **finish.constants(),
        **config.launch(),
    )
    if not at_once:
        start = unread if x_t is None else _last_dense(x_t)
        config = choose("decode_context_update", (bucket(n_rows), block_d), _update_candidates, device)
        update_kernel[(triton.cdiv(n_rows, config.constants["BLOCK_R"]),)](
            y,
            coef_on(coef, device)[first:],
            start,
            given,
            *random,
            x_0,
            start.stride(0),
            given.stride(0),
            given.stride(1),
            1 + first,
            n_steps,
            n_users,
            num_samples,
            START=starts,
            NOISE=kind,
            NORMALIZE=normalize,
            D=dim,
            BLOCK_D=block_d,
            **config.launch(),
        )
    return x_0


def _attend(context: Tensor, decoder: ContextDecoder) -> Tensor:
    """What the heads gather [B, D] where users attend to each other."""
    projected = F.linear(context, *decoder.qkv)
    q, k, v = (split_heads(part.unsqueeze(0), decoder.n_heads) for part in projected.chunk(3, dim=-1))
    return merge_heads(F.scaled_dot_product_attention(q, k, v)).squeeze(0)


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _update_candidates(rows: int, block_d: int) -> list[Config]:
    """Rows of a program: the fewer, the more of them share out a small batch, and wait side by side."""
    found: dict[int, int] = {}
    for numbers, warps in _NUMBERS:
        found.setdefault(max(1, numbers // block_d), warps)
    return [Config({"BLOCK_R": block_r}, warps) for block_r, warps in found.items()]


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times: CDDRec's published sizes, one step alone and 20 of them."""
    dim, heads = 128, 2
    for dtype in (torch.float32, torch.float16, torch.bfloat16):

        def layer(n_out: int, n_in: int, dtype: torch.dtype = dtype) -> Layer:
            weight = torch.randn(n_out, n_in, device=device) / n_in**0.5
            return weight.to(dtype), torch.zeros(n_out, dtype=dtype, device=device)

        norm = (torch.ones(dim, dtype=dtype, device=device), torch.zeros(dim, dtype=dtype, device=device))
        layers = (layer(3 * dim, dim), layer(dim, dim), norm, layer(4 * dim, dim), layer(dim, 4 * dim), norm, norm)
        decoder = ContextDecoder(*layers, n_heads=heads, coupled=False)
        for users, steps in ((16, 1), (256, 1), (2048, 1), (1, 20), (256, 20)):
            context, cross = (torch.randn(n, dim, device=device).to(dtype) for n in (users, steps))
            coef = torch.full((steps, 3), 0.3, dtype=torch.float64)
            coef[0, 1] = 0.0  # the first step forgets x_T
            keys = torch.arange(users, device=device)
            noise = PhiloxNoise(1, keys, keys * 0, dim, dtype)
            run = partial(decode_context, context, decoder, cross, coef, False, 1, noise)
            key = (bucket(users * steps, least=16), dim, dtype_key(dtype))
            yield Problem("decode_context", key, finish_candidates(*key), run)
            if steps > 1 and dtype == torch.float32:  # the state is float32 throughout
                yield Problem("decode_context_update", (users, dim), _update_candidates(users, dim), run)


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    random = {"p_seed": "*i64", "p_row_key": "*i64", "p_sample": "*i64"}
    strides = dict.fromkeys(("gathered_stride", "cross_stride", "noise_row_stride", "first_draw"), "i32")
    factors = {"c_out": "fp32", "c_noise": "fp32"}
    for dtype, name in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
        for dim in (64, 128, 256) if dtype == "fp16" else (128,):
            sizes = {"D": dim, "BLOCK_D": block_of(dim)}
            own = dict.fromkeys(("p_residual", "p_cross", "p_noise", "p_y"), f"*{dtype}")
            for config in finish_candidates(16, dim, name):
                yield Case(
                    f"means {dtype} D={dim} {config.words()}",
                    means_kernel,
                    {**finish_types(dtype), **own, **random, **strides, **factors, "p_norm_2": "*fp32"},
                    {
                        **sizes,
                        **config.constants,
                        **{"DEPTH": dim, "F": dim, "UPDATE": True, "NOISE": PHILOX, "NORMALIZE": False, "GELU": True},
                    },
                    config.options(),
                    tensor_core=dtype != "fp32",
                )
            first, *others = _update_candidates(1, dim)
            tuned = others if (dtype, dim) == ("fp16", 128) else []  # the dtype is that of what is read and written
            for kind, config in ((GIVEN, first), *((PHILOX, config) for config in (first, *tuned))):
                yield Case(
                    f"update {dtype} D={dim} {'philox' if kind == PHILOX else 'given'} {config.words()}",
                    update_kernel,
                    {
                        **random,
                        **{"p_means": "*fp32", "p_coef": "*fp32"},
                        **dict.fromkeys(("p_start", "p_noise", "p_x_0"), f"*{dtype}"),
                        **dict.fromkeys(("start_stride", "noise_step_stride", "noise_row_stride", "first_draw"), "i32"),
                        **dict.fromkeys(("n_steps", "n_users", "n_samples"), "i32"),
                    },
                    {**sizes, "START": kind, "NOISE": kind, "NORMALIZE": True, **config.constants},
                    config.options(),
                    divisible=("p_means", "p_start", "p_noise", "p_x_0"),  # a table's rows begin anywhere
                )
