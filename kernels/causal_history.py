"""What encode_causal_history and prepare_causal_prefix share in Triton: kernels over packed histories, and buffers.

Histories are ragged, packed one user after another, and only the device knows how many rows there are: buffers have
room for the most, `capacity` rows per pass, and programs beyond the last row end at once. A row needs its user only
where it is gathered (a search in the running sums of the lengths) and where it attends, whose programs belong to users.

A block is two launches: attention, one program for some queries of one head; then all that acts row by row, from the
output projection to the next block's queries, keys and values, one program for some rows: a row's hidden units never
reach memory, and 2 (4 D^2 + 2 D F) bytes of weights in half precision are read once for up to 64 rows.

    hidden             [G, capacity, BLOCK_D] float32, the residual stream
    shared             [G, capacity, 2 BLOCK_D], left sides of products
    queries, gathered  [G, capacity, BLOCK_E], heads side by side as `fastdiff.kernels.causal_transformer` lays them out
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.causal_history_tiles import MOST_ROWS, attend_candidates, attend_key, row_candidates, row_key
from fastdiff.kernels.causal_transformer import PackedBlocks, finish_block, packed_blocks, project, share
from fastdiff.kernels.runtime import next_power_of_2
from fastdiff.kernels.tuning import choose
from fastdiff.ops.causal_transformer import BlockWeights

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def user_of(o_row, p_ends, n_users, search_step):
    """The user of each packed row: how many users end at or before it.

    search_step  a power of two above n_users / 2, with which the search begins
    """
    b_user = tl.zeros_like(o_row)
    step = tl.full([], search_step, tl.int32)
    while step > 0:
        b_next = b_user + step
        m_next = b_next <= n_users
        b_end = tl.load(p_ends + b_next - 1, mask=m_next, other=0)
        b_user = tl.where(m_next & (b_end <= o_row), b_next, b_user)
        step = step // 2
    return b_user


@triton.jit
def project_and_store(
    p_rows,
    p_matrices,
    p_vectors,
    p_queries,
    p_keys_values,
    o_row,
    m_row,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block's queries of the rows at p_rows [R] to [.., BLOCK_E], keys and values to [.., 2 D], at rows o_row."""
    BLOCK_E: tl.constexpr = BLOCK_H * BLOCK_DH
    dtype = p_keys_values.dtype.element_ty
    b_query, b_key, b_value = project(p_rows, p_matrices, p_vectors, QUERIES, BLOCK_R, BLOCK_D, BLOCK_E, BLOCK_K)
    o_out = tl.arange(0, BLOCK_E)
    if QUERIES:
        tl.store(p_queries + o_row[:, None] * BLOCK_E + o_out[None, :], b_query.to(dtype), mask=m_row[:, None])
    if DH == BLOCK_DH:
        o_column, m_column = o_out, o_out < D
    else:
        o_column = o_out // BLOCK_DH * DH + o_out % BLOCK_DH
        m_column = (o_out // BLOCK_DH < H) & (o_out % BLOCK_DH < DH)
    p_key = p_keys_values + o_row[:, None] * (2 * D) + o_column[None, :]
    mask = m_row[:, None] & m_column[None, :]
    tl.store(p_key, b_key.to(dtype), mask=mask)
    tl.store(p_key + D, b_value.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n_slots", "n_users", "n_tiles", "window"])
def attend_kernel(
    p_queries,
    p_keys_values,
    p_pad,
    p_lengths,
    p_ends,
    p_gathered,
    capacity,
    n_slots,
    n_users,
    n_tiles,
    pad_stride,
    window,
    ONLY_LAST: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    BLOCK_DH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What each query of one head gathers: its user's slots up to its own, and the pads' key before them.

    With ONLY_LAST a user's last query alone, whose row is the user's number. Heads beyond H gather zeros.
    """
    BLOCK_E: tl.constexpr = BLOCK_H * BLOCK_DH
    i_task, i_head = tl.program_id(0), tl.program_id(1)
    i_tile, i_user, i_pass = i_task % n_tiles, i_task // n_tiles % n_users, i_task // n_tiles // n_users
    length = tl.load(p_lengths + i_user).to(tl.int32)
    first_query = i_tile * BLOCK_Q
    if ONLY_LAST:
        first_query = tl.maximum(length - 1, 0)
    if first_query >= length:
        return
    start = tl.load(p_ends + i_user) - length
    o_query = first_query + tl.arange(0, BLOCK_Q)
    o_within = tl.arange(0, BLOCK_DH)
    m_query, m_within = o_query < length, (o_within < DH) & (i_head < H)
    o_row = i_pass.to(tl.int64) * capacity + start + o_query
    o_column = i_head * BLOCK_DH + o_within
    b_query = tl.load(p_queries + o_row[:, None] * BLOCK_E + o_column[None, :], mask=m_query[:, None], other=0.0)

    p_pad_key = p_pad + i_pass * pad_stride + i_head * DH + o_within
    n_pads = (window - length).to(tl.float32)
    b_pad_key = tl.load(p_pad_key, mask=m_within, other=0.0).to(tl.float32)
    b_pad_value = tl.load(p_pad_key + D, mask=m_within, other=0.0).to(tl.float32)
    b_most = tl.sum(b_query.to(tl.float32) * b_pad_key[None, :], axis=1)
    b_most = tl.where(n_pads > 0.0, b_most + tl.log(tl.maximum(n_pads, 1.0)), float("-inf"))
    b_weights = tl.full([BLOCK_Q], 1.0, tl.float32)
    b_sum = tl.zeros([BLOCK_Q, BLOCK_DH], tl.float32) + b_pad_value[None, :]

    p_first = p_keys_values + (i_pass.to(tl.int64) * n_slots + start) * (2 * D) + i_head * DH
    for first in range(0, tl.minimum(first_query + BLOCK_Q, length), BLOCK_P):
        o_slot = first + tl.arange(0, BLOCK_P)
        mask = (o_slot < length)[:, None] & m_within[None, :]
        p_key = p_first + o_slot[:, None] * (2 * D) + o_within[None, :]
        b_key = tl.load(p_key, mask=mask, other=0.0)
        b_value = tl.load(p_key + D, mask=mask, other=0.0)
        b_logits = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        b_logits = tl.where(o_slot[None, :] <= o_query[:, None], b_logits, float("-inf"))
        b_highest = tl.maximum(b_most, tl.max(b_logits, axis=1))
        b_before, b_shares = tl.exp(b_most - b_highest), tl.exp(b_logits - b_highest[:, None])
        b_weights = b_weights * b_before + tl.sum(b_shares, axis=1)
        b_sum = tl.dot(b_shares.to(b_value.dtype), b_value, b_sum * b_before[:, None], input_precision="ieee")
        b_most = b_highest
    b_sum = b_sum / b_weights[:, None]
    if ONLY_LAST:
        o_row = i_user + tl.arange(0, BLOCK_Q).to(tl.int64)
    p_out = p_gathered + o_row[:, None] * BLOCK_E + o_column[None, :]
    tl.store(p_out, b_sum.to(p_gathered.dtype.element_ty), mask=m_query[:, None])


@triton.jit(do_not_specialize=["n_users", "n_slots"])
def finish_block_kernel(
    p_hidden,
    p_gathered,
    p_shared,
    p_matrices,
    p_vectors,
    p_next_matrices,
    p_next_vectors,
    p_ends,
    p_rows,
    p_queries,
    p_keys_values,
    n_users,
    capacity,
    n_slots,
    eps,
    NEXT: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DH: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The rest of a block behind its attention, and where there is a NEXT block its keys and values, and its QUERIES.

    Without a next block the block's output goes to p_rows [.., D].
    """
    BLOCK_E: tl.constexpr = BLOCK_H * BLOCK_DH
    i_pass = tl.program_id(1).to(tl.int64)
    first_row, n_rows = tl.program_id(0) * BLOCK_R, tl.load(p_ends + n_users - 1)
    if first_row >= n_rows:
        return
    o_own = first_row + tl.arange(0, BLOCK_R)
    m_row = o_own < n_rows
    o_row = i_pass * capacity + o_own
    o_dim = tl.arange(0, BLOCK_D)
    p_row = p_hidden + o_row[:, None] * BLOCK_D + o_dim[None, :]
    p_own_shared = p_shared + o_row * (2 * BLOCK_D)
    b_h = finish_block(
        tl.load(p_row),
        p_gathered + o_row * BLOCK_E,
        p_own_shared,
        p_matrices,
        p_vectors,
        eps,
        D,
        F,
        BLOCK_D,
        BLOCK_E,
        BLOCK_F,
        BLOCK_K,
    )
    if NEXT:
        tl.store(p_row, b_h)
        share(p_own_shared + BLOCK_D, b_h)
        project_and_store(
            p_own_shared + BLOCK_D,
            p_next_matrices,
            p_next_vectors,
            p_queries + i_pass * capacity * BLOCK_E,
            p_keys_values + i_pass * n_slots * (2 * D),
            o_own.to(tl.int64),
            m_row,
            QUERIES,
            D,
            H,
            DH,
            BLOCK_R,
            BLOCK_D,
            BLOCK_H,
            BLOCK_DH,
            BLOCK_K,
        )
    else:
        p_out = p_rows + o_row[:, None] * D + o_dim[None, :]
        tl.store(p_out, b_h.to(p_rows.dtype.element_ty), mask=m_row[:, None] & (o_dim < D)[None, :])


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histories:
    """Packed rows of B users, for G passes, and the buffers that their blocks need.

    lengths, ends  [B] int64: rows of each user, and their running sum
    longest        at least the longest of the lengths
    window         slots that a user's rows and pads fill together
    pad            [n_blocks, G or more, 2 D] contiguous
    keys_values    [layers, G, n_slots, 2 D], where block i's go to place i, or all to place 0 where `layers` is 1
    hidden, shared, queries, gathered   see the module's docstring
    """

    stack: PackedBlocks
    lengths: Tensor
    ends: Tensor
    longest: int
    window: int
    pad: Tensor
    keys_values: Tensor
    hidden: Tensor
    shared: Tensor
    queries: Tensor
    gathered: Tensor

    @classmethod
    def of(
        cls,
        blocks: tuple[BlockWeights, ...],
        lengths: Tensor,
        longest: int,
        window: int,
        passes: int,
        pad: Tensor,
        keys_values: Tensor,
    ) -> Histories:
        stack, users = packed_blocks(blocks), lengths.shape[0]
        sizes = stack.sizes
        rows = -(-users * longest // MOST_ROWS) * MOST_ROWS  # whole tiles, so that rows are read without masks

        def room(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(passes, rows, width, dtype=dtype, device=lengths.device)

        dtype = keys_values.dtype
        return cls(
            stack,
            lengths,
            lengths.cumsum(0),
            longest,
            window,
            pad.contiguous(),
            keys_values,
            room(sizes.block_d, torch.float32),
            room(2 * sizes.block_d, dtype),
            room(sizes.block_e, dtype),
            room(sizes.block_e, dtype),
        )

    @property
    def n_users(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        return self.hidden.shape[1]

    @property
    def passes(self) -> int:
        return self.hidden.shape[0]

    @property
    def most_rows(self) -> int:
        return self.n_users * self.longest

    @property
    def search_step(self) -> int:
        """Where the search for a row's user begins."""
        return next_power_of_2(self.n_users + 1) // 2

    def row_launch(self, n_rows: int | None = None) -> dict[str, Any]:
        """The constants and options of a kernel on all rows, or on `n_rows`."""
        sizes, n_rows = self.stack.sizes, self.most_rows * self.passes if n_rows is None else n_rows
        key = row_key(sizes, self.keys_values.dtype, n_rows)
        return {**sizes.constants(), **choose("causal_rows", key, row_candidates, self.hidden.device).launch()}

    def cache_of(self, layer: int) -> Tensor:
        return self.keys_values[layer if self.keys_values.shape[0] > 1 else 0]

    def attend(self, layer: int, only_last: bool = False) -> None:
        """Fill `gathered` from the block's queries, keys and values; with `only_last` its first rows, one per user."""
        sizes = self.stack.sizes
        key = attend_key(sizes, self.keys_values.dtype, self.longest, only_last)
        config = choose("causal_attend", key, attend_candidates, self.hidden.device)
        tiles = 1 if only_last else triton.cdiv(self.longest, config.constants["BLOCK_Q"])
        attend_kernel[(self.n_users * self.passes * tiles, sizes.block_h)](
            self.queries,
            self.cache_of(layer),
            self.pad[layer],
            self.lengths,
            self.ends,
            self.gathered,
            self.capacity,
            self.keys_values.shape[2],
            self.n_users,
            tiles,
            self.pad.shape[2],
            self.window,
            ONLY_LAST=only_last,
            **sizes.of_heads(),
            **config.launch(),
        )

    def finish(self, layer: int, rows: Tensor | None = None, queries: bool = True) -> None:
        """The rest of the block: its output to `rows` [capacity or less, D] where given, else on to the next block."""
        matrices, vectors = self.stack.layer(layer)
        after = layer if rows is not None else layer + 1
        next_matrices, next_vectors = self.stack.layer(after)
        launch = self.row_launch()
        finish_block_kernel[(triton.cdiv(self.most_rows, launch["BLOCK_R"]), self.passes)](
            self.hidden,
            self.gathered,
            self.shared,
            matrices,
            vectors,
            next_matrices,
            next_vectors,
            self.ends,
            self.gathered if rows is None else rows,
            self.queries,
            self.cache_of(after),
            self.n_users,
            self.capacity,
            self.keys_values.shape[2],
            self.stack.eps,
            NEXT=rows is None,
            QUERIES=queries,
            **launch,
        )
