"""denoise_attention_loop in Triton: one program takes 16 rows through all steps.

A row is one pass of one sample; with guidance a sample's two passes are neighbours, hold the same x_t, and meet once
per step. Rows share a step's weights, which every program streams from L2 (2 (4 D^2 + 2 D F) bytes per block in half
precision); each reads the keys and values of its own user (4 D bytes per slot and block), so attention is no matrix
product: it is a loop over a few slots of all rows at once, slots first in the blocks so that sums over them stay within
a thread. Where there are few rows, each stands in a program several times, SHARES: all copies compute the same, but for
the slots, which they share out, and whose sums they join: 49 slots take one turn of the loop, not 13. x_t, the residual
stream, norms, softmax and the update are float32 and never leave the registers: what goes to memory in S steps is x_0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.kernels.causal_transformer import (
    CASES,
    DTYPES,
    BlockSizes,
    finish_block,
    packed_blocks,
    project,
    share,
    stage_bytes,
)
from fastdiff.kernels.normals import normal_rows
from fastdiff.kernels.packing import coef_on
from fastdiff.kernels.padded_transformer import dtype_key
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import device_int, rows_together
from fastdiff.kernels.sampler_step import unit_rows
from fastdiff.kernels.tuning import Config, Key, Problem, bucket, choose
from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.causal_transformer import BlockWeights
from fastdiff.ops.denoise_attention_loop import CausalPrefix
from fastdiff.ops.step_noise import step_noise

_ROWS = 16  # of a program: the least that a matrix unit takes
_PROGRAMS = 64
"""Programs that weights can be streamed to about as fast as to one (an L2 of 5.5 TB/s, 112 GB/s to a processor); up to
that many, rows have copies."""


@triton.jit(do_not_specialize=["n_rows", "samples", "n_users", "n_slots", "n_steps", "n_blocks"])
def _denoise_attention_loop_kernel(
    p_x_t,
    p_x_0,
    p_cond,
    p_time,
    p_coef,
    p_matrices,
    p_vectors,
    p_keys_values,
    p_lengths,
    p_ends,
    p_pad,
    p_log_pads,
    p_uniform,
    p_noise,
    p_seed,
    p_row_key,
    p_sample,
    p_scratch,
    noise_step_stride,
    noise_row_stride,
    n_rows,
    samples,
    n_users,
    n_slots,
    n_steps,
    n_blocks,
    guidance_scale,
    input_scale,
    eps,
    G: tl.constexpr,
    SHARES: tl.constexpr,
    UNIFORM: tl.constexpr,
    PHILOX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DH: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    BLOCK_E: tl.constexpr = BLOCK_H * BLOCK_DH
    o_share, o_pass = tl.arange(0, BLOCK_R) % SHARES, tl.arange(0, BLOCK_R) // SHARES % G
    o_row = tl.program_id(0).to(tl.int64) * (BLOCK_R // (G * SHARES)) + tl.arange(0, BLOCK_R) // (G * SHARES)
    o_dim = tl.arange(0, BLOCK_D)
    m_row = o_row < n_rows
    mask = m_row[:, None] & (o_dim < D)[None, :]
    o_user = o_row // samples
    b_length = tl.load(p_lengths + o_user, mask=m_row, other=0)
    b_first = tl.load(p_ends + o_user, mask=m_row, other=0) - b_length
    b_log_pads = tl.load(p_log_pads + o_user, mask=m_row, other=0.0).to(tl.float32)
    if SHARES > 1:
        b_log_pads = tl.where(o_share == 0, b_log_pads, float("-inf"))
    b_even = m_row
    if UNIFORM:
        b_even = tl.load(p_uniform + o_user, mask=m_row, other=0) != 0
    b_x = tl.load(p_x_t + o_row[:, None] * D + o_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    b_cond = tl.load(p_cond + (o_pass * n_users + o_user)[:, None] * D + o_dim[None, :], mask=mask, other=0.0)
    # A program's own rows of three kinds: two barriers lie between a use of one and its next filling.
    o_scratch = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)) * (2 * BLOCK_D + BLOCK_E)
    p_shared = p_scratch + o_scratch
    p_normed, p_gathered = p_shared + BLOCK_D, p_shared + 2 * BLOCK_D
    for step in range(n_steps):
        b_time = tl.load(p_time + step * D + o_dim, mask=o_dim < D, other=0.0).to(tl.float32)
        b_h = b_cond.to(tl.float32) + b_time[None, :] + input_scale * b_x
        for layer in range(n_blocks):
            p_layer = p_matrices + layer * (4 * BLOCK_D * BLOCK_E + 2 * BLOCK_D * F)
            p_biases = p_vectors + layer * (3 * BLOCK_E + 6 * BLOCK_D + F)
            i_cache = (layer * G + o_pass).to(tl.int64)
            share(p_shared, b_h)
            b_query, b_key, b_value = project(p_shared, p_layer, p_biases, True, BLOCK_R, BLOCK_D, BLOCK_E, BLOCK_K)
            if UNIFORM:
                b_query = tl.where(b_even[:, None], 0.0, b_query)
            b_attended = _attend(
                tl.reshape(b_query, [BLOCK_R, BLOCK_H, BLOCK_DH]),
                tl.reshape(b_key, [BLOCK_R, BLOCK_H, BLOCK_DH]),
                tl.reshape(b_value, [BLOCK_R, BLOCK_H, BLOCK_DH]),
                p_pad + i_cache * (2 * D),
                b_log_pads,
                p_keys_values + (i_cache * n_slots + b_first) * (2 * D),
                b_length,
                o_share,
                SHARES,
                H,
                DH,
                BLOCK_P,
            )
            share(p_gathered, tl.reshape(b_attended, [BLOCK_R, BLOCK_E]))
            b_h = finish_block(
                b_h, p_gathered, p_normed, p_layer, p_biases, eps, D, F, BLOCK_D, BLOCK_E, BLOCK_F, BLOCK_K
            )
        if G == 2:  # u + g (c - u), in both of a sample's rows
            b_share = tl.where(o_pass == 0, guidance_scale, 1.0 - guidance_scale)
            b_pair = tl.reshape(b_h * b_share[:, None], [BLOCK_R // (2 * SHARES), 2, SHARES * BLOCK_D])
            b_both = tl.broadcast_to(tl.sum(b_pair, axis=1)[:, None, :], b_pair.shape)
            b_h = tl.reshape(b_both, [BLOCK_R, BLOCK_D])
        c_noise = tl.load(p_coef + step * 3 + 2)
        b_x = tl.load(p_coef + step * 3) * b_h + tl.load(p_coef + step * 3 + 1) * b_x
        if c_noise != 0.0:  # a step without noise may have no draw
            if PHILOX:
                b_row_key = tl.load(p_row_key + o_row, mask=m_row, other=0)
                b_sample = tl.load(p_sample + o_row, mask=m_row, other=0)
                b_noise = normal_rows(tl.load(p_seed), b_row_key, b_sample, 1 + step, BLOCK_D)
                b_noise = tl.where(mask, b_noise, 0.0)
            else:
                p_draw = p_noise + tl.full([], step, tl.int64) * noise_step_stride
                p_draw += o_row[:, None] * noise_row_stride + o_dim[None, :]
                b_noise = tl.load(p_draw, mask=mask, other=0.0).to(tl.float32)
            b_x += c_noise * b_noise
        if NORMALIZE:
            b_x = unit_rows(b_x)
    p_out = p_x_0 + o_row[:, None] * D + o_dim[None, :]
    tl.store(p_out, b_x.to(p_x_0.dtype.element_ty), mask=mask & ((o_pass == 0) & (o_share == 0))[:, None])


@triton.jit
def _attend(
    b_query,
    b_key,
    b_value,
    p_pad,
    b_log_pads,
    p_keys_values,
    b_length,
    o_share,
    SHARES: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Each row's query over its user's cached keys, the pads' key and its own: all [R, H, D / H] float32.

    p_pad [R], p_keys_values [R]: where the pads' key and the first slot's key stand, each row's own
    o_share [R]: which of its row's slots a copy takes, every SHARES-th; the first one has the pads and its own key too
    """
    BLOCK_H: tl.constexpr = b_query.shape[1]
    BLOCK_DH: tl.constexpr = b_query.shape[2]
    o_head, o_within = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_DH)[None, :]
    o_column = o_head * DH + o_within
    m_column = (o_head < H) & (o_within < DH)

    b_most = tl.sum(b_query * b_key, axis=2)  # the token's own logit starts the running softmax
    m_pad = (b_log_pads > float("-inf"))[:, None, None] & m_column[None, :, :]
    b_pad_key = tl.load(p_pad[:, None, None] + o_column[None, :, :], mask=m_pad, other=0.0).to(tl.float32)
    b_pad_value = tl.load(p_pad[:, None, None] + H * DH + o_column[None, :, :], mask=m_pad, other=0.0).to(tl.float32)
    b_logit = tl.sum(b_query * b_pad_key, axis=2) + b_log_pads[:, None]
    b_highest = tl.maximum(b_most, b_logit)
    b_own, b_pad = tl.exp(b_most - b_highest), tl.exp(b_logit - b_highest)
    if SHARES > 1:
        b_own = tl.where((o_share == 0)[:, None], b_own, 0.0)
    b_most, b_weights = b_highest, b_own + b_pad
    b_sum = b_own[:, :, None] * b_value + b_pad[:, :, None] * b_pad_value

    for first in range(0, tl.max(b_length, axis=0), BLOCK_P * SHARES):
        o_slot = first + tl.arange(0, BLOCK_P)[:, None] * SHARES + o_share[None, :]
        m_slot = o_slot < b_length[None, :]
        p_slot = p_keys_values[None, :] + o_slot * (2 * H * DH)
        m_key = m_slot[:, :, None, None] & m_column[None, None, :, :]
        p_key = p_slot[:, :, None, None] + o_column[None, None, :, :]
        b_keys = tl.load(p_key, mask=m_key, other=0.0).to(tl.float32)  # [P, R, H, D / H]
        b_values = tl.load(p_key + H * DH, mask=m_key, other=0.0).to(tl.float32)
        b_logits = tl.sum(b_query[None, :, :, :] * b_keys, axis=3)
        b_logits = tl.where(m_slot[:, :, None], b_logits, float("-inf"))
        b_highest = tl.maximum(b_most, tl.max(b_logits, axis=0))
        b_before = tl.exp(b_most - b_highest)
        b_shares = tl.exp(b_logits - b_highest[None, :, :])
        b_weights = b_weights * b_before + tl.sum(b_shares, axis=0)
        b_sum = b_sum * b_before[:, :, None] + tl.sum(b_shares[:, :, :, None] * b_values, axis=0)
        b_most = b_highest
    if SHARES > 1:
        b_highest = _joined(b_most, SHARES, True)
        b_before = tl.exp(b_most - b_highest)
        b_weights = _joined(b_weights * b_before, SHARES, False)
        b_wide = tl.reshape(b_sum * b_before[:, :, None], [b_sum.shape[0], BLOCK_H * BLOCK_DH])
        b_sum = tl.reshape(_joined(b_wide, SHARES, False), b_sum.shape)
    return b_sum / b_weights[:, :, None]


@triton.jit
def _joined(b_x, SHARES: tl.constexpr, MAX: tl.constexpr):
    """The largest, or the sum, of what SHARES neighbouring rows of [R, K] hold, in all of them."""
    R: tl.constexpr = b_x.shape[0]
    K: tl.constexpr = b_x.shape[1]
    b_parts = tl.reshape(b_x, [R // SHARES, SHARES, K])
    b_all = tl.max(b_parts, axis=1) if MAX else tl.sum(b_parts, axis=1)
    return tl.reshape(tl.broadcast_to(b_all[:, None, :], [R // SHARES, SHARES, K]), [R, K])


def denoise_attention_loop(
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
    """See `fastdiff.ops.denoise_attention_loop.denoise_attention_loop_ref`."""
    n_rows, n_users = x_t.shape[0], prefix.n_users
    if n_rows % max(n_users, 1):
        raise InvalidArgument(
            f"denoise_attention_loop: x_t must hold the same number of rows for each of the prefix's {n_users} "
            f"users (got {n_rows} rows)"
        )
    x_0 = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    draws = step_noise(noise, coef)
    if x_0.numel() == 0:
        return x_0
    stack, device = packed_blocks(blocks), x_t.device
    passes = prefix.cond.shape[0]
    x_t = x_t.contiguous()
    lengths = prefix.lengths.contiguous()
    given, seed, row_key, sample = x_t, lengths, lengths, lengths  # what is not read
    if draws.given is not None:
        given = rows_together(draws.given)
    if draws.row_key is not None and draws.sample is not None:
        seed, row_key, sample = device_int(draws.seed, device), draws.row_key.contiguous(), draws.sample.contiguous()
    config = choose("denoise_attention_loop", _key(n_rows * passes, stack.sizes, x_t.dtype), _candidates, device)
    programs = triton.cdiv(n_rows * passes * config.constants["SHARES"], _ROWS)
    scratch = x_t.new_empty(programs * _ROWS * (2 * stack.sizes.block_d + stack.sizes.block_e))
    _denoise_attention_loop_kernel[(programs,)](
        x_t,
        x_0,
        prefix.cond.contiguous(),
        time.contiguous(),
        coef_on(coef, device),
        stack.matrices,
        stack.vectors,
        prefix.keys_values.contiguous(),
        lengths,
        lengths.cumsum(0),
        prefix.pad.contiguous(),
        prefix.log_pads.contiguous(),
        lengths if prefix.uniform is None else prefix.uniform.contiguous().view(torch.uint8),
        given,
        seed,
        row_key,
        sample,
        scratch,
        given.stride(0),
        given.stride(-2),
        n_rows,
        n_rows // n_users,
        n_users,
        prefix.keys_values.shape[2],
        coef.shape[0],
        len(blocks),
        guidance_scale,
        input_scale,
        stack.eps,
        G=passes,
        UNIFORM=prefix.uniform is not None,
        PHILOX=draws.row_key is not None,
        NORMALIZE=normalize,
        BLOCK_R=_ROWS,
        **stack.sizes.constants(),
        **config.launch(),
    )
    return x_0


def _key(rows: int, sizes: BlockSizes, dtype: torch.dtype) -> Key:
    return bucket(rows, most=4096), sizes.block_d, sizes.block_e, sizes.padded_hidden, dtype_key(dtype)


def _candidates(rows: int, block_d: int, block_e: int, padded_hidden: int, dtype: str) -> list[Config]:
    """Copies of rows, tiles of weights and slots. With a warp for every 16 of a row's dims, the slots of a tile lie in
    one thread; then another number of copies, of hidden units, of warps and of slots, for a GPU to say; of wide blocks,
    the smallest tiles, for smaller GPUs.

    rows  of all passes: an even number of them where there are two
    """
    half, wide = dtype != "float32", block_d > 128
    num_warps = min(8, max(4, block_e // 16))
    block_p = 4 if half and not wide else 2
    block_f = min(padded_hidden, (32 if wide else 64) if half else 16)
    block_k = 32 if half and block_d >= 32 else 16
    most = _ROWS if rows == 1 else _ROWS // 2
    shares = min(most, max(1, _PROGRAMS * _ROWS // rows))
    more = half and 2 * block_f <= min(128, padded_hidden)
    others = [other for other in (shares // 2, 2 * shares) if 1 <= other <= most]

    def config(warps: int, block_p: int, block_f: int, block_k: int, shares: int = shares, stages: int = 3) -> Config:
        # else ptxas spills to make room for another program; with 8 warps it chooses better but for bfloat16
        registers = 255 if warps == 4 or dtype == "bfloat16" else None
        blocks = {"SHARES": shares, "BLOCK_F": block_f, "BLOCK_K": block_k, "BLOCK_P": block_p}
        shared = (stages - 1) * stage_bytes(_ROWS, block_f, block_k, block_d, block_e, 2 if half else 4)
        return Config(blocks, warps, stages, maxnreg=registers, shared=shared)

    return [
        config(num_warps, block_p, block_f, block_k),
        *(config(num_warps, block_p, block_f, block_k, other) for other in others),
        *([config(num_warps, block_p, 2 * block_f, block_k)] if more else []),
        config(12 - num_warps, block_p, block_f, block_k),
        config(num_warps, 6 - block_p, block_f, block_k),
        *([config(num_warps, block_p, 16, 16, stages=2)] if wide else []),
    ]


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times: ADRec's published sizes, windows full."""
    dim, heads, slots, n_blocks = 128, 4, 49, 2
    for dtype in DTYPES.values():
        for users, steps in ((1, 32), (256, 32), (1024, 32), (2048, 32)):

            def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                scale = 1.0 / float(shape[-1]) ** 0.5
                values: Tensor = (scale * torch.randn(*shape, device=device)).to(dtype)
                return values

            ones, zeros = torch.ones(dim, dtype=dtype, device=device), torch.zeros(3 * dim, dtype=dtype, device=device)
            block = BlockWeights(
                *(drawn(3 * dim, dim), zeros, drawn(dim, dim), zeros[:dim], (ones, zeros[:dim])),
                *(drawn(4 * dim, dim), drawn(4 * dim), drawn(dim, 4 * dim), zeros[:dim], (ones, zeros[:dim])),
                n_heads=heads,
            )
            prefix = CausalPrefix(
                drawn(1, users, dim),
                drawn(n_blocks, 1, users * slots, 2 * dim),
                torch.full((users,), slots, device=device),
                drawn(n_blocks, 1, 2 * dim),
                torch.zeros(users, dtype=dtype, device=device),
                None,
                heads,
            )
            keys = torch.arange(users, device=device)
            coef = torch.full((steps, 3), 0.3, dtype=torch.float64)
            noise = PhiloxNoise(1, keys, keys * 0, dim, dtype)
            x_t, time = drawn(users, dim), drawn(steps, dim)
            arguments = (x_t, (block,) * n_blocks, prefix, 1.0, 0.001, time, coef, False, noise)
            key = _key(users, BlockSizes.of(block), dtype)
            run = partial(denoise_attention_loop, *arguments)
            yield Problem("denoise_attention_loop", key, _candidates(*key), run)  # type: ignore[arg-type]


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    for name, sizes in CASES:
        for passes in (1, 2):
            floating = ("x_t", "x_0", "cond", "time", "matrices", "keys_values", "pad", "log_pads", "noise", "scratch")
            kinds = {"G": passes, "UNIFORM": True, "PHILOX": passes == 1, "NORMALIZE": passes == 2, "BLOCK_R": _ROWS}
            few, many = (
                _candidates(rows, sizes.block_d, sizes.block_e, sizes.padded_hidden, dtype_key(DTYPES[name]))
                for rows in (passes, 4096)
            )
            tuned = passes == 1 and sizes.dim == 128 and name != "bf16"  # what is tuned, but for float16's twin
            smallest = few[-1:] if passes == 1 and sizes.block_d > 128 else []
            for i, config in enumerate([few[0], many[0], *(few[1:] if tuned else smallest)]):
                yield Case(
                    f"{name} D={sizes.dim} H={sizes.n_heads} G={passes} {'philox' if passes == 1 else 'given'}"
                    + f" {config.words()}",
                    _denoise_attention_loop_kernel,
                    {
                        **{f"p_{key}": f"*{name}" for key in floating},
                        **dict.fromkeys(("p_coef", "p_vectors"), "*fp32"),
                        **dict.fromkeys(("p_lengths", "p_ends", "p_seed", "p_row_key", "p_sample"), "*i64"),
                        "p_uniform": "*u8",
                        **dict.fromkeys(("noise_step_stride", "noise_row_stride", "n_rows", "samples"), "i32"),
                        **dict.fromkeys(("n_users", "n_slots", "n_steps", "n_blocks"), "i32"),
                        **dict.fromkeys(("guidance_scale", "input_scale", "eps"), "fp32"),
                    },
                    {**kinds, **sizes.constants(), **config.constants},
                    config.options(),
                    # of few rows a number or two may be read from memory, once a step; others are taken where faster
                    hot=sizes.dim <= 128 and i == 1,
                    tensor_core=name != "fp32",
                )
