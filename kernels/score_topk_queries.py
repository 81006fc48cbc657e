"""The queries of score_topk in Triton, in the form of the product, each with its slack, its floor and its state."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
FORCED = tl.constexpr(1)
"""A query's state: it is scored by the definition throughout, because a scan could overflow or kept too much."""
NOT_FINITE = tl.constexpr(2)
OVERFLOWED = tl.constexpr(3)
"""A query's state between the scans: the first one kept too much."""

FACTORS = tl.constexpr(5)
"""Numbers per query: slack = f[0] residual + f[1] norm + f[2] of the scan and f[3] norm + f[2] of float32 sums, and the
scale f[4] of its whole numbers."""
LARGEST = tl.constexpr(2.0**126)

FLOATS, BFLOATS, BYTES, HALVES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""How rows are stored, as `topk_scan.STORED` numbers it."""
SINGLES = tl.constexpr(4)
"""float32 rows that are multiplied as they are: the second scan."""


@triton.jit
def ordered(b_score):
    """int32 whose order is that of the float32 numbers. No NaN, no -0."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(b_ordered):
    return (b_ordered ^ ((b_ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _up(value):
    """float64 to float32, never to a smaller number and never to a subnormal (`topk_scan._up`)."""
    return (value * (1.0 + 2.0**-20) + 2.0**-120).to(tl.float32)


@triton.jit
def rounded(b_x):
    """float32 rounded to the nearest bfloat16, ties to even, still in float32."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = b_bits + 0x7FFF + ((b_bits >> 16) & 1)
    return (b_bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _prepare_kernel(
    p_query,
    p_max_norm,
    p_operand,
    p_factors,
    p_floor,
    p_state,
    p_n_found,
    p_n_listed,
    dim,
    operand_dim,
    ALL_FORCED: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per query: its operand, its slack, its first floor and state."""
    i_query = tl.program_id(0).to(tl.int64)
    wide = tl.full([], dim, tl.float64)
    p_query += i_query * dim
    o_block = tl.arange(0, BLOCK_D)
    b_squares, b_largest = tl.zeros([BLOCK_D], tl.float64), tl.zeros([BLOCK_D], tl.float32)
    for d in range(0, dim, BLOCK_D):
        b_query = tl.load(p_query + d + o_block, mask=d + o_block < dim, other=0.0)
        b_squares += b_query.to(tl.float64) * b_query.to(tl.float64)
        b_largest = tl.maximum(b_largest, tl.abs(b_query))
    squares = tl.sum(b_squares, 0)
    # the squares of float32 numbers neither vanish nor overflow in float64: they are finite where the query is
    state = tl.where(squares < float("inf"), 0, NOT_FINITE)
    norm = tl.sqrt(tl.where(state == 0, squares, 1.0))
    max_norm = tl.full([], 0.0, tl.float64)
    if not ALL_FORCED:
        max_norm = tl.load(p_max_norm).to(tl.float64)
    largest = tl.max(b_largest, 0)
    scale = tl.full([], 1.0, tl.float32)
    if STORED == BYTES:
        scale = tl.maximum(largest / 127.0, 2.0**-60)
    if STORED == HALVES:  # the power of two that brings the largest number to 2^14 .. 2^15 (fastdiff/ops/topk_scan.py)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.maximum(power * 2.0**-14, 2.0**-60)
    b_squares = tl.zeros([BLOCK_D], tl.float64)
    for d in range(0, operand_dim, BLOCK_D):
        o_dim = d + o_block
        b_query = tl.load(p_query + o_dim, mask=o_dim < dim, other=0.0)
        b_query = tl.where(b_query == b_query, b_query, 0.0)
        if STORED == BYTES:
            b_scaled = tl.minimum(tl.maximum(b_query / scale, -127.0), 127.0)
            b_whole = (b_scaled + tl.where(b_scaled < 0.0, -0.5, 0.5)).to(tl.int32)
            b_lost = b_query.to(tl.float64) - b_whole.to(tl.float64) * scale.to(tl.float64)
            b_operand = b_whole.to(tl.int8)
        elif STORED == HALVES:
            b_operand = (b_query * (1.0 / scale)).to(tl.float16)
            b_lost = b_query.to(tl.float64) - b_operand.to(tl.float64) * scale.to(tl.float64)
        else:
            b_near = rounded(b_query)
            b_lost = b_query.to(tl.float64) - b_near.to(tl.float64)
            b_operand = b_near.to(p_operand.dtype.element_ty)
        b_squares += b_lost * b_lost
        tl.store(p_operand + i_query * operand_dim + o_dim, b_operand, mask=o_dim < operand_dim)
    lost = tl.sqrt(tl.sum(b_squares, 0))
    terms = wide + 16.0
    # matrix units may truncate their sums, so their unit is four times that of rounded float32; whole sums are exact
    unit = 2.0**-24 if STORED == BYTES else 2.0**-22
    gamma, plain_gamma = terms * unit / (1.0 - terms * unit), terms * 2.0**-24 / (1.0 - terms * 2.0**-24)
    p_factors += i_query * FACTORS
    tl.store(p_factors, _up(norm))
    tl.store(p_factors + 1, _up(lost + (norm + lost) * gamma))
    tl.store(p_factors + 2, _up(2.0**-124 * (2.0 * wide + 1.0 + tl.sqrt(wide) * (norm + max_norm))))
    tl.store(p_factors + 3, _up(norm * plain_gamma))
    tl.store(p_factors + 4, scale)
    forced = tl.maximum(norm, 1.0) * tl.maximum(max_norm, 1.0) >= LARGEST
    if ALL_FORCED:
        forced = norm >= 0.0
    state = tl.where((state == 0) & forced, FORCED, state)
    tl.store(p_state + i_query, state)
    tl.store(p_floor + i_query, tl.where(state == 0, LOWEST, float("inf")))
    tl.store(p_n_found + i_query, 0)
    tl.store(p_n_listed + tl.arange(0, 2), tl.zeros([2], tl.int32))  # every program the same
