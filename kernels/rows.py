"""What kernels do with a block of rows that a program keeps in registers: linear layers, norms, activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_dot(b_x, p_w, b_y, stride, TILE: tl.constexpr):
    """y + x W of rows x [R, K], y [R, N] float32; W [K, N] at p_w, a row every `stride`; all extents are whole blocks.

    The operands have the dtype of W, the sums are float32. W goes through shared memory in tiles of at most TILE
    numbers: where K N exceeds that, x is halved, in registers.
    """
    K: tl.constexpr = b_x.shape[1]
    N: tl.constexpr = b_y.shape[1]
    if K * N <= TILE or K <= 16:
        b_w = tl.load(p_w + tl.arange(0, K)[:, None] * stride + tl.arange(0, N)[None, :])
        b_y = tl.dot(b_x.to(b_w.dtype), b_w, b_y, input_precision="ieee")
    else:
        b_pairs = tl.permute(tl.reshape(b_x, [b_x.shape[0], 2, K // 2]), (0, 2, 1))
        b_low, b_high = tl.split(b_pairs)
        b_y = rows_dot(b_low, p_w, b_y, stride, TILE)
        b_y = rows_dot(b_high, p_w + (K // 2) * stride, b_y, stride, TILE)
    return b_y


@triton.jit
def linear_rows(b_x, p_layer, N: tl.constexpr, TILE: tl.constexpr):
    """x W + b [R, N] of rows x [R, K]; W [K, N] and then b [N] stand at p_layer."""
    b_bias = tl.load(p_layer + b_x.shape[1] * N + tl.arange(0, N)).to(tl.float32)
    b_y = tl.zeros([b_x.shape[0], N], tl.float32) + b_bias[None, :]
    return rows_dot(b_x, p_layer, b_y, N, TILE)


@triton.jit
def linear_rows_through(b_x, p_scratch, p_layer, n_in, N: tl.constexpr, stride, BLOCK_K: tl.constexpr, bias_at):
    """The same with x going through a scratch [R, K] float32 of the program, which its caches hold, so that a loop over
    K multiplies: float32 without matrix units keeps whole operands in registers, and a long stretch of products
    without a loop spills them. W has a row every `stride` numbers; b stands `bias_at` numbers behind its start.

    n_in  K again, as an argument of the launch: where it is known to the compiler, LLVM unrolls the loop"""
    R: tl.constexpr = b_x.shape[0]
    K: tl.constexpr = b_x.shape[1]
    o_row, o_out = tl.arange(0, R)[:, None], tl.arange(0, N)[None, :]
    tl.debug_barrier()  # what stood in the scratch has been read
    tl.store(p_scratch + o_row * K + tl.arange(0, K)[None, :], b_x)
    tl.debug_barrier()
    b_y = tl.zeros([R, N], tl.float32) + tl.load(p_layer + bias_at + tl.arange(0, N)).to(tl.float32)[None, :]
    for first in tl.range(0, n_in, BLOCK_K, num_stages=1):
        o_in = first + tl.arange(0, BLOCK_K)
        b_part = tl.load(p_scratch + o_row * K + o_in[None, :])
        b_w = tl.load(p_layer + o_in[:, None] * stride + o_out)
        b_y = tl.dot(b_part.to(b_w.dtype), b_w, b_y, input_precision="ieee")
    return b_y


@triton.jit
def layer_norm_rows(b_x, p_norm, eps, DIM: tl.constexpr):
    """LayerNorm over the first DIM of the rows' features; weight and then bias, each 0 beyond DIM, stand at p_norm."""
    BLOCK_D: tl.constexpr = b_x.shape[1]
    o_dim = tl.arange(0, BLOCK_D)
    b_mean = tl.sum(tl.where((o_dim < DIM)[None, :], b_x, 0.0), axis=1) / DIM
    b_centred = tl.where((o_dim < DIM)[None, :], b_x - b_mean[:, None], 0.0)
    b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, axis=1) / DIM + eps)
    b_weight, b_bias = tl.load(p_norm + o_dim).to(tl.float32), tl.load(p_norm + BLOCK_D + o_dim).to(tl.float32)
    return b_centred * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]


@triton.jit
def activate(b_h, KIND: tl.constexpr):
    """gelu (by erf), relu, silu or tanh; each leaves 0 at 0."""
    if KIND == "gelu":
        return 0.5 * b_h * (1.0 + tl.erf(b_h * 0.7071067811865476))
    elif KIND == "relu":
        return tl.maximum(b_h, 0.0)
    elif KIND == "silu":
        return b_h / (1.0 + tl.exp(-b_h))
    else:
        tl.static_assert(KIND == "tanh", "unknown activation")
        b_e = tl.exp(-2.0 * tl.abs(b_h))  # does not overflow
        b_tanh = (1.0 - b_e) / (1.0 + b_e)
        return tl.where(b_h < 0.0, -b_tanh, b_tanh)
