"""The steps of decode_context in Triton: the means of all of them, and the walk of a row through its updates."""

from __future__ import annotations

import triton
import triton.language as tl

from fastdiff.kernels.normals import normal_rows
from fastdiff.kernels.padded_transformer import after_attention, feed_forward
from fastdiff.kernels.rows import layer_norm
from fastdiff.kernels.sampler_step import unit_rows

NONE, GIVEN, PHILOX = 0, 1, 2
"""Where draws come from."""


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
def means_kernel(
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
def update_kernel(
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
