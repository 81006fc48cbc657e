"""What follows the scan of score_topk in Triton: the groups that it keeps are opened, their rows scored by the
definition, and the k best of a query put in order.

One kernel scores by the definition, wherever the rows come from: the groups kept, all groups of the table (for queries
that the scan could not serve), or the rows listed for a user. It keeps keys above a floor in a buffer that is cut down
to its k best when it is full, so it is exact for any data and its memory does not depend on them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdiff.kernels.score_topk_queries import FACTORS, FORCED, NOT_FINITE, from_ordered, ordered
from fastdiff.kernels.score_topk_select import LOW_WORD, NO_KEY, cut, slack

# --- rows by the definition -------------------------------------------------------------------------------------------


@triton.jit
def _exact_scores(p_query, p_row, mask, dim):
    """float32 of ((q_0 e_0 + q_1 e_1) + q_2 e_2) + ... in float64, of rows at the pointers p_row [R]; a zero is +0.

    A product of two float32 is exact in float64, so it does not matter whether it is fused with the sum."""
    b_sum = tl.zeros([p_row.shape[0]], tl.float64)
    for d in range(0, dim, 4):
        o_dim = d + tl.arange(0, 4)
        m_item = mask[:, None] & (o_dim < dim)[None, :]
        b_item = tl.load(p_row[:, None] + o_dim[None, :], mask=m_item, other=0.0).to(tl.float64)
        b_even, b_odd = tl.split(tl.reshape(b_item, [p_row.shape[0], 2, 2]))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        b_sum += b_0 * tl.load(p_query + d).to(tl.float64)
        b_sum += b_1 * tl.load(p_query + d + 1, mask=d + 1 < dim, other=0.0).to(tl.float64)
        b_sum += b_2 * tl.load(p_query + d + 2, mask=d + 2 < dim, other=0.0).to(tl.float64)
        b_sum += b_3 * tl.load(p_query + d + 3, mask=d + 3 < dim, other=0.0).to(tl.float64)
    b_score = b_sum.to(tl.float32)
    return tl.where(b_score == 0.0, 0.0, b_score)


@triton.jit
def _listed(p_values, first, last, b_row, mask, SORTED: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the rows stand in values[first : last]."""
    if SORTED:
        b_low, b_high = tl.zeros_like(b_row) + first, tl.zeros_like(b_row) + last  # the first that is not below the row
        length = last - first
        while length > 0:
            b_middle = (b_low + b_high) // 2
            m_open = mask & (b_low < b_high)
            b_below = tl.load(p_values + b_middle, mask=m_open, other=0) < b_row
            b_low = tl.where(m_open & b_below, b_middle + 1, b_low)
            b_high = tl.where(m_open & (b_below == 0), b_middle, b_high)
            length = length // 2
        b_found = tl.load(p_values + b_low, mask=mask & (b_low < last), other=-1) == b_row
    else:
        b_times = tl.zeros([b_row.shape[0]], tl.int32)
        for at in range(first, last, BLOCK):
            o_value = at + tl.arange(0, BLOCK)
            b_value = tl.load(p_values + o_value, mask=o_value < last, other=-1)
            b_times += tl.sum((b_row[:, None] == b_value[None, :]).to(tl.int32), 1)
        b_found = b_times > 0
    return b_found


@triton.jit
def _exact_part(
    i_query,
    i_slot,
    p_query,
    p_items,
    p_bounds,
    p_factors,
    p_floor,
    p_state,
    p_open,
    p_n_open,
    p_allowed,
    p_exclude,
    p_exclude_offsets,
    p_candidates,
    p_candidate_offsets,
    p_sifted,
    p_keys,
    p_found,
    p_n_found,
    n_rows,
    dim,
    item_stride,
    k,
    open_width,
    sift_width,
    key_width,
    found_width,
    SCANNED: tl.constexpr,
    LISTED: tl.constexpr,
    FORCED_LATER: tl.constexpr,
    GROUP: tl.constexpr,
    CERTIFIED: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    EXCLUDE_SORTED: tl.constexpr,
    HAS_CANDIDATES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One part of the rows of one query that may be among its k best: their keys are added to p_found."""
    i_part, n_parts = tl.program_id(1), tl.num_programs(1)
    state = tl.load(p_state + i_query)
    p_query += i_query * dim
    p_keys += (i_slot * n_parts + i_part) * key_width
    p_sifted += (i_slot * n_parts + i_part) * sift_width
    p_open += i_query * open_width
    p_factor = p_factors + i_query * FACTORS
    first_excluded, last_excluded = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if HAS_EXCLUDE:
        first_excluded = tl.load(p_exclude_offsets + i_query)
        last_excluded = tl.load(p_exclude_offsets + i_query + 1)

    # the units of this part are groups of rows, or listed rows
    UNIT: tl.constexpr = 1 if HAS_CANDIDATES else GROUP
    start = tl.full([], 0, tl.int64)
    all_units = (tl.full([], n_rows, tl.int64) + GROUP - 1) // GROUP
    if HAS_CANDIDATES:
        start = tl.load(p_candidate_offsets + i_query)
        all_units = tl.load(p_candidate_offsets + i_query + 1) - start
    floor = tl.full([], NO_KEY, tl.int64)
    if SCANNED:
        opened = state == 0
        all_units = tl.where(opened, tl.load(p_n_open + i_query).to(tl.int64), all_units)
    if SCANNED or LISTED:
        limit = tl.load(p_floor + i_query)  # infinity where the query was not scanned
        if CERTIFIED:  # whatever scores below a score that k rows reach is not among the k best
            floor = tl.where(limit < float("inf"), ordered(limit).to(tl.int64) << 32, floor)
    per_part = (all_units + n_parts - 1) // n_parts
    first_unit = tl.minimum(i_part * per_part, all_units)
    n_units = tl.minimum(first_unit + per_part, all_units) - first_unit
    left_out = state == NOT_FINITE
    if FORCED_LATER:
        left_out = left_out | (state == FORCED)
    n_units = tl.where(left_out, 0, n_units)

    n_left = n_units * UNIT
    if SCANNED:
        to_sift = tl.where(opened, n_left, 0)
        n_sifted = tl.full([], 0, tl.int64)
        by_norm, tiny = tl.load(p_factor + 3), tl.load(p_factor + 2)
        for at in range(0, to_sift, BLOCK_S):
            o_left = at + tl.arange(0, BLOCK_S)
            b_group = tl.load(p_open + first_unit + o_left // GROUP, mask=o_left < to_sift, other=0).to(tl.int64)
            b_row = b_group * GROUP + o_left % GROUP
            m_row = (o_left < to_sift) & (b_row < n_rows)
            b_sum = tl.zeros([BLOCK_S], tl.float32)
            for d in range(0, dim, BLOCK_D):
                o_dim = d + tl.arange(0, BLOCK_D)
                b_query = tl.load(p_query + o_dim, mask=o_dim < dim, other=0.0)
                m_item = m_row[:, None] & (o_dim < dim)[None, :]
                b_item = tl.load(p_items + b_row[:, None] * item_stride + o_dim[None, :], mask=m_item, other=0.0)
                b_sum += tl.sum(b_item * b_query[None, :], 1)
            b_sum += by_norm * tl.load(p_bounds + b_row // 64 * 4, mask=m_row, other=0.0) + tiny
            if not CERTIFIED:  # the floor is a score of the scan, which k rows reach but for its error
                b_sum += slack(p_factor, p_bounds, b_row, m_row)
            m_row = m_row & (b_sum >= limit)
            if HAS_ALLOWED:
                m_row = m_row & (tl.load(p_allowed + b_row, mask=m_row, other=0) != 0)
            b_one = m_row.to(tl.int64)
            b_place = n_sifted + tl.cumsum(b_one, 0) - b_one
            tl.store(p_sifted + b_place, b_row.to(tl.int32), mask=m_row & (b_place < sift_width))
            n_sifted += tl.sum(b_one, 0)
        tl.debug_barrier()
        all_sifted = opened & (n_sifted <= sift_width)
        in_groups = opened & (n_sifted > sift_width)
        n_left = tl.where(all_sifted, n_sifted, n_left)

    n = tl.full([], 0, tl.int64)
    for at in range(0, n_left, BLOCK_R):
        o_left = at + tl.arange(0, BLOCK_R)
        m_row = o_left < n_left
        b_unit = first_unit + o_left // UNIT
        if HAS_CANDIDATES:
            b_row = tl.load(p_candidates + start + b_unit, mask=m_row, other=-1)
            b_last = tl.load(p_candidates + start + b_unit - 1, mask=m_row & (b_unit > 0), other=-1)
            m_row = m_row & (b_row != b_last) & (b_row >= 0)  # a row that is listed twice counts once
        else:
            b_row = b_unit * UNIT + o_left % UNIT
        if SCANNED:
            b_group = tl.load(p_open + b_unit, mask=m_row & in_groups, other=0).to(tl.int64)
            b_row = tl.where(in_groups, b_group * UNIT + o_left % UNIT, b_row)
            b_sifted = tl.load(p_sifted + o_left, mask=m_row & all_sifted, other=0).to(tl.int64)
            b_row = tl.where(all_sifted, b_sifted, b_row)
        m_row = m_row & (b_row < n_rows)
        if HAS_ALLOWED:
            m_row = m_row & (tl.load(p_allowed + b_row, mask=m_row, other=0) != 0)
        b_score = _exact_scores(p_query, p_items + b_row * item_stride, m_row, dim)
        b_key = (ordered(b_score).to(tl.int64) << 32) | (b_row ^ LOW_WORD)
        m_kept = m_row & (b_key >= floor)
        if HAS_EXCLUDE:
            last = tl.where(tl.max(m_kept.to(tl.int32), 0) > 0, last_excluded, first_excluded)
            m_kept = m_kept & (_listed(p_exclude, first_excluded, last, b_row, m_kept, EXCLUDE_SORTED, 16) == 0)
        b_one = m_kept.to(tl.int64)
        tl.store(p_keys + n + tl.cumsum(b_one, 0) - b_one, b_key, mask=m_kept)
        n += tl.sum(b_one, 0)
        if n > key_width - BLOCK_R:
            floor = cut(p_keys, n, k, BLOCK_K)
            n = tl.full([], k, tl.int64)

    if LISTED:  # by many parts, each of which adds its k best at most
        more = n > k
        if more:
            cut(p_keys, n, k, BLOCK_K)
            n = tl.full([], k, tl.int64)
    tl.debug_barrier()
    if n > 0:
        place = tl.atomic_add(p_n_found + i_query, n.to(tl.int32))
        for at in range(0, n, BLOCK_K):
            o_key = at + tl.arange(0, BLOCK_K)
            b_key = tl.load(p_keys + o_key, mask=o_key < n, other=NO_KEY)
            tl.store(p_found + i_query * found_width + place + o_key, b_key, mask=o_key < n)


@triton.jit(do_not_specialize=["n_rows", "k", "open_width", "sift_width", "key_width", "found_width"])
def _exact_kernel(
    p_query,
    p_items,
    p_bounds,
    p_factors,
    p_floor,
    p_state,
    p_open,
    p_n_open,
    p_allowed,
    p_exclude,
    p_exclude_offsets,
    p_candidates,
    p_candidate_offsets,
    p_sifted,
    p_keys,
    p_found,
    p_n_found,
    p_listed,
    p_n_listed,
    n_rows,
    dim,
    item_stride,
    k,
    open_width,
    sift_width,
    key_width,
    found_width,
    SCANNED: tl.constexpr,
    LISTED: tl.constexpr,
    FORCED_LATER: tl.constexpr,
    GROUP: tl.constexpr,
    CERTIFIED: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    EXCLUDE_SORTED: tl.constexpr,
    HAS_CANDIDATES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The keys of the rows of each query that may be among its k best, in parts; one program per query and part.

    A key is one int64 whose descending order is (score descending, row ascending), as `topk_definition.to_keys` makes
    it. Of the groups of a scan, a float32 sum in any order, coalesced, first sifts the rows that can reach the floor
    into p_sifted; where they do not fit there, all rows of the groups are scored.

    LISTED        whole tables for the queries in p_listed, one after the other on the first axis, in as many parts as
                  keep the device busy with one query; p_found needs room for k keys of each part
    FORCED_LATER  queries that are forced are left to such a launch
    """
    i_slot = tl.program_id(0).to(tl.int64)
    first, last, step = 0, 1, 1
    if LISTED:
        first, last, step = tl.program_id(0), tl.load(p_n_listed), tl.num_programs(0)
    for i in range(first, last, step):  # which is no loop where its bounds are known
        i_query = i_slot
        if LISTED:
            i_query = tl.load(p_listed + i).to(tl.int64)
        _exact_part(
            i_query,
            i_slot,
            p_query,
            p_items,
            p_bounds,
            p_factors,
            p_floor,
            p_state,
            p_open,
            p_n_open,
            p_allowed,
            p_exclude,
            p_exclude_offsets,
            p_candidates,
            p_candidate_offsets,
            p_sifted,
            p_keys,
            p_found,
            p_n_found,
            n_rows,
            dim,
            item_stride,
            k,
            open_width,
            sift_width,
            key_width,
            found_width,
            SCANNED,
            LISTED,
            FORCED_LATER,
            GROUP,
            CERTIFIED,
            HAS_ALLOWED,
            HAS_EXCLUDE,
            EXCLUDE_SORTED,
            HAS_CANDIDATES,
            BLOCK_R,
            BLOCK_S,
            BLOCK_D,
            BLOCK_K,
        )
        if LISTED:
            tl.debug_barrier()  # the keys are read before those of the next query are written


# --- the order --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["k", "found_width"])
def _order_kernel(
    p_found, p_n_found, p_state, p_out_rows, p_out_scores, k, found_width, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Each key goes to the place that is the number of keys above it: no two are equal. Places beyond are filled."""
    i_query = tl.program_id(0).to(tl.int64)
    o_key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(p_n_found + i_query)
    p_found += i_query * found_width
    p_out_rows += i_query * k
    p_out_scores += i_query * k
    fill = tl.where(tl.load(p_state + i_query) == NOT_FINITE, float("nan"), float("-inf"))
    m_fill = (o_key >= n) & (o_key < k)
    tl.store(p_out_rows + o_key, tl.full([BLOCK], -1, tl.int64), mask=m_fill)
    tl.store(p_out_scores + o_key, tl.zeros([BLOCK], tl.float32) + fill, mask=m_fill)
    if tl.program_id(1) * BLOCK < n:
        b_key = tl.load(p_found + o_key, mask=o_key < n, other=NO_KEY)
        b_place = tl.zeros([BLOCK], tl.int32)
        for at in range(0, n, BLOCK_J):
            o_other = at + tl.arange(0, BLOCK_J)
            b_other = tl.load(p_found + o_other, mask=o_other < n, other=NO_KEY)
            b_place += tl.sum((b_other[None, :] > b_key[:, None]).to(tl.int32), 1)
        m_key = (o_key < n) & (b_place < k)
        tl.store(p_out_rows + b_place, (b_key & LOW_WORD) ^ LOW_WORD, mask=m_key)
        tl.store(p_out_scores + b_place, from_ordered((b_key >> 32).to(tl.int32)), mask=m_key)
