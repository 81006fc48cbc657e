"""prepare_causal_prefix in Triton: see `fastdiff.kernels.causal_history` for how the blocks run. Its launches take what
encode_causal_history's problems tell of tiles; `_slots_kernel` has nothing to choose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.causal_history import Histories, project_and_store, user_of
from fastdiff.kernels.causal_history_tiles import row_cases
from fastdiff.kernels.causal_transformer import share
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import rows_together
from fastdiff.kernels.sampler_step import unit_rows
from fastdiff.ops.causal_transformer import BlockWeights, Pads
from fastdiff.ops.denoise_attention_loop import CausalPrefix

_USERS = 256  # of one program that writes lengths


@triton.jit(do_not_specialize=["window", "n_users"])
def _slots_kernel(p_lengths, p_slots, p_log_pads, p_empty, window, n_users, BLOCK: tl.constexpr):
    """Of each history: its slots before the last, log(pads before those), and whether it is empty."""
    o_user = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_user = o_user < n_users
    b_length = tl.load(p_lengths + o_user, mask=m_user, other=0)
    tl.store(p_slots + o_user, tl.maximum(b_length - 1, 0), mask=m_user)
    # an empty history's last slot is one of its pads, and the prefix holds the others
    b_pads = (window - tl.maximum(b_length, 1)).to(tl.float32)
    b_log_pads = tl.where(b_pads > 0.0, tl.log(tl.maximum(b_pads, 1.0)), float("-inf"))
    tl.store(p_log_pads + o_user, b_log_pads.to(p_log_pads.dtype.element_ty), mask=m_user)
    tl.store(p_empty + o_user, (b_length == 0).to(tl.uint8), mask=m_user)


@triton.jit(do_not_specialize=["items_stride", "n_users", "search_step", "n_slots"])
def _embed_targets_kernel(
    p_condition,
    p_items,
    p_table,
    p_time,
    p_lengths,
    p_condition_ends,
    p_ends,
    p_matrices,
    p_vectors,
    p_hidden,
    p_shared,
    p_queries,
    p_keys_values,
    condition_stride,
    items_stride,
    table_stride,
    n_users,
    search_step,
    capacity,
    n_slots,
    input_scale,
    NORMALIZE: tl.constexpr,
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
    """The first block's input u of packed slots, for one pass, and its (queries,) keys and values."""
    BLOCK_E: tl.constexpr = BLOCK_H * BLOCK_DH
    i_pass = tl.program_id(1).to(tl.int64)
    first_row, n_rows = tl.program_id(0) * BLOCK_R, tl.load(p_ends + n_users - 1)
    if first_row >= n_rows:
        return
    o_own = first_row + tl.arange(0, BLOCK_R).to(tl.int64)
    m_row = o_own < n_rows
    o_user = user_of(o_own, p_ends, n_users, search_step)
    o_slot = o_own - tl.load(p_ends + o_user - 1, mask=m_row & (o_user > 0), other=0)
    b_item = tl.load(p_items + o_user * items_stride + o_slot + 1, mask=m_row, other=0)
    o_dim = tl.arange(0, BLOCK_D)
    mask = m_row[:, None] & (o_dim < D)[None, :]
    b_h = tl.load(p_table + b_item[:, None] * table_stride + o_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        b_h = unit_rows(b_h)
    b_time = tl.load(p_time + o_dim, mask=o_dim < D, other=0.0).to(tl.float32)
    b_h = input_scale * b_h + b_time[None, :]
    b_length = tl.load(p_lengths + o_user, mask=m_row, other=0)
    o_condition = tl.load(p_condition_ends + o_user, mask=m_row, other=0) - b_length + o_slot
    p_row = p_condition + o_condition[:, None] * condition_stride + o_dim[None, :]
    b_h += tl.load(p_row, mask=mask & (i_pass == 0), other=0.0).to(tl.float32)

    o_row = i_pass * capacity + o_own
    tl.store(p_hidden + o_row[:, None] * BLOCK_D + o_dim[None, :], b_h)
    p_own_shared = p_shared + o_row * (2 * BLOCK_D)
    share(p_own_shared, b_h)
    project_and_store(
        p_own_shared,
        p_matrices,
        p_vectors,
        p_queries + i_pass * capacity * BLOCK_E,
        p_keys_values + i_pass * n_slots * (2 * D),
        o_own,
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


def prepare_causal_prefix(
    condition: Tensor,
    last: Tensor,
    items: Tensor,
    lengths: Tensor,
    item_table: Tensor,
    input_scale: float,
    normalize: bool,
    time: Tensor,
    blocks: tuple[BlockWeights, ...],
    pads: Pads,
    window: int,
    guided: bool,
) -> CausalPrefix:
    """See `fastdiff.ops.prepare_causal_prefix.prepare_causal_prefix_ref`. The prefix has room for B (n - 1) slots."""
    users, width, passes = items.shape[0], max(items.shape[1] - 1, 0), 2 if guided else 1
    slots, lengths = torch.empty_like(lengths, memory_format=torch.contiguous_format), lengths.contiguous()
    log_pads = item_table.new_empty(users)
    empty = torch.empty(users, dtype=torch.bool, device=lengths.device)
    keys_values = item_table.new_empty(len(blocks), passes, users * width, 2 * item_table.shape[1])
    if users:
        programs = (triton.cdiv(users, _USERS),)
        _slots_kernel[programs](lengths, slots, log_pads, empty.view(torch.uint8), window, users, BLOCK=_USERS)
    if users * width:
        histories = Histories.of(blocks, slots, width, window - 1, passes, pads.keys_values, keys_values)
        condition, items, item_table = rows_together(condition), rows_together(items), rows_together(item_table)
        launch = histories.row_launch()
        _embed_targets_kernel[(triton.cdiv(histories.most_rows, launch["BLOCK_R"]), passes)](
            condition,
            items,
            item_table,
            time.contiguous(),
            lengths,
            lengths.cumsum(0),
            histories.ends,
            *histories.stack.layer(0),
            histories.hidden,
            histories.shared,
            histories.queries,
            keys_values,
            condition.stride(0),
            items.stride(0),
            item_table.stride(0),
            users,
            histories.search_step,
            histories.capacity,
            keys_values.shape[2],
            input_scale,
            NORMALIZE=normalize,
            QUERIES=len(blocks) > 1,
            **launch,
        )
        for layer in range(len(blocks) - 1):
            histories.attend(layer)
            histories.finish(layer, queries=layer + 2 < len(blocks))
    cond = torch.stack([last, torch.zeros_like(last)]) if guided else last.unsqueeze(0)
    pad = pads.keys_values if guided else pads.keys_values[:, :1]
    return CausalPrefix(cond, keys_values, slots, pad, log_pads, empty, blocks[0].n_heads)


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles; the other kernels are among `encode_causal_history`'s, and
    so are the configurations that run only where they were measured to be faster."""
    for name, sizes, rows, config, first in row_cases():
        for queries in (True, False) if first else ():
            floating = ("condition", "table", "time", "matrices", "shared", "queries", "keys_values")
            strides = ("condition_stride", "items_stride", "table_stride")
            sizes_of = ("n_users", "search_step", "capacity", "n_slots")
            yield Case(
                f"{name} D={sizes.dim} H={sizes.n_heads} {rows} rows{'' if queries else ', one block'}",
                _embed_targets_kernel,
                {
                    **{f"p_{key}": f"*{name}" for key in floating},
                    **dict.fromkeys(("p_vectors", "p_hidden"), "*fp32"),
                    **dict.fromkeys(("p_items", "p_lengths", "p_condition_ends", "p_ends"), "*i64"),
                    **dict.fromkeys((*strides, *sizes_of), "i32"),
                    "input_scale": "fp32",
                },
                {"NORMALIZE": queries, "QUERIES": queries, **sizes.constants(), **config.constants},
                config.options(),
                hot=sizes.dim <= 128,
                tensor_core=name != "fp32",
            )
    for name in ("fp32", "fp16", "bf16"):
        yield Case(
            f"{name} slots",
            _slots_kernel,
            {
                **dict.fromkeys(("p_lengths", "p_slots"), "*i64"),
                "p_log_pads": f"*{name}",
                "p_empty": "*u8",
                **dict.fromkeys(("window", "n_users"), "i32"),
            },
            {"BLOCK": _USERS},
        )
