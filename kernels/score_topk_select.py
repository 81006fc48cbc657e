"""Selection in score_topk in Triton: the k-th best of many keys, and the floor of a query, raised to it."""

from __future__ import annotations

import triton
import triton.language as tl

from fastdiff.kernels.score_topk_queries import FACTORS, FORCED, LOWEST, OVERFLOWED, from_ordered

NO_KEY = tl.constexpr(-(2**63))
LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _kth_highest(p_keys, n, rank, LAST_SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest number, a multiple of 2^LAST_SHIFT, that at least `rank` of n int64 reach; NO_KEY where n < rank.

    Sixteen numbers are tried at a time, four bits further down each time."""
    found = tl.full([], NO_KEY, tl.int64)
    o_trial, o_block = tl.arange(0, 16).to(tl.int64), tl.arange(0, BLOCK)
    for i in range(0, (64 - LAST_SHIFT) // 4):
        b_trial = found + (o_trial << (60 - 4 * i))
        b_count = tl.zeros([16], tl.int32)
        for at in range(0, n, BLOCK):
            o_key = at + o_block
            b_key = tl.load(p_keys + o_key, mask=o_key < n, other=NO_KEY)
            b_reach = (b_key[:, None] >= b_trial[None, :]) & (o_key < n)[:, None]
            b_count += tl.sum(b_reach.to(tl.int32), 0)
        found = tl.max(tl.where(b_count >= rank, b_trial, found), 0)
    return found


@triton.jit
def cut(p_keys, n, k, BLOCK: tl.constexpr):
    """Leaves the k highest of n different keys, n >= k, in front; returns the lowest of them."""
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


@triton.jit(do_not_specialize=["k", "n_programs", "slots", "gather_width", "open_width"])
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
    n_programs,
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
):
    """One program per query: its entries are gathered, and its floor raised to the k-th best of what they surely reach.

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
        p_entries += i_query * n_programs * slots
        p_counts += i_query * n_programs
        p_gathered += i_query * gather_width
        o_block = tl.arange(0, BLOCK)
        n, lost = 0, 0
        for at in range(0, n_programs * slots, BLOCK):
            o_entry = at + o_block
            b_here = tl.load(p_counts + o_entry // slots, mask=o_entry < n_programs * slots, other=0)
            m_entry = o_entry % slots < b_here
            b_entry = tl.load(p_entries + o_entry, mask=m_entry, other=0)
            b_one = m_entry.to(tl.int32)
            b_place = n + tl.cumsum(b_one, 0) - b_one
            tl.store(p_gathered + b_place, b_entry, mask=m_entry & (b_place < gather_width))
            n += tl.sum(b_one, 0)
            lost += tl.sum((b_here > slots).to(tl.int32), 0)
        tl.debug_barrier()
        reached = tl.minimum(n, gather_width)
        sure = _kth_highest(p_gathered, reached, rank, 32, BLOCK)
        floor = tl.load(p_floor + i_query)
        if sure != NO_KEY:
            floor = tl.maximum(floor, from_ordered((sure >> 32).to(tl.int32)))
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
