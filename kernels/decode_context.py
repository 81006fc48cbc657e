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

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.normals import normal_rows
from fastdiff.kernels.packing import block_of, coef_on
from fastdiff.kernels.padded_transformer import (
    Finish,
    after_attention,
    dtype_key,
    feed_forward,
    finish_candidates,
    finish_types,
    pack_vectors,
)
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.rows import layer_norm
from fastdiff.kernels.runtime import device_int
from fastdiff.kernels.sampler_step import unit_rows
from fastdiff.kernels.tuning import bucket, choose
from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.causal_transformer import merge_heads, split_heads
from fastdiff.ops.decode_context import ContextDecoder, first_step
from fastdiff.ops.step_noise import step_noise
from fastdiff.per_object import packed

_NONE, _GIVEN, _PHILOX = 0, 1, 2  # where draws come from
_NUMBERS = 2048  # that a program of `update` keeps


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


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _draw(
    p_noise,
    noise_step_stride,
    noise_row_stride,
    p_seed,
    p_row_key,
    p_sample,
    place,
    draw,
    o_row,
    m_row,
    KIND: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Draw number `draw` of the rows o_row, at place `place` where draws are given: [R, BLOCK_D] float32."""
    o_dim = tl.arange(0, BLOCK_D)
    if KIND == 2:
        b_key = tl.load(p_row_key + o_row, mask=m_row, other=0)
        b_sample = tl.load(p_sample + o_row, mask=m_row, other=0)
        b_draw = normal_rows(tl.load(p_seed), b_key, b_sample, draw, BLOCK_D)
        b_draw = tl.where((o_dim < D)[None, :], b_draw, 0.0)
    else:
        p_draw = p_noise + place * noise_step_stride + o_row[:, None] * noise_row_stride + o_dim[None, :]
        b_draw = tl.load(p_draw, mask=m_row[:, None] & (o_dim < D)[None, :], other=0.0).to(tl.float32)
    return b_draw


@triton.jit(do_not_specialize=["first_draw", "n_rows"])
def _means_kernel(
    p_gathered,
    p_residual,
    p_out,
    p_rows,
    p_up,
    p_up_bias,
    p_down,
    p_shared,
    p_norm_2,
    p_cross,
    p_noise,
    p_seed,
    p_row_key,
    p_sample,
    p_y,
    gathered_stride,
    cross_stride,
    noise_row_stride,
    first_draw,
    c_out,
    c_noise,
    depth,
    n_rows,
    eps,
    UPDATE: tl.constexpr,
    NOISE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GELU: tl.constexpr,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """mu_i [n_rows, D] of step i, the program's second index; where UPDATE, x_0 in its place."""
    i_step = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < n_rows
    o_dim = tl.arange(0, BLOCK_D)
    m_dim = o_dim < D
    b_x = after_attention(
        p_gathered, gathered_stride, p_residual, D, p_out, p_rows, o_row, m_row, depth, eps, D, DEPTH, BLOCK_D, BLOCK_K
    )
    b_x += tl.load(p_cross + i_step * cross_stride + o_dim, mask=m_dim, other=0.0).to(tl.float32)[None, :]
    b_x = layer_norm(b_x, p_norm_2, p_norm_2 + BLOCK_D, eps, D, BLOCK_D)
    i_program = i_step * tl.num_programs(0) + tl.program_id(0)
    p_own = p_shared + (i_program * BLOCK_R + tl.arange(0, BLOCK_R)) * BLOCK_D
    b_x = feed_forward(b_x, p_own, p_up, p_up_bias, p_down, GELU, F, BLOCK_D, BLOCK_F, BLOCK_K)
    b_x += tl.load(p_rows + 3 * BLOCK_D + o_dim)[None, :]
    b_x = layer_norm(b_x, p_rows + 4 * BLOCK_D, p_rows + 5 * BLOCK_D, eps, D, BLOCK_D)
    if UPDATE:
        b_x = c_out * b_x
        if NOISE != 0:
            b_x += c_noise * _draw(
                p_noise,
                0,
                noise_row_stride,
                p_seed,
                p_row_key,
                p_sample,
                0,
                first_draw,
                o_row,
                m_row,
                NOISE,
                D,
                BLOCK_D,
            )
        if NORMALIZE:
            b_x = unit_rows(b_x)
    mask = m_row[:, None] & m_dim[None, :]
    tl.store(p_y + (i_step * n_rows + o_row)[:, None] * D + o_dim[None, :], b_x.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_draw", "n_steps", "n_users", "n_samples"])
def _update_kernel(
    p_means,
    p_coef,
    p_start,
    p_noise,
    p_seed,
    p_row_key,
    p_sample,
    p_x_0,
    start_stride,
    noise_step_stride,
    noise_row_stride,
    first_draw,
    n_steps,
    n_users,
    n_samples,
    START: tl.constexpr,
    NOISE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x_0 [n_users n_samples, D] from the means [n_steps, n_users, D]: all updates of a row, its state in registers."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < n_users * n_samples
    o_user = o_row // n_samples
    o_dim = tl.arange(0, BLOCK_D)
    mask = m_row[:, None] & (o_dim < D)[None, :]
    b_x = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if START != 0:
        b_x = _draw(p_start, 0, start_stride, p_seed, p_row_key, p_sample, 0, 0, o_row, m_row, START, D, BLOCK_D)
    for i in range(n_steps):
        i_step = tl.full([], i, tl.int64)
        c_out, c_xt, c_noise = tl.load(p_coef + 3 * i), tl.load(p_coef + 3 * i + 1), tl.load(p_coef + 3 * i + 2)
        p_mean = p_means + (i_step * n_users + o_user)[:, None] * D + o_dim[None, :]
        b_x = c_out * tl.load(p_mean, mask=mask, other=0.0) + tl.where(c_xt == 0.0, 0.0, c_xt * b_x)
        if NOISE != 0:  # noqa: SIM102 - decided when the kernel is compiled
            if c_noise != 0.0:
                b_x += c_noise * _draw(
                    p_noise,
                    noise_step_stride,
                    noise_row_stride,
                    p_seed,
                    p_row_key,
                    p_sample,
                    i_step,
                    first_draw + i,
                    o_row,
                    m_row,
                    NOISE,
                    D,
                    BLOCK_D,
                )
        if NORMALIZE:
            b_x = unit_rows(b_x)
    tl.store(p_x_0 + o_row[:, None] * D + o_dim[None, :], b_x.to(p_x_0.dtype.element_ty), mask=mask)


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
    starts = _NONE if table[first][1] == 0 else _PHILOX if isinstance(noise, PhiloxNoise) else _GIVEN
    x_t = noise.draw(0) if starts == _GIVEN else None
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
    kind, given, random = _NONE, unread.unsqueeze(0), (unread, unread, unread)
    if draws.given is not None:
        kind, given = _GIVEN, _last_dense(draws.given)
    elif draws.row_key is not None and draws.sample is not None:
        kind, random = _PHILOX, (device_int(draws.seed, device), draws.row_key.contiguous(), draws.sample.contiguous())

    at_once = n_steps == 1 and num_samples == 1 and starts == _NONE
    y = x_0 if at_once else torch.empty(n_steps, n_users, dim, device=device)
    finish, block_d = weights.finish, weights.finish.out.shape[1]
    key = (bucket(n_users * n_steps, least=16), block_d, dtype_key(dtype))
    config = choose("finish", key, finish_candidates, device)
    block_r = config.constants["BLOCK_R"]
    programs = triton.cdiv(n_users, block_r)
    c_out, _, c_noise = table[-1]
    _means_kernel[(programs, n_steps)](
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
        NOISE=kind if at_once and c_noise else _NONE,
        NORMALIZE=normalize,
        GELU=decoder.activation == "gelu",
        **finish.constants(),
        **config.launch(),
    )
    if not at_once:
        start = unread if x_t is None else _last_dense(x_t)
        rows = _rows_at_once(block_d)
        _update_kernel[(triton.cdiv(n_rows, rows),)](
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
            BLOCK_R=rows,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return x_0


def _attend(context: Tensor, decoder: ContextDecoder) -> Tensor:
    """What the heads gather [B, D] where users attend to each other."""
    projected = F.linear(context, *decoder.qkv)
    q, k, v = (split_heads(part.unsqueeze(0), decoder.n_heads) for part in projected.chunk(3, dim=-1))
    return merge_heads(F.scaled_dot_product_attention(q, k, v)).squeeze(0)


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_at_once(block_d: int) -> int:
    return max(1, _NUMBERS // block_d)


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
                    _means_kernel,
                    {**finish_types(dtype), **own, **random, **strides, **factors, "p_norm_2": "*fp32"},
                    {
                        **sizes,
                        **config.constants,
                        **{"DEPTH": dim, "F": dim, "UPDATE": True, "NOISE": _PHILOX, "NORMALIZE": False, "GELU": True},
                    },
                    config.options(),
                    tensor_core=dtype != "fp32",
                )
            for kind in (_GIVEN, _PHILOX):
                yield Case(
                    f"update {dtype} D={dim} {'philox' if kind == _PHILOX else 'given'}",
                    _update_kernel,
                    {
                        **random,
                        **{"p_means": "*fp32", "p_coef": "*fp32"},
                        **dict.fromkeys(("p_start", "p_noise", "p_x_0"), f"*{dtype}"),
                        **dict.fromkeys(("start_stride", "noise_step_stride", "noise_row_stride", "first_draw"), "i32"),
                        **dict.fromkeys(("n_steps", "n_users", "n_samples"), "i32"),
                    },
                    {**sizes, "START": kind, "NOISE": kind, "NORMALIZE": True, "BLOCK_R": _rows_at_once(dim)},
                    {"num_warps": 4},
                    divisible=("p_means", "p_start", "p_noise", "p_x_0"),  # a table's rows begin anywhere
                )
