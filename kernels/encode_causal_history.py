"""encode_causal_history in Triton: see `fastdiff.kernels.causal_history` for how the blocks run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.causal_history import (
    Histories,
    attend_kernel,
    finish_block_kernel,
    project_and_store,
    user_of,
)
from fastdiff.kernels.causal_history_tiles import (
    attend_candidates,
    attend_cases,
    attend_key,
    row_candidates,
    row_cases,
    row_key,
)
from fastdiff.kernels.causal_transformer import DTYPES, BlockSizes, finish_block, share
from fastdiff.kernels.packing import block_of, pack_vector
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.rows import layer_norm
from fastdiff.kernels.runtime import rows_together
from fastdiff.kernels.tuning import Problem
from fastdiff.ops.causal_transformer import BlockWeights, Pads
from fastdiff.per_object import packed


@triton.jit(do_not_specialize=["items_stride", "n_users", "search_step"])
def _embed_items_kernel(
    p_items,
    p_table,
    p_norm_weight,
    p_norm_bias,
    p_ends,
    p_matrices,
    p_vectors,
    p_hidden,
    p_shared,
    p_queries,
    p_keys_values,
    items_stride,
    table_stride,
    n_users,
    search_step,
    norm_eps,
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
    """The first block's input LN(item_table[items]) of packed rows, and its queries, keys and values."""
    first_row, n_rows = tl.program_id(0) * BLOCK_R, tl.load(p_ends + n_users - 1)
    if first_row >= n_rows:
        return
    o_row = first_row + tl.arange(0, BLOCK_R).to(tl.int64)
    m_row = o_row < n_rows
    o_user = user_of(o_row, p_ends, n_users, search_step)
    b_start = tl.load(p_ends + o_user - 1, mask=m_row & (o_user > 0), other=0)
    b_item = tl.load(p_items + o_user * items_stride + (o_row - b_start), mask=m_row, other=0)
    o_dim = tl.arange(0, BLOCK_D)
    mask = m_row[:, None] & (o_dim < D)[None, :]
    b_h = tl.load(p_table + b_item[:, None] * table_stride + o_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    b_h = layer_norm(b_h, p_norm_weight, p_norm_bias, norm_eps, D, BLOCK_D)
    tl.store(p_hidden + o_row[:, None] * BLOCK_D + o_dim[None, :], b_h)
    p_own_shared = p_shared + o_row * (2 * BLOCK_D)
    share(p_own_shared, b_h)
    project_and_store(
        p_own_shared,
        p_matrices,
        p_vectors,
        p_queries,
        p_keys_values,
        o_row,
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


@triton.jit
def _last_rows_kernel(p_rows, p_lengths, p_ends, p_pad_output, p_last, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Each user's last row of p_rows [.., D]; the pads' output for an empty history."""
    i_user = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, BLOCK_D)
    m_dim = o_dim < D
    some = tl.load(p_lengths + i_user) > 0
    b_last = tl.load(p_rows + (tl.load(p_ends + i_user) - 1) * D + o_dim, mask=m_dim & some, other=0.0)
    b_pad = tl.load(p_pad_output + o_dim, mask=m_dim, other=0.0)
    tl.store(p_last + i_user * D + o_dim, tl.where(some, b_last, b_pad), mask=m_dim)


@triton.jit(do_not_specialize=["n_users"])
def _finish_last_kernel(
    p_hidden,
    p_gathered,
    p_shared,
    p_matrices,
    p_vectors,
    p_lengths,
    p_ends,
    p_pad_output,
    p_last,
    n_users,
    eps,
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
    """The last block behind its attention for each user's last row alone; rows of p_gathered and p_shared are users."""
    o_user = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_dim = tl.arange(0, BLOCK_D)
    m_user = o_user < n_users
    b_length = tl.load(p_lengths + o_user, mask=m_user, other=0)
    o_row = tl.load(p_ends + o_user, mask=m_user, other=0) - 1
    m_row = b_length > 0
    b_h = tl.load(p_hidden + o_row[:, None] * BLOCK_D + o_dim[None, :], mask=m_row[:, None], other=0.0)
    b_h = finish_block(
        b_h,
        p_gathered + o_user * (BLOCK_H * BLOCK_DH),
        p_shared + o_user * (2 * BLOCK_D),
        p_matrices,
        p_vectors,
        eps,
        D,
        F,
        BLOCK_D,
        BLOCK_H * BLOCK_DH,
        BLOCK_F,
        BLOCK_K,
    )
    b_pad = tl.load(p_pad_output + o_dim, mask=o_dim < D, other=0.0).to(tl.float32)
    b_h = tl.where(m_row[:, None], b_h, b_pad[None, :])
    p_out = p_last + o_user[:, None] * D + o_dim[None, :]
    tl.store(p_out, b_h.to(p_last.dtype.element_ty), mask=m_user[:, None] & (o_dim < D)[None, :])


def encode_causal_history(
    items: Tensor,
    lengths: Tensor,
    item_table: Tensor,
    norm: tuple[Tensor, Tensor, float],
    blocks: tuple[BlockWeights, ...],
    pads: Pads,
    window: int,
    only_last: bool,
) -> tuple[Tensor, Tensor]:
    """See `fastdiff.ops.encode_causal_history.encode_causal_history_ref`. The rows have room for B n of them."""
    users, dim = items.shape[0], item_table.shape[1]
    last = item_table.new_empty(users, dim)
    most_rows = items.numel()
    rows = item_table.new_empty(0 if only_last else most_rows, dim)
    if users == 0:
        return rows, last
    keys_values = item_table.new_empty(1, 1, most_rows, 2 * dim)
    longest = max(1, items.shape[1])
    histories = Histories.of(blocks, lengths.contiguous(), longest, window, 1, pads.keys_values, keys_values)
    items, item_table = rows_together(items), rows_together(item_table)
    weight, bias, norm_eps = norm
    launch = histories.row_launch()
    tiles = (triton.cdiv(histories.most_rows, launch["BLOCK_R"]),)
    _embed_items_kernel[tiles](
        items,
        item_table,
        packed(weight, _norm_vector),
        packed(bias, _norm_vector),
        histories.ends,
        *histories.stack.layer(0),
        histories.hidden,
        histories.shared,
        histories.queries,
        keys_values,
        items.stride(0),
        item_table.stride(0),
        users,
        histories.search_step,
        norm_eps,
        QUERIES=True,
        **launch,
    )
    of_last = len(blocks) - 1
    for layer in range(of_last):
        histories.attend(layer)
        histories.finish(layer)
    histories.attend(of_last, only_last)
    pad_output = pads.output.contiguous()
    if only_last:
        _finish_last(histories, pad_output, last)
        return rows, last
    histories.finish(of_last, rows)
    constants = {name: launch[name] for name in ("D", "BLOCK_D")}
    _last_rows_kernel[(users,)](rows, histories.lengths, histories.ends, pad_output, last, **constants, num_warps=1)
    return rows, last


def _finish_last(histories: Histories, pad_output: Tensor, last: Tensor) -> None:
    launch = histories.row_launch(last.shape[0])
    _finish_last_kernel[(triton.cdiv(last.shape[0], launch["BLOCK_R"]),)](
        histories.hidden,
        histories.gathered,
        histories.shared,
        *histories.stack.layer(-1),
        histories.lengths,
        histories.ends,
        pad_output,
        last,
        last.shape[0],
        histories.stack.eps,
        **launch,
    )


def _norm_vector(values: Tensor) -> Tensor:
    """[D] as a LayerNorm in a kernel reads it."""
    return pack_vector(values.to(torch.float32), block_of(values.shape[0]))


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times: ADRec's published sizes, windows full but for one user's.

    The winners are those of prepare_causal_prefix as well, whose histories are one slot shorter."""
    dim, heads, rows, n_blocks = 128, 4, 1000, 2
    for dtype in DTYPES.values():
        ones, zeros = torch.ones(dim, dtype=dtype, device=device), torch.zeros(4 * dim, dtype=dtype, device=device)

        def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            scale = 1.0 / float(shape[-1]) ** 0.5
            values: Tensor = (scale * torch.randn(*shape, device=device)).to(dtype)
            return values

        block = BlockWeights(
            *(drawn(3 * dim, dim), zeros[: 3 * dim], drawn(dim, dim), zeros[:dim], (ones, zeros[:dim])),
            *(drawn(4 * dim, dim), zeros, drawn(dim, 4 * dim), zeros[:dim], (ones, zeros[:dim])),
            n_heads=heads,
        )
        pads, sizes = Pads(drawn(n_blocks, 1, 2 * dim), drawn(1, dim)), BlockSizes.of(block)
        table, norm = drawn(rows, dim), (ones, zeros[:dim], 1e-12)
        for users, slots in ((1, 16), (32, 50), (256, 50), (2048, 50)):
            items = torch.randint(1, rows, (users, slots), device=device)
            lengths = torch.full((users,), slots, device=device)
            arguments = (items, lengths, table, norm, (block,) * n_blocks, pads, 50)
            every, last = (partial(_rows_or_last, *arguments, only_last) for only_last in (False, True))
            of_rows = row_key(sizes, dtype, users * slots)
            yield Problem("causal_rows", of_rows, row_candidates(*of_rows), every)  # type: ignore[arg-type]
            for run, only_last in ((every, False), (last, True)) if users in (1, 256) else ():
                key = attend_key(sizes, dtype, slots, only_last)
                yield Problem("causal_attend", key, attend_candidates(*key), run)  # type: ignore[arg-type]


def _rows_or_last(*arguments: Any) -> Tensor:
    rows, last = encode_causal_history(*arguments)
    return rows if len(rows) else last


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles. Of tiles that do not come first, the kernel that takes the
    most of everything: the one that goes on to the next block."""
    for name, sizes, rows, config, first in row_cases():
        at, options = f"{name} D={sizes.dim} H={sizes.n_heads} {rows} rows", config.options()
        constants = {**sizes.constants(), **config.constants}
        flags: dict[str, Any] = {"hot": first and sizes.dim <= 128, "tensor_core": name != "fp32"}
        floating = dict.fromkeys(("p_table", "p_matrices", "p_shared", "p_queries", "p_keys_values"), f"*{name}")
        vectors = dict.fromkeys(("p_norm_weight", "p_norm_bias", "p_vectors", "p_hidden"), "*fp32")
        integers = dict.fromkeys(("items_stride", "table_stride", "n_users", "search_step"), "i32")
        if first:
            yield Case(
                f"{at} embed",
                _embed_items_kernel,
                {**floating, **vectors, "p_items": "*i64", "p_ends": "*i64", **integers, "norm_eps": "fp32"},
                {"QUERIES": True, **constants},
                options,
                **flags,
            )
            floating = dict.fromkeys(("p_gathered", "p_shared", "p_matrices", "p_pad_output", "p_last"), f"*{name}")
            yield Case(
                f"{at} finish last",
                _finish_last_kernel,
                {
                    **floating,
                    **dict.fromkeys(("p_hidden", "p_vectors"), "*fp32"),
                    **dict.fromkeys(("p_lengths", "p_ends"), "*i64"),
                    "n_users": "i32",
                    "eps": "fp32",
                },
                constants,
                options,
                **flags,
            )
        floating = dict.fromkeys(("p_gathered", "p_shared", "p_matrices", "p_next_matrices"), f"*{name}")
        floating |= dict.fromkeys(("p_rows", "p_queries", "p_keys_values"), f"*{name}")
        for after in (True, False) if first else (True,):
            yield Case(
                f"{at} finish{', next' if after else ''}",
                finish_block_kernel,
                {
                    **floating,
                    **dict.fromkeys(("p_hidden", "p_vectors", "p_next_vectors"), "*fp32"),
                    "p_ends": "*i64",
                    **dict.fromkeys(("n_users", "capacity", "n_slots"), "i32"),
                    "eps": "fp32",
                },
                {"NEXT": after, "QUERIES": True, **constants},
                options,
                **flags,
            )
    for name, sizes, only_last, config, first in attend_cases():
        words = "" if first else f" {config.words()}"
        yield Case(
            f"{name} D={sizes.dim} H={sizes.n_heads} attend{' last' if only_last else ''}{words}",
            attend_kernel,
            {
                **dict.fromkeys(("p_queries", "p_keys_values", "p_pad", "p_gathered"), f"*{name}"),
                **dict.fromkeys(("p_lengths", "p_ends"), "*i64"),
                **dict.fromkeys(("capacity", "n_slots", "n_users", "n_tiles", "pad_stride", "window"), "i32"),
            },
            {"ONLY_LAST": only_last, **sizes.of_heads(), **config.constants},
            config.options(),
            hot=first and sizes.dim <= 128,
            tensor_core=name != "fp32",
        )
    for name in DTYPES:
        yield Case(
            f"{name} D=128 last rows",
            _last_rows_kernel,
            {
                **dict.fromkeys(("p_rows", "p_pad_output", "p_last"), f"*{name}"),
                **dict.fromkeys(("p_lengths", "p_ends"), "*i64"),
            },
            {"D": 128, "BLOCK_D": 128},
            {"num_warps": 1},
        )
