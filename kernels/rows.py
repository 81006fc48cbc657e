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
def layer_norm(b_x, p_weight, p_bias, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """LayerNorm of rows [R, BLOCK_D] float32 that are 0 from column D on, and stay so."""
    o_dim = tl.arange(0, BLOCK_D)
    b_centred = b_x - (tl.sum(b_x, axis=1) / D)[:, None]
    if D != BLOCK_D:
        b_centred = tl.where((o_dim < D)[None, :], b_centred, 0.0)
    b_deviation = tl.sqrt_rn(tl.sum(b_centred * b_centred, axis=1) / D + eps)
    return b_centred / b_deviation[:, None] * tl.load(p_weight + o_dim)[None, :] + tl.load(p_bias + o_dim)[None, :]


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
