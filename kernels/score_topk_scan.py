"""The scan of score_topk in Triton: which groups of rows may hold a best one.

Rows lie in groups of 8 to 64, never across a block of 64 that shares a bound (fastdiff/ops/topk_scan.py). The scan
keeps, of each query, the groups whose highest score may reach its floor: one number per group, so that the epilogue
costs one maximum per score, and the few groups kept are opened later (score_topk_exact.py). What is kept are entries

    (bits of highest score - slack, in order) << 32  |  group

Every program counts its own entries of each query in registers, those of each group of its tiles apart, and writes them
to a place of its own: nothing is cleared before or added up between programs, no warp waits for the answer of an
atomic, nor for another one.

Floats are scanned in bfloat16, float16 and whole numbers as they are; sums in float32 or int32. Queries are the rows of
the product and rows of the table its columns, in an order in which all columns of a thread are of one group: so the
maximum is taken, compared and counted inside of a thread, with one operation per score. Few queries are filled up to
what the matrix units take; these have four times the time that their products need while rows come from memory.

The second scan (`_rescan_kernel`) is for queries of whom the first kept too much: their scores lie closer together than
its products tell apart, or its sample misled it. It takes float32 products of the item table itself, whose error is
some hundred times smaller, and other tiles for its sample.

Numbers of a row and of the table may be more than 2^31: the rows of a tile are addressed in int32 from the tile's
first, and what that is multiplied with is int64. Entries are fewer (`score_topk_plan.BUDGET`).
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
def _bounds(p_bounds, o_group, m_group, CERTIFIED: tl.constexpr, SCALED: tl.constexpr, RESIDUAL: tl.constexpr):
    """Of groups that begin at the rows o_group: the norm, the residual and the scale of their blocks, where needed."""
    p_bound = p_bounds + o_group // 64 * 4
    b_norm = tl.load(p_bound, mask=m_group & CERTIFIED, other=0.0)
    b_residual = tl.load(p_bound + 1, mask=m_group & (CERTIFIED and RESIDUAL), other=0.0)
    return b_norm, b_residual, tl.load(p_bound + 2, mask=m_group & SCALED, other=1.0)


@triton.jit
def _as_held(b_x, SHARES: tl.constexpr):
    """[queries, groups] as one dimension, in the order in which the threads of the matrix units hold their maxima: it
    is the order in which a store wants them, so no data change hands. (16 queries to a warp, 8 warps at most.)"""
    Q: tl.constexpr = b_x.shape[0]
    N: tl.constexpr = b_x.shape[1]
    WARPS: tl.constexpr = 8 if Q > 128 else Q // 16
    b_parts = tl.reshape(b_x, [Q // (16 * WARPS), WARPS, 2, 8, N // SHARES, SHARES])
    return tl.reshape(tl.permute(b_parts, (0, 2, 4, 1, 3, 5)), [Q * N])


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
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_STEP: tl.constexpr,
):
    """Entries of the queries o_query [BLOCK_Q] int64 from this program's share of the tiles start, start + step .."""
    i_program, n_programs = tl.program_id(1), tl.num_programs(1)
    SCALED: tl.constexpr = STORED >= BYTES and STORED <= HALVES
    SUM: tl.constexpr = tl.int32 if STORED == BYTES else tl.float32
    N_GROUPS: tl.constexpr = BLOCK_N // GROUP
    # the columns of the product that a thread holds are of one group: four threads hold a row, two of eight in turn
    SHARES: tl.constexpr = 4 if N_GROUPS > 4 else N_GROUPS
    o_column, o_group = tl.arange(0, BLOCK_N), tl.arange(0, N_GROUPS)
    o_pair = o_column // (2 * SHARES)
    o_row = (o_pair // (GROUP // 2) * SHARES + o_column // 2 % SHARES) * GROUP
    o_row += o_pair % (GROUP // 2) * 2 + o_column % 2
    o_group_row = o_group * GROUP

    p_factor = p_factors + o_query * FACTORS
    if CERTIFIED:
        b_by_residual = tl.load(p_factor, mask=m_query, other=0.0)[:, None]
        b_by_norm = tl.load(p_factor + (3 if STORED == SINGLES else 1), mask=m_query, other=0.0)[:, None]
        b_tiny = tl.load(p_factor + 2, mask=m_query, other=0.0)[:, None]
    b_scale = tl.load(p_factor + 4, mask=m_query, other=1.0)[:, None]
    b_floor = tl.load(p_floor + o_query, mask=m_query, other=float("inf"))[:, None]  # which nothing reaches
    o_dim = tl.arange(0, BLOCK_D)
    if ONE_STEP:
        b_query = _operand(p_operand, o_query, m_query, o_dim, operand_dim)
    o_place = (o_query * n_programs + i_program).to(tl.int32)[:, None] * N_GROUPS + o_group[None, :]
    b_count = tl.zeros([BLOCK_Q, N_GROUPS], tl.int32)

    # what is needed of the next tile besides its rows is loaded a tile ahead: nothing waits for it
    ahead = (start + tl.full([], i_program, tl.int32) * step) * BLOCK_N
    if CHUNK > 0:
        chunk = tl.load(p_chunks + ahead // CHUNK, mask=i_program < n_visited, other=0)
    m_next = (i_program < n_visited) & (o_group_row < n_rows - ahead)
    b_norm, b_residual, b_unit = _bounds(p_bounds, ahead + o_group_row, m_next, CERTIFIED, SCALED, STORED != SINGLES)
    for i in range(i_program, n_visited, n_programs):
        first = (start + tl.full([], i, tl.int32) * step) * BLOCK_N
        # rows beyond the last are the last once more, which changes no maximum
        b_row = tl.minimum(o_row, n_rows - 1 - first)
        p_tile = p_rows + first.to(tl.int64) * row_stride
        behind, more = first + n_programs * step * BLOCK_N, i + n_programs < n_visited
        if CHUNK > 0:
            p_tile = p_rows + chunk * 16 + (first % CHUNK).to(tl.int64) * row_stride
            chunk = tl.load(p_chunks + behind // CHUNK, mask=more, other=0)
        m_group = (o_group_row < n_rows - first)[None, :]
        if CERTIFIED:
            b_slack = b_by_norm * b_norm[None, :] + b_tiny
            if STORED != SINGLES:
                b_slack += b_by_residual * b_residual[None, :]
        if SCALED:
            b_unit_here = b_scale * b_unit[None, :]
        m_next = more & (o_group_row < n_rows - behind)
        b_norm, b_residual, b_unit = _bounds(
            p_bounds, behind + o_group_row, m_next, CERTIFIED, SCALED, STORED != SINGLES
        )
        if HAS_ALLOWED:  # rows that are not allowed are read like others: whether they are is known only later
            m_row = tl.load(p_allowed + first + b_row) != 0
            none = -2147483648 if STORED == BYTES else float("-inf")
            b_most = tl.where(m_row, 2147483647 if STORED == BYTES else 0.0, none)
        b_sums = tl.zeros([BLOCK_Q, BLOCK_N], SUM)
        if ONE_STEP:
            b_rows = _rows(p_tile, row_stride, b_row, o_dim, dim, STORED, WIDE)
            b_sums = tl.dot(b_query, tl.trans(b_rows), b_sums, input_precision="ieee", out_dtype=SUM)
        else:
            for d in range(0, dim, BLOCK_D):
                b_rows = _rows(p_tile, row_stride, b_row, d + o_dim, dim, STORED, WIDE)
                b_part = _operand(p_operand, o_query, m_query, d + o_dim, operand_dim)
                b_sums = tl.dot(b_part, tl.trans(b_rows), b_sums, input_precision="ieee", out_dtype=SUM)
        if HAS_ALLOWED:
            b_sums = tl.minimum(b_sums, b_most[None, :]) if STORED == BYTES else b_sums + b_most[None, :]
        b_shares = tl.reshape(b_sums, [BLOCK_Q, N_GROUPS // SHARES, GROUP // 2, SHARES, 2])
        b_best = tl.reshape(tl.max(tl.max(b_shares, 4), 2), [BLOCK_Q, N_GROUPS])
        b_high = b_best.to(tl.float32)
        if HAS_ALLOWED:
            m_group = m_group & (b_best != none)
        if SCALED:
            b_high *= b_unit_here
        b_low = b_high
        if CERTIFIED:
            b_low, b_high = b_high - b_slack, b_high + b_slack
        m_kept = m_group & (b_high >= b_floor)
        b_entry = (ordered(b_low).to(tl.int64) << 32) | (first // GROUP + o_group)[None, :]
        m_stored = _as_held(m_kept & (b_count < slots), SHARES)
        tl.store(p_entries + _as_held(o_place * slots + b_count, SHARES), _as_held(b_entry, SHARES), mask=m_stored)
        b_count += m_kept.to(tl.int32)
    tl.store(p_counts + o_place, b_count, mask=m_query[:, None])


@triton.jit(do_not_specialize=["n_queries", "n_rows", "n_visited", "step", "slots"])
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
    p_entries         [n_queries, programs, groups of a tile, slots] int64
    p_counts          [n_queries, programs, groups of a tile] int32, above `slots` where entries were lost
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
        CHUNK,
        GROUP,
        BLOCK_Q,
        BLOCK_N,
        BLOCK_D,
        ONE_STEP,
    )


@triton.jit(do_not_specialize=["n_rows", "start", "step", "n_visited", "slots"])
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
            0,
            GROUP,
            BLOCK_Q,
            BLOCK_N,
            BLOCK_D,
            False,
        )
