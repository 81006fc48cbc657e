"""Normal draws inside a kernel: the counters and the transform of `fastdiff.ops.philox_normals`."""

from __future__ import annotations

import triton
import triton.language as tl

_TWO_PI = tl.constexpr(6.2831855)
_SCALE = tl.constexpr(2.0**-24)


@triton.jit
def normal_rows(seed, b_row_key, b_sample, draw, BLOCK_D: tl.constexpr, first=0):
    """Draw number `draw` of some rows, dims first .. first + BLOCK_D - 1: [R, BLOCK_D] float32.

    seed  int64   b_row_key, b_sample  [R] int64   draw  an integer below 2^32   first  a multiple of 4
    BLOCK_D  a power of two, at least 4; dims beyond the row's own are draws that nobody reads
    """
    o_block = (tl.arange(0, BLOCK_D // 4) + first // 4).to(tl.uint32)[None, :]
    zero = tl.zeros([b_row_key.shape[0], BLOCK_D // 4], tl.uint32)
    c_low = zero + (b_row_key & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c_high = zero + ((b_row_key >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c_draw = (zero + draw).to(tl.uint32)
    c_place = zero + ((b_sample << 16).to(tl.uint32)[:, None] | o_block)
    b_w0, b_w1, b_w2, b_w3 = tl.philox(seed, c_low, c_high, c_draw, c_place)
    b_n0, b_n1 = _box_muller(b_w0, b_w1)
    b_n2, b_n3 = _box_muller(b_w2, b_w3)
    b_quads = tl.join(
        tl.join(b_n0, b_n2), tl.join(b_n1, b_n3)
    )  # [R, BLOCK_D / 4, 2, 2]: n0 n1 n2 n3, one after another
    return tl.reshape(b_quads, [b_row_key.shape[0], BLOCK_D])


@triton.jit
def draw_rows(seed, b_row_key, b_sample, draw, mask, DTYPE: tl.constexpr, first=0):
    """The same as `fastdiff.noise.PhiloxNoise` gives it in a run of DTYPE: [R, D] float32, 0 where `mask` is 0."""
    b_normals = normal_rows(seed, b_row_key, b_sample, draw, mask.shape[1], first).to(DTYPE)
    return tl.where(mask, b_normals.to(tl.float32), 0.0)


@triton.jit
def _box_muller(b_a, b_b):
    b_u = ((b_a >> 8) + 1).to(tl.float32) * _SCALE
    b_v = (b_b >> 8).to(tl.float32) * _SCALE
    b_radius = tl.sqrt_rn(-2.0 * tl.log(b_u))  # not sqrt, which Triton approximates
    b_cos, b_sin = _cos_sin(b_v * _TWO_PI)
    return b_radius * b_cos, b_radius * b_sin


@triton.jit
def _cos_sin(b_angle):
    """cos and sin of 0 .. 2 pi to 2 ulp: Cody and Waite's reduction to a quadrant, whose products are exact, and the
    polynomials of Cephes. CUDA's own keep an array in local memory for angles that never come up here."""
    b_quadrant = (b_angle * 0.63661977 + 0.5).to(tl.int32)
    b_n = b_quadrant.to(tl.float32)
    b_x = ((b_angle - b_n * 1.5703125) - b_n * 4.837512969970703e-4) - b_n * 7.549789948768648e-8
    b_z = b_x * b_x
    b_sin = b_x + b_x * b_z * (-1.6666654611e-1 + b_z * (8.3321608736e-3 + b_z * -1.9515295891e-4))
    b_cos = 1.0 - 0.5 * b_z
    b_cos += b_z * b_z * (4.166664568298827e-2 + b_z * (-1.388731625493765e-3 + b_z * 2.443315711809948e-5))
    b_odd = (b_quadrant & 1) == 1
    b_first, b_second = tl.where(b_odd, b_sin, b_cos), tl.where(b_odd, b_cos, b_sin)
    b_first = tl.where(((b_quadrant + 1) & 2) == 2, -b_first, b_first)
    b_second = tl.where((b_quadrant & 2) == 2, -b_second, b_second)
    return b_first, b_second
