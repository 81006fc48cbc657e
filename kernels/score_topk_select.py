"""Selection in score_topk in Triton: the k-th best of many keys, and the floor of a query, raised to it."""

from __future__ import annotations

import triton
import triton.language as tl

from fastdiff.kernels.score_topk_queries import FACTORS, FORCED, LOWEST, OVERFLOWED, from_ordered

NO_KEY, LARGEST_KEY = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)
LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _kth_highest(p_keys, n, rank, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """A number that `rank` of n >= rank keys >> SHIFT reach and, unless some are equal, no others; int32 if SHIFT = 32.

    Each pass over the keys tries three numbers, which quarters what is left of their range, and the search ends with
    the first number that just `rank` reach: mostly after half of the bits in which the keys differ."""
    KEY: tl.constexpr = tl.int32 if SHIFT == 32 else tl.int64
    o_block, o_two = tl.arange(0, BLOCK), tl.arange(0, 2)
    b_lowest, b_highest = tl.full([BLOCK], LARGEST_KEY, tl.int64), tl.full([BLOCK], NO_KEY, tl.int64)
    for at in range(0, n, BLOCK):
        m_key = at + o_block < n
        b_key = tl.load(p_keys + at + o_block, mask=m_key, other=NO_KEY)
        b_lowest = tl.minimum(b_lowest, tl.where(m_key, b_key, LARGEST_KEY))
        b_highest = tl.maximum(b_highest, b_key)
    # `reached` keys, at least `rank`, reach `found`; fewer than `rank` reach found + 4 step
    found, highest = (tl.min(b_lowest, 0) >> SHIFT).to(KEY), (tl.max(b_highest, 0) >> SHIFT).to(KEY)
    reached, step = tl.full([], n, tl.int32), (highest >> 2) - (found >> 2) + 1
    while (reached > rank) & (step > 0):
        first, second, third = found + step, found + step + step, found + step + step + step
        b_first, b_second = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        b_third = tl.zeros([BLOCK], tl.int32)
        for at in range(0, n, BLOCK):
            b_key = (tl.load(p_keys + at + o_block, mask=at + o_block < n, other=NO_KEY) >> SHIFT).to(KEY)
            b_first += (b_key >= first).to(tl.int32)
            b_second += (b_key >= second).to(tl.int32)
            b_third += (b_key >= third).to(tl.int32)
        # summed together, so that warps meet once: [[first, second], [third, none]]
        b_counts = tl.join(tl.join(b_first, b_third), tl.join(b_second, tl.zeros([BLOCK], tl.int32)))
        b_counts = tl.sum(b_counts, 0)
        b_tried = tl.where(o_two == 0, first, third)[:, None] + tl.where(o_two == 0, 0, step)[None, :]
        found = tl.max(tl.max(tl.where(b_counts >= rank, b_tried, found), 1), 0)
        reached = tl.min(tl.min(tl.where(b_counts >= rank, b_counts, reached), 1), 0)
        step = tl.where(step > 1, (step + 3) >> 2, 0)
    return found


@triton.jit
def cut(p_keys, n, k, BLOCK: tl.constexpr):
    """Leaves the k highest of n different keys, n >= k, in front; returns a number that they reach and no others."""
    tl.debug_barrier()  # what other threads have written is read
    floor = _kth_highest(p_keys, n, k, 0, BLOCK)
    left = 0
    for at in range(0, n, BLOCK):
        o_key = at + tl.arange(0, BLOCK)
        b_key = tl.load(p_keys + o_key, mask=o_key < n, other=NO_KEY)
        m_left = (o_key < n) & (b_key >= floor)
        b_left = m_left.to(tl.int32)
        tl.debug_barrier()
        tl.store(p_keys + left + tl.cumsum(b_left, 0) - b_left, b_key, mask=m_left)
        left += tl.sum(b_left, 0)
        tl.debug_barrier()
    return floor


@triton.jit(do_not_specialize=["k", "n_places", "slots", "gather_width", "open_width"])
def _raise_kernel(
    p_entries,
    p_counts,
    p_exclude_offsets,
    p_factors,
    p_bounds,
    p_floor,
    p_state,
    p_gathered,
    p_open,
    p_n_open,
    p_listed,
    p_n_listed,
    k,
    n_places,
    slots,
    gather_width,
    open_width,
    GROUP: tl.constexpr,
    LAST: tl.constexpr,
    SECOND: tl.constexpr,
    RESCANNED: tl.constexpr,
    CERTIFIED: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program per query: its entries are gathered, and its floor raised to what k of them surely reach,
    and mostly no more.

    LAST       after the scan of the whole table: the groups that may reach the floor are listed in p_open. Where
               entries were lost or are too many, the query is scanned again, or forced to the definition.
    RESCANNED  there is a second scan: queries are listed in p_listed, whoever is to be scanned again, and after the
               SECOND scan whoever is forced
    Rows that the user may not be given count among the k, so these are k + the number of them. What was kept before
    others were lost still raises the floor: these are different groups, each with a row that reaches its entry.
    """
    i_query = tl.program_id(0).to(tl.int64)
    state = tl.load(p_state + i_query)
    served = state == (OVERFLOWED if SECOND else 0)
    if served:
        rank = tl.full([], k, tl.int64)
        if HAS_EXCLUDE:
            rank += tl.load(p_exclude_offsets + i_query + 1) - tl.load(p_exclude_offsets + i_query)
        p_entries += i_query * n_places * slots
        p_counts += i_query * n_places
        p_gathered += i_query * gather_width
        o_block, o_slot = tl.arange(0, BLOCK), tl.arange(0, BLOCK_S)
        n, lost = 0, 0
        for first in range(0, n_places, BLOCK_P):
            o_source = first + tl.arange(0, BLOCK_P)
            b_kept = tl.load(p_counts + o_source, mask=o_source < n_places, other=0)
            b_here = tl.minimum(b_kept, slots)
            b_place = n + tl.cumsum(b_here, 0) - b_here
            p_entry, p_place = p_entries + o_source * slots, p_gathered + b_place
            for at in range(0, tl.max(b_here, 0), BLOCK_S):
                m_entry = (at + o_slot)[None, :] < b_here[:, None]
                b_entry = tl.load(p_entry[:, None] + (at + o_slot)[None, :], mask=m_entry, other=0)
                m_entry = m_entry & (b_place[:, None] + (at + o_slot)[None, :] < gather_width)
                tl.store(p_place[:, None] + (at + o_slot)[None, :], b_entry, mask=m_entry)
            n += tl.sum(b_here, 0)
            lost += tl.sum((b_kept > slots).to(tl.int32), 0)
        tl.debug_barrier()
        reached = tl.minimum(n, gather_width)
        floor = tl.load(p_floor + i_query)
        if reached >= rank:
            floor = tl.maximum(floor, from_ordered(_kth_highest(p_gathered, reached, rank, 32, BLOCK)))
            tl.store(p_floor + i_query, floor)
        if LAST:
            n_open = 0
            for at in range(0, reached, BLOCK):
                m_entry = at + o_block < reached
                b_entry = tl.load(p_gathered + at + o_block, mask=m_entry, other=0)
                b_group = b_entry & LOW_WORD
                b_high = from_ordered((b_entry >> 32).to(tl.int32))
                if CERTIFIED:
                    p_factor = p_factors + i_query * FACTORS
                    if SECOND:
                        b_norm = tl.load(p_bounds + b_group * GROUP // 64 * 4, mask=m_entry, other=0.0)
                        b_high += 2.0 * (tl.load(p_factor + 3) * b_norm + tl.load(p_factor + 2))
                    else:
                        b_high += 2.0 * slack(p_factor, p_bounds, b_group * GROUP, m_entry)
                m_open = m_entry & (b_high >= floor)
                b_one = m_open.to(tl.int32)
                b_place = n_open + tl.cumsum(b_one, 0) - b_one
                p_place = p_open + i_query * open_width + b_place
                tl.store(p_place, b_group.to(tl.int32), mask=m_open & (b_place < open_width))
                n_open += tl.sum(b_one, 0)
            tl.store(p_n_open + i_query, n_open)
            too_many = (lost > 0) | (n > gather_width) | (n_open > open_width)
            if SECOND:
                state = tl.where(too_many, FORCED, 0)
            elif RESCANNED:
                state = tl.where(too_many, OVERFLOWED, 0)
                if not CERTIFIED:  # the floor is a score of the first scan, which no row need reach
                    tl.store(p_floor + i_query, tl.where(too_many, LOWEST, floor))
            else:
                state = tl.where(too_many, FORCED, 0)
            tl.store(p_state + i_query, state)
    if LAST and RESCANNED:
        left_over = state == (FORCED if SECOND else OVERFLOWED)
        if left_over:
            tl.store(p_listed + tl.atomic_add(p_n_listed, 1), i_query.to(tl.int32))


@triton.jit
def slack(p_factor, p_bounds, b_row, mask):
    """By how much the scan may be wrong about a row."""
    p_bound = p_bounds + b_row // 64 * 4
    b_norm = tl.load(p_bound, mask=mask, other=0.0)
    b_residual = tl.load(p_bound + 1, mask=mask, other=0.0)
    return tl.load(p_factor) * b_residual + tl.load(p_factor + 1) * b_norm + tl.load(p_factor + 2)
