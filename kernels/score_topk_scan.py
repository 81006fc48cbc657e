"""The scan of score_topk in Triton: queries in the form of the product, and which groups of rows may hold a best one.

Rows lie in groups of 8 to 64, never across a block of 64 that shares a bound (fastdiff/ops/topk_scan.py). The scan
keeps, of each query, the groups whose highest score may reach its floor: one number per group, so that the epilogue
costs one maximum per score, and the few groups kept are opened later (score_topk_exact.py). What is kept are entries

    (bits of highest score - slack, in order) << 32  |  group

Every program counts its own entries of each query in registers and writes them to a place of its own: nothing is
cleared before or added up between programs, and no warp waits for the answer of an atomic.

Floats are scanned in bfloat16, float16 and whole numbers as they are; sums in float32 or int32. Few queries are the
columns of the product and the rows of the table its rows, so that a tile of the matrix units is as narrow as the batch;
many queries are its rows, where a group's maximum is mostly taken inside a thread.

The second scan (`_rescan_kernel`) is for queries of whom the first kept too much: their scores lie closer together than
its products tell apart, or its sample misled it. It takes float32 products of the item table itself, whose error is
some hundred times smaller, and other tiles for its sample.

Numbers of a row, of a query's entries and of the table may be more than 2^31: the rows of a tile are addressed in int32
from the tile's first, and whatever that or a query's number is multiplied with is int64.
"""

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
def _rounded(b_x):
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
    wide = tl.to_tensor(dim).to(tl.float64)
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
            b_near = _rounded(b_query)
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


@triton.jit
def _rows(p_rows, row_stride, o_row, o_dim, dim, STORED: tl.constexpr, WIDE: tl.constexpr):
    """Rows of the table in the form of the product, [R, BLOCK_D]; beyond `dim` is anything that is finite."""
    p_row = p_rows + o_row[:, None] * row_stride + o_dim[None, :]
    b_rows = tl.load(p_row, mask=(o_dim < dim)[None, :], other=0)
    if STORED == FLOATS:
        b_rows = _rounded(b_rows) if WIDE else b_rows.to(tl.bfloat16)
    elif STORED == BYTES:
        b_rows = (b_rows ^ 0x80).to(tl.int8, bitcast=True)  # 128 + the whole number -> the whole number
    elif STORED == BFLOATS and WIDE:
        b_rows = (b_rows.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return b_rows


@triton.jit
def _operand(p_operand, o_query, m_query, o_dim, operand_dim):
    mask = m_query[:, None] & (o_dim < operand_dim)[None, :]
    return tl.load(p_operand + o_query[:, None] * operand_dim + o_dim[None, :], mask=mask, other=0)


@triton.jit
def _product(b_query, b_rows, b_sums, ITEMS_FIRST: tl.constexpr):
    """b_sums + the products, [queries, rows] or, ITEMS_FIRST, [rows, queries]."""
    b_left, b_right = b_query, b_rows
    if ITEMS_FIRST:
        b_left, b_right = b_rows, b_query
    return tl.dot(b_left, tl.trans(b_right), b_sums, input_precision="ieee", out_dtype=b_sums.dtype)


@triton.jit
def _scan_tiles(
    p_operand,
    p_factors,
    p_floor,
    p_rows,
    p_chunks,
    p_bounds,
    p_allowed,
    p_entries,
    p_counts,
    o_query,
    m_query,
    n_rows,
    dim,
    operand_dim,
    row_stride,
    start,
    step,
    n_visited,
    slots,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    CERTIFIED: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    ITEMS_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_STEP: tl.constexpr,
):
    """Entries of the queries o_query [BLOCK_Q] int64 from this program's share of the tiles start, start + step .."""
    i_program, n_programs = tl.program_id(1), tl.num_programs(1)
    p_factor = p_factors + o_query * FACTORS
    if CERTIFIED:
        b_by_residual = tl.load(p_factor, mask=m_query, other=0.0)[:, None]
        b_by_norm = tl.load(p_factor + (3 if STORED == SINGLES else 1), mask=m_query, other=0.0)[:, None]
        b_tiny = tl.load(p_factor + 2, mask=m_query, other=0.0)[:, None]
    b_scale = tl.load(p_factor + 4, mask=m_query, other=1.0)[:, None]
    b_floor = tl.load(p_floor + o_query, mask=m_query, other=float("inf"))[:, None]
    o_dim = tl.arange(0, BLOCK_D)
    if ONE_STEP:
        b_query = _operand(p_operand, o_query, m_query, o_dim, operand_dim)
    SCALED: tl.constexpr = STORED >= BYTES and STORED <= HALVES
    SUM: tl.constexpr = tl.int32 if STORED == BYTES else tl.float32
    N_GROUPS: tl.constexpr = BLOCK_N // GROUP
    o_row, o_group = tl.arange(0, BLOCK_N), tl.arange(0, N_GROUPS)
    p_entry = p_entries + (o_query * n_programs + i_program)[:, None] * slots
    b_count = tl.zeros([BLOCK_Q], tl.int32)
    if CHUNK > 0:
        chunk = tl.load(p_chunks + (start + i_program * step) * BLOCK_N // CHUNK, mask=i_program < n_visited, other=0)
    for i in range(i_program, n_visited, n_programs):
        first = (start + tl.to_tensor(i).to(tl.int32) * step) * BLOCK_N
        # rows beyond the last are the last once more, which changes no maximum
        b_row = tl.minimum(o_row, n_rows - 1 - first)
        p_tile = p_rows + first.to(tl.int64) * row_stride
        if CHUNK > 0:
            # where the chunk lies was loaded a tile ago: rows whose address is loaded just before are not prefetched
            p_tile = p_rows + chunk * 16 + (first % CHUNK).to(tl.int64) * row_stride
            behind = first + n_programs * step * BLOCK_N
            chunk = tl.load(p_chunks + behind // CHUNK, mask=i + n_programs < n_visited, other=0)
        # what the sums are compared with is under way while they are made; rows that are not allowed are read for the
        # same reason: whether they are is known only later
        m_inside = o_group * GROUP < n_rows - first
        p_bound = p_bounds + (first // 64 + o_group * GROUP // 64) * 4
        if CERTIFIED:
            b_norm = tl.load(p_bound, mask=m_inside, other=0.0)[None, :]
            b_slack = b_by_norm * b_norm + b_tiny
            if STORED != SINGLES:
                b_slack += b_by_residual * tl.load(p_bound + 1, mask=m_inside, other=0.0)[None, :]
        if SCALED:
            b_unit = b_scale * tl.load(p_bound + 2, mask=m_inside, other=1.0)[None, :]
        if HAS_ALLOWED:
            m_row = tl.load(p_allowed + first + b_row) != 0
        b_sums = tl.zeros([BLOCK_N, BLOCK_Q] if ITEMS_FIRST else [BLOCK_Q, BLOCK_N], SUM)
        if ONE_STEP:
            b_rows = _rows(p_tile, row_stride, b_row, o_dim, dim, STORED, WIDE)
            b_sums = _product(b_query, b_rows, b_sums, ITEMS_FIRST)
        else:
            for d in range(0, dim, BLOCK_D):
                b_rows = _rows(p_tile, row_stride, b_row, d + o_dim, dim, STORED, WIDE)
                b_part = _operand(p_operand, o_query, m_query, d + o_dim, operand_dim)
                b_sums = _product(b_part, b_rows, b_sums, ITEMS_FIRST)
        if HAS_ALLOWED:
            none = -2147483648 if STORED == BYTES else float("-inf")
            b_sums = tl.where(m_row[:, None] if ITEMS_FIRST else m_row[None, :], b_sums, none)
        if ITEMS_FIRST:
            b_best = tl.trans(tl.max(tl.reshape(b_sums, [N_GROUPS, GROUP, BLOCK_Q]), 1))
        else:
            b_best = tl.max(tl.reshape(b_sums, [BLOCK_Q, N_GROUPS, GROUP]), 2)
        m_group = m_inside[None, :]
        b_high = b_best.to(tl.float32)
        if HAS_ALLOWED:
            m_group = m_group & (b_best != none)
        if SCALED:
            b_high *= b_unit
        b_low = b_high
        if CERTIFIED:
            b_low, b_high = b_high - b_slack, b_high + b_slack
        m_kept = m_group & (b_high >= b_floor) & m_query[:, None]
        b_kept = m_kept.to(tl.int32)
        b_entry = (ordered(b_low).to(tl.int64) << 32) | (first // GROUP + o_group)[None, :]
        b_slot = b_count[:, None]
        if N_GROUPS > 1:
            m_before = o_group[None, :, None] < o_group[None, None, :]  # a scan along so few costs more, and a stack
            b_slot += tl.sum(tl.where(m_before, b_kept[:, :, None], 0), 1)
        tl.store(p_entry + b_slot, b_entry, mask=m_kept & (b_slot < slots))
        b_count += tl.sum(b_kept, 1)
    tl.store(p_counts + o_query * n_programs + i_program, b_count, mask=m_query)


@triton.jit
def _scan_kernel(
    p_operand,
    p_factors,
    p_floor,
    p_rows,
    p_chunks,
    p_bounds,
    p_allowed,
    p_entries,
    p_counts,
    n_queries,
    n_rows,
    dim,
    operand_dim,
    row_stride,
    n_visited,
    step,
    slots,
    STORED: tl.constexpr,
    WIDE: tl.constexpr,
    CERTIFIED: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    ITEMS_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_STEP: tl.constexpr,
):
    """Entries of BLOCK_Q queries from tiles 0, step, 2 step .. of the table, shared out over the second axis.

    p_rows, p_chunks  row r is row r % CHUNK of what lies 16 p_chunks[r // CHUNK] numbers behind p_rows; one chunk:
                      CHUNK 0
    p_entries         [n_queries, programs, slots] int64;  p_counts [n_queries, programs] int32, above `slots` where
                      entries were lost
    ONE_STEP          a row is one block of the product, so that queries stay where they are
    """
    o_query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    _scan_tiles(
        p_operand,
        p_factors,
        p_floor,
        p_rows,
        p_chunks,
        p_bounds,
        p_allowed,
        p_entries,
        p_counts,
        o_query,
        o_query < n_queries,
        n_rows,
        dim,
        operand_dim,
        row_stride,
        0,
        step,
        n_visited,
        slots,
        STORED,
        WIDE,
        CERTIFIED,
        HAS_ALLOWED,
        ITEMS_FIRST,
        CHUNK,
        GROUP,
        BLOCK_Q,
        BLOCK_N,
        BLOCK_D,
        ONE_STEP,
    )


@triton.jit
def _rescan_kernel(
    p_query,
    p_factors,
    p_floor,
    p_items,
    p_bounds,
    p_allowed,
    p_entries,
    p_counts,
    p_listed,
    p_n_listed,
    n_rows,
    dim,
    item_stride,
    start,
    step,
    n_visited,
    slots,
    HAS_ALLOWED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same of the queries listed, BLOCK_Q at a time, in float32; where there are none, every program ends at once.

    p_listed  int32, how many: p_n_listed [1]
    """
    n_listed = tl.load(p_n_listed)
    for i in range(0, n_listed, BLOCK_Q):
        o_listed = i + tl.arange(0, BLOCK_Q)
        o_query = tl.load(p_listed + o_listed, mask=o_listed < n_listed, other=0).to(tl.int64)
        _scan_tiles(
            p_query,
            p_factors,
            p_floor,
            p_items,
            p_items,  # of one chunk
            p_bounds,
            p_allowed,
            p_entries,
            p_counts,
            o_query,
            o_listed < n_listed,
            n_rows,
            dim,
            dim,
            item_stride,
            start,
            step,
            n_visited,
            slots,
            SINGLES,
            False,
            True,
            HAS_ALLOWED,
            False,
            0,
            GROUP,
            BLOCK_Q,
            BLOCK_N,
            BLOCK_D,
            False,
        )
