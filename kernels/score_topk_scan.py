"""The scan of score_topk in Triton: which groups of rows may hold a best one.

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

from fastdiff.kernels.score_topk_queries import (
    BFLOATS,
    BYTES,
    FACTORS,
    FLOATS,
    HALVES,
    SINGLES,
    ordered,
    rounded,
)


@triton.jit
def _rows(p_rows, row_stride, o_row, o_dim, dim, STORED: tl.constexpr, WIDE: tl.constexpr):
    """Rows of the table in the form of the product, [R, BLOCK_D]; beyond `dim` is anything that is finite."""
    p_row = p_rows + o_row[:, None] * row_stride + o_dim[None, :]
    b_rows = tl.load(p_row, mask=(o_dim < dim)[None, :], other=0)
    if STORED == FLOATS:
        b_rows = rounded(b_rows) if WIDE else b_rows.to(tl.bfloat16)
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
        first = (start + tl.full([], i, tl.int32) * step) * BLOCK_N
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
