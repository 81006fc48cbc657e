"""encode_interests in Triton: one program per user; the learned extractor never writes its logits.

A program reads its history once, a block of places at a time: logits of all interests from two products, the hidden
layer between them in blocks; a running softmax over the places; then one more product, weights^T values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.packing import block_of, blocks_of_64, pack_vector, pack_weight
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.rows import activate, rows_dot
from fastdiff.kernels.runtime import next_power_of_2, require, rows_together
from fastdiff.kernels.tuning import Config, Problem, bucket, choose
from fastdiff.ops.encode_interests import InterestAttention, InterestExtractor
from fastdiff.per_object import packed

_BLOCK_ROWS = 2048  # numbers that one program copies


@triton.jit(do_not_specialize=["items_stride", "n_places", "pad_id"])
def _interests_kernel(
    p_items,
    p_lengths,
    p_table,
    p_positions,
    p_up,
    p_up_bias,
    p_down,
    p_down_bias,
    p_g,
    items_stride,
    table_stride,
    n_places,
    pad_id,
    N_INTERESTS: tl.constexpr,
    DIM: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    POSITIONS_IN_VALUES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_user = tl.program_id(0).to(tl.int64)
    o_dim, o_interest, o_hidden = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_H)
    m_dim = (o_dim < DIM)[None, :]
    length = tl.load(p_lengths + i_user)
    b_down_bias = tl.load(p_down_bias + o_interest).to(tl.float32)

    b_top = tl.full([BLOCK_K], -1e38, tl.float32)  # of the logits so far
    b_sum = tl.zeros([BLOCK_K], tl.float32)
    b_g = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(0, n_places, BLOCK_J):
        o_place = first + tl.arange(0, BLOCK_J)
        b_items = tl.load(p_items + i_user * items_stride + o_place, mask=o_place < length, other=pad_id)
        m_item = (b_items != pad_id)[:, None]
        b_value = tl.load(
            p_table + b_items[:, None] * table_stride + o_dim[None, :], mask=m_item & m_dim, other=0.0
        ).to(tl.float32)
        p_places = p_positions + o_place[:, None] * DIM + o_dim[None, :]
        b_placed = b_value + tl.load(p_places, mask=m_item & m_dim, other=0.0).to(tl.float32)
        if POSITIONS_IN_VALUES:
            b_value = b_placed

        # Kahan's sum over the blocks: logits are tens in size where the softmax looks at their differences, so that
        # each ulp of a sum over all hidden units would be seen in the interests
        b_logits = tl.zeros([BLOCK_J, BLOCK_K], tl.float32) + b_down_bias[None, :]
        b_lost = tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
        for at in range(0, HIDDEN_PADDED, BLOCK_H):
            b_bias = tl.load(p_up_bias + at + o_hidden).to(tl.float32)
            b_h = tl.zeros([BLOCK_J, BLOCK_H], tl.float32) + b_bias[None, :]
            b_h = rows_dot(b_placed, p_up + at, b_h, HIDDEN_PADDED, TILE)
            b_part = tl.zeros([BLOCK_J, BLOCK_K], tl.float32) - b_lost
            b_part = rows_dot(activate(b_h, "tanh"), p_down + at * BLOCK_K, b_part, BLOCK_K, TILE)
            b_total = b_logits + b_part
            b_lost = (b_total - b_logits) - b_part
            b_logits = b_total

        b_new_top = tl.maximum(b_top, tl.max(tl.where(m_item, b_logits, -1e38), axis=0))
        b_share = tl.exp(tl.where(m_item, b_logits - b_new_top[None, :], -1e38))
        b_scale = tl.exp(b_top - b_new_top)
        b_sum = b_sum * b_scale + tl.sum(b_share, axis=0)
        DTYPE: tl.constexpr = p_table.dtype.element_ty
        b_g = tl.dot(tl.trans(b_share).to(DTYPE), b_value.to(DTYPE), b_g * b_scale[:, None], input_precision="ieee")
        b_top = b_new_top
    b_g = b_g / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    p_out = p_g + (i_user * N_INTERESTS + o_interest[:, None]) * DIM + o_dim[None, :]
    tl.store(p_out, b_g.to(p_g.dtype.element_ty), mask=(o_interest < N_INTERESTS)[:, None] & m_dim)


@triton.jit(do_not_specialize=["items_stride", "n_rows", "pad_id"])
def _last_items_kernel(
    p_items,
    p_lengths,
    p_table,
    p_g,
    items_stride,
    table_stride,
    n_rows,
    pad_id,
    N_INTERESTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_dim = tl.arange(0, BLOCK_D)
    m_row, m_dim = o_row < n_rows, (o_dim < DIM)[None, :]
    b_user = o_row // N_INTERESTS
    b_length = tl.load(p_lengths + b_user, mask=m_row, other=0)
    b_place = b_length - N_INTERESTS + o_row % N_INTERESTS
    b_item = tl.load(p_items + b_user * items_stride + b_place, mask=m_row & (b_place >= 0), other=pad_id)
    m_item = (b_item != pad_id)[:, None] & m_dim
    b_value = tl.load(p_table + b_item[:, None] * table_stride + o_dim[None, :], mask=m_item, other=0.0)
    tl.store(p_g + o_row[:, None] * DIM + o_dim[None, :], b_value, mask=m_row[:, None] & m_dim)


def encode_interests(items: Tensor, lengths: Tensor, item_table: Tensor, extractor: InterestExtractor) -> Tensor:
    """See `fastdiff.ops.encode_interests.encode_interests_ref`; items and lengths are taken for valid: they are on the
    device."""
    n_users, dim, interests = items.shape[0], item_table.shape[1], extractor.n_interests
    require("encode_interests", "items", items, (n_users, items.shape[1]), torch.int64)
    require("encode_interests", "lengths", lengths, (n_users,), torch.int64)
    g = torch.empty(n_users, interests, dim, dtype=item_table.dtype, device=item_table.device)
    if g.numel() == 0:
        return g
    items, lengths, item_table = rows_together(items), lengths.contiguous(), rows_together(item_table)
    history = (items, lengths, item_table)
    sizes = (items.stride(0), item_table.stride(0))
    if extractor.attention is None:
        block_r, block_d = _copy_blocks(dim)
        n_rows = n_users * interests
        _last_items_kernel[(triton.cdiv(n_rows, block_r),)](
            *history,
            g,
            *sizes,
            n_rows,
            extractor.pad_id,
            N_INTERESTS=interests,
            DIM=dim,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
        )
        return g
    positions, *layers = packed(extractor, _pack)
    require("encode_interests", "item_table", item_table, (item_table.shape[0], positions.shape[1]), positions.dtype)
    hidden = extractor.attention.up[1].shape[0]
    key = (bucket(items.shape[1], least=16), block_of(dim), blocks_of_64(hidden), item_table.element_size())
    config = choose("encode_interests", key, _candidates, item_table.device)
    _interests_kernel[(n_users,)](
        *history,
        positions,
        *layers,
        g,
        *sizes,
        items.shape[1],
        extractor.pad_id,
        POSITIONS_IN_VALUES=extractor.attention.positions_in_values,
        **_constants(dim, hidden, interests, item_table.element_size()),
        **config.launch(),
    )
    return g


def _pack(extractor: InterestExtractor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Positions, then weight and bias of both layers."""
    attention = extractor.attention
    assert attention is not None
    (up, up_bias), (down, down_bias) = attention.up, attention.down
    hidden, interests = blocks_of_64(up_bias.shape[0]), block_of(extractor.n_interests)
    return (
        attention.positions.detach().contiguous(),
        pack_weight(up, block_of(attention.positions.shape[1]), hidden),
        pack_vector(up_bias, hidden),
        pack_weight(down, hidden, interests),
        pack_vector(down_bias, interests),
    )


def _constants(dim: int, hidden: int, interests: int, itemsize: int) -> dict[str, Any]:
    """The constants of the kernel that the sizes decide."""
    return {
        "N_INTERESTS": interests,
        "DIM": dim,
        "HIDDEN_PADDED": blocks_of_64(hidden),
        "TILE": 16384 // itemsize,
        "BLOCK_D": block_of(dim),
        "BLOCK_K": block_of(interests),
    }


def _candidates(places: int, block_d: int, padded: int, itemsize: int) -> list[Config]:
    most = max(16, (2048 if itemsize == 4 else 4096) // block_d)
    warps = 4 if itemsize == 2 and block_d <= 64 else 8
    units = (128 if block_d <= 64 or itemsize == 4 else 64) // itemsize  # more would spill on sm_80
    found = {}
    for numbers, chosen in ((most, warps), (most, 12 - warps), (max(16, most // 2), 4)):
        blocks = {"BLOCK_J": min(places, numbers), "BLOCK_H": min(padded, units)}
        found[blocks["BLOCK_J"], chosen] = Config(blocks, chosen, num_stages=2)
    return list(found.values())


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times: DimeRec's published sizes, and a longer window."""
    for dtype in (torch.float32, torch.float16):
        for places, dim, users in ((16, 64, 8), (64, 64, 2048), (64, 128, 2048)):
            up, down = (torch.randn(*shape, device=device).to(dtype) / 16 for shape in ((4 * dim, dim), (4, 4 * dim)))
            table = torch.randn(1000, dim, device=device).to(dtype)
            zeros = torch.zeros(4 * dim, dtype=dtype, device=device)
            attention = InterestAttention(table[:places].clone(), (up, zeros), (down, zeros[:4].clone()))
            items = torch.randint(1, 1000, (users, places), device=device)
            lengths = torch.full((users,), places, device=device)
            run = partial(encode_interests, items, lengths, table, InterestExtractor(4, 0, attention))
            key = (places, dim, 4 * dim, table.element_size())
            yield Problem("encode_interests", key, _candidates(*key), run)


def _copy_blocks(dim: int) -> tuple[int, int]:
    block_d = next_power_of_2(dim)
    return max(1, _BLOCK_ROWS // block_d), block_d


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    sizes = dict.fromkeys(("items_stride", "table_stride", "n_places", "n_rows", "pad_id"), "i32")
    history = dict.fromkeys(("p_items", "p_lengths"), "*i64")
    layers = ("p_positions", "p_up", "p_up_bias", "p_down", "p_down_bias")
    for dtype, n_places, dim, interests in (
        ("fp32", 10, 64, 4),
        ("fp32", 50, 128, 20),
        ("fp16", 50, 64, 4),
        ("fp16", 50, 128, 20),
        ("bf16", 50, 128, 4),
    ):
        itemsize = 4 if dtype == "fp32" else 2
        for i, config in enumerate(_candidates(block_of(n_places), dim, 4 * dim, itemsize)):
            yield Case(
                f"{dtype} n={n_places} D={dim} K={interests} {config.words()}",
                _interests_kernel,
                history
                | dict.fromkeys(("p_table", "p_g", *layers), f"*{dtype}")
                | {name: sizes[name] for name in sizes if name != "n_rows"},
                {"POSITIONS_IN_VALUES": True, **_constants(dim, 4 * dim, interests, itemsize), **config.constants},
                config.options(),
                hot=i == 0,  # another one is taken only where it was measured to be faster
                tensor_core=itemsize == 2,
            )
    for dtype, dim in (("fp32", 64), ("fp16", 100)):
        block_r, block_d = _copy_blocks(dim)
        yield Case(
            f"{dtype} last items D={dim}",
            _last_items_kernel,
            history
            | dict.fromkeys(("p_table", "p_g"), f"*{dtype}")
            | {name: sizes[name] for name in sizes if name != "n_places"},
            {"N_INTERESTS": 4, "DIM": dim, "BLOCK_R": block_r, "BLOCK_D": block_d},
        )
