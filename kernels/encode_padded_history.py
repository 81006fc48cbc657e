"""encode_padded_history in Triton.

Four launches where there is one block, as in the published models:

    embed   the newest slot's row LN(item + position), the query
    addmm   W_k^T W_q of every head folded in one matrix: what each head asks of the rows x_j, [B, H, D]
    attend  per user: gather, add positions, normalise, and mix under a running softmax over all heads; the rows of a
            history are read once from the item table and never written
    finish  per 16 users: W_o W_v folded in one matrix, and the rest of the block

Lower blocks, where there are some, need all rows: those are written once per block, for PyTorch's attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.packing import block_of
from fastdiff.kernels.padded_transformer import (
    Finish,
    dtype_key,
    finish_candidates,
    finish_kernel,
    finish_rows,
    finish_types,
    pack_vectors,
)
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.rows import layer_norm
from fastdiff.kernels.runtime import next_power_of_2
from fastdiff.kernels.tuning import Config, Problem, bucket, choose
from fastdiff.ops.encode_padded_history import PaddedEncoder
from fastdiff.ops.padded_transformer import Layer, PaddedBlock
from fastdiff.per_object import packed

_ROWS = 4096  # numbers that a program of `embed` makes
_MIXED = ((8192, 8, 192), (4096, 4, 168))  # numbers of a tile of `attend`, heads x slots x dims; warps and registers
_FEW_USERS = 256  # that a GPU's cores take at once, where a program has most of a core's registers


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    """norm [2, BLOCK_D] float32 weight and bias   ask_weight [H D, D], ask_bias [H D]   finish  of each block"""

    norm: Tensor
    ask_weight: Tensor
    ask_bias: Tensor
    finish: tuple[Finish, ...]


def _pack(encoder: PaddedEncoder) -> _Packed:
    last, dim = encoder.blocks[-1], encoder.positions.shape[1]
    heads, dtype = last.n_heads, encoder.positions.dtype
    query, key, value = (
        layer[0].detach().double().view(heads, -1, dim) for layer in (last.query, last.key, last.value)
    )
    scale = 1.0 / math.sqrt(dim // heads)
    ask_weight = scale * torch.bmm(key.transpose(1, 2), query)  # [H, D, D]
    ask_bias = scale * torch.bmm(key.transpose(1, 2), last.query[1].detach().double().view(heads, -1, 1))
    out = last.out[0].detach().double().view(dim, heads, -1).transpose(0, 1)  # [H, D, D / H]
    mixed = torch.bmm(out, value).transpose(0, 1).flatten(1)  # [D, H D]
    bias = last.out[0].detach().double() @ last.value[1].detach().double() + last.out[1].detach().double()
    lower = [Finish.of(block.out, block.norm_1, block.up, block.down, block.norm_2) for block in encoder.blocks[:-1]]
    return _Packed(
        pack_vectors(block_of(dim), *encoder.norm),
        ask_weight.flatten(0, 1).to(dtype),
        ask_bias.flatten().to(dtype),
        (*lower, Finish.of((mixed.to(dtype), bias), last.norm_1, last.up, last.down, last.norm_2)),
    )


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _embedded(
    p_table,
    table_stride,
    p_positions,
    positions_stride,
    p_norm,
    b_item,
    b_slot,
    m_row,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """LN(table[item] + positions[slot]) [R, BLOCK_D] float32."""
    o_dim = tl.arange(0, BLOCK_D)
    mask = m_row[:, None] & (o_dim < D)[None, :]
    b_x = tl.load(p_table + b_item[:, None] * table_stride + o_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    p_position = p_positions + b_slot[:, None] * positions_stride + o_dim[None, :]
    b_x += tl.load(p_position, mask=mask, other=0.0).to(tl.float32)
    return layer_norm(b_x, p_norm, p_norm + BLOCK_D, eps, D, BLOCK_D)


@triton.jit(do_not_specialize=["items_row_stride", "n_rows", "width", "pad_id"])
def _embed_kernel(
    p_items,
    p_lengths,
    p_table,
    p_positions,
    p_norm,
    p_x,
    p_narrow,
    items_row_stride,
    items_stride,
    table_stride,
    positions_stride,
    n_rows,
    width,
    window,
    pad_id,
    eps,
    NEWEST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows x [n_rows, D] in float32 and in the model's dtype: the newest of each user, or all `width` of each."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < n_rows
    if NEWEST:
        o_user = o_row
        b_length = tl.load(p_lengths + o_user, mask=m_row, other=0)
        o_place = tl.maximum(b_length - 1, 0)
    else:
        o_user, o_place = o_row // width, o_row % width
        b_length = tl.load(p_lengths + o_user, mask=m_row, other=0)
    m_inside = m_row & (o_place < b_length)
    b_item = tl.load(p_items + o_user * items_row_stride + o_place * items_stride, mask=m_inside, other=pad_id)
    b_slot = tl.minimum(window - b_length + o_place, window - 1)
    b_x = _embedded(
        p_table, table_stride, p_positions, positions_stride, p_norm, b_item, b_slot, m_row, eps, D, BLOCK_D
    )
    o_dim = tl.arange(0, BLOCK_D)
    o_out = o_row[:, None] * D + o_dim[None, :]
    m_out = m_row[:, None] & (o_dim < D)[None, :]
    tl.store(p_x + o_out, b_x, mask=m_out)
    tl.store(p_narrow + o_out, b_x.to(p_narrow.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["items_row_stride", "width", "pad_id"])
def _attend_kernel(
    p_items,
    p_lengths,
    p_table,
    p_positions,
    p_norm,
    p_x,
    p_asked,
    p_mixed,
    p_has_key,
    items_row_stride,
    items_stride,
    table_stride,
    positions_stride,
    width,
    window,
    pad_id,
    eps,
    FROM_TABLE: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What each head of a user's newest slot mixes of the rows: [H, D]; and whether there was a row to mix."""
    i_user = tl.program_id(0).to(tl.int64)
    length = tl.load(p_lengths + i_user)
    o_dim, o_head = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    o_asked = (i_user * H + o_head)[:, None] * D + o_dim[None, :]
    m_asked = (o_head < H)[:, None] & (o_dim < D)[None, :]
    b_asked = tl.load(p_asked + o_asked, mask=m_asked, other=0.0).to(tl.float32)
    b_most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    b_weights = tl.zeros([BLOCK_H], tl.float32)
    b_mixed = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_N):
        o_place = first + tl.arange(0, BLOCK_N)
        m_inside = o_place < length
        b_item = tl.load(p_items + i_user * items_row_stride + o_place * items_stride, mask=m_inside, other=pad_id)
        m_key = m_inside & (b_item != pad_id)
        if FROM_TABLE:
            b_slot = window - length + o_place
            b_x = _embedded(
                p_table, table_stride, p_positions, positions_stride, p_norm, b_item, b_slot, m_key, eps, D, BLOCK_D
            )
        else:
            m_x = m_key[:, None] & (o_dim < D)[None, :]
            b_x = tl.load(p_x + (i_user * width + o_place)[:, None] * D + o_dim[None, :], mask=m_x, other=0.0)
        b_logits = tl.sum(b_asked[:, None, :] * b_x[None, :, :], axis=2)
        b_logits = tl.where(m_key[None, :], b_logits, float("-inf"))
        b_highest = tl.maximum(b_most, tl.max(b_logits, axis=1))
        b_origin = tl.where(b_highest == float("-inf"), 0.0, b_highest)  # no key so far
        b_before = tl.exp(b_most - b_origin)
        b_shares = tl.exp(b_logits - b_origin[:, None])
        b_weights = b_weights * b_before + tl.sum(b_shares, axis=1)
        b_mixed = b_mixed * b_before[:, None] + tl.sum(b_shares[:, :, None] * b_x[None, :, :], axis=1)
        b_most = b_highest
    b_mixed = b_mixed / tl.where(b_weights == 0.0, 1.0, b_weights)[:, None]
    tl.store(p_mixed + o_asked, b_mixed.to(p_mixed.dtype.element_ty), mask=m_asked)
    tl.store(p_has_key + i_user, (tl.max(b_weights, axis=0) > 0.0).to(tl.int8))


# --- the launcher -----------------------------------------------------------------------------------------------------


def encode_padded_history(items: Tensor, lengths: Tensor, item_table: Tensor, encoder: PaddedEncoder) -> Tensor:
    """See `fastdiff.ops.encode_padded_history.encode_padded_history_ref`. Rows outside the table are not refused: that
    would wait for the device."""
    n_users, width = items.shape
    if n_users == 0 or width == 0:
        return encoder.empty.expand(n_users, -1).contiguous()
    weights, last = packed(encoder, _pack), encoder.blocks[-1]
    dim, dtype, device = item_table.shape[1], item_table.dtype, item_table.device
    item_table = item_table if item_table.stride(1) == 1 else item_table.contiguous()
    positions = encoder.positions if encoder.positions.stride(1) == 1 else encoder.positions.contiguous()
    lengths = lengths.contiguous()
    sizes = {"D": dim, "BLOCK_D": block_of(dim)}
    inputs = (items, lengths, item_table, positions, weights.norm)
    strides = (*items.stride(), item_table.stride(0), positions.stride(0))
    facts = (width, positions.shape[0], encoder.pad_id, last.eps)
    block_r = _embed_rows(sizes["BLOCK_D"])

    def embed(rows: int, newest: bool) -> tuple[Tensor, Tensor]:
        x = torch.empty(rows, dim, device=device)
        narrow = x if dtype == torch.float32 else torch.empty(rows, dim, dtype=dtype, device=device)
        _embed_kernel[(triton.cdiv(rows, block_r),)](
            *inputs, x, narrow, *strides, rows, *facts, NEWEST=newest, BLOCK_R=block_r, **sizes, num_warps=4
        )
        return x, narrow

    x = None
    if len(encoder.blocks) > 1:
        x = _lower(encoder, weights, *embed(n_users * width, newest=False), items, lengths)
        newest = (lengths - 1).clamp_(min=0)[:, None, None].expand(-1, 1, dim)
        query = x.view(n_users, width, dim).gather(1, newest).squeeze(1)
        narrow = query.to(dtype)
    else:
        query, narrow = embed(n_users, newest=True)
    asked = F.linear(narrow, weights.ask_weight, weights.ask_bias)
    mixed, has_key = torch.empty_like(asked), torch.empty(n_users, dtype=torch.int8, device=device)
    key = (bucket(n_users), next_power_of_2(width), next_power_of_2(last.n_heads), sizes["BLOCK_D"])
    config = choose("encode_padded_history", key, _attend_candidates, device)
    _attend_kernel[(n_users,)](
        *inputs,
        query if x is None else x,
        asked,
        mixed,
        has_key,
        *strides,
        *facts,
        FROM_TABLE=x is None,
        H=last.n_heads,
        BLOCK_H=next_power_of_2(last.n_heads),
        **sizes,
        **config.launch(),
    )
    context = torch.empty(n_users, dim, dtype=dtype, device=device)
    finish_rows(last, weights.finish[-1], mixed, query, context, has_key, encoder.empty)
    return context


def _lower(
    encoder: PaddedEncoder, weights: _Packed, x: Tensor, narrow: Tensor, items: Tensor, lengths: Tensor
) -> Tensor:
    """x [B n, D] float32 after all blocks but the last."""
    n_users, width = items.shape
    inside = torch.arange(width, device=items.device) < lengths[:, None]
    is_key = inside & (items != encoder.pad_id)
    for block, finish in zip(encoder.blocks[:-1], weights.finish[:-1], strict=True):
        gathered = block.gather_all(narrow.view(n_users, width, -1), is_key).reshape(n_users * width, -1)
        after = torch.empty_like(x)
        finish_rows(block, finish, gathered, x, after)
        x, narrow = after, after.to(narrow.dtype)
    return x


def _embed_rows(block_d: int) -> int:
    return max(1, _ROWS // block_d)


def _attend_candidates(users: int, slots: int, block_h: int, block_d: int) -> list[Config]:
    """Slots at a time: few users are served fastest with as many as registers hold; for many, smaller programs share a
    core and hide each other's waiting."""
    found = {}
    for numbers, warps, registers in _MIXED if users <= _FEW_USERS else _MIXED[::-1]:
        block_n = min(slots, max(1, numbers // (block_h * block_d)))
        found[block_n, warps] = Config({"BLOCK_N": block_n}, warps, maxnreg=registers)
    return list(found.values())


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times: CDDRec's published sizes."""
    dim, heads, window, rows = 128, 4, 20, 2048
    for dtype in (torch.float32, torch.float16, torch.bfloat16):

        def layer(n_out: int, n_in: int, dtype: torch.dtype = dtype) -> Layer:
            weight = torch.randn(n_out, n_in, device=device) / math.sqrt(n_in)
            return weight.to(dtype), torch.zeros(n_out, dtype=dtype, device=device)

        norm = (torch.ones(dim, dtype=dtype, device=device), torch.zeros(dim, dtype=dtype, device=device))
        query, key, value, out = (layer(dim, dim) for _ in range(4))
        block = PaddedBlock(query, key, value, out, norm, layer(4 * dim, dim), layer(dim, 4 * dim), norm, heads)
        table, positions, empty = layer(rows, dim)[0], layer(window, dim)[0], layer(1, dim)[0]
        encoder = PaddedEncoder(positions, norm, (block,), 0, empty)
        for users in (32, 256, 2048):
            items = torch.randint(1, rows, (users, window), device=device)
            lengths = torch.full((users,), window, device=device)
            run = partial(encode_padded_history, items, lengths, table, encoder)
            slots = (users, next_power_of_2(window), heads, dim)
            yield Problem("encode_padded_history", slots, _attend_candidates(*slots), run)
            sizes = (users, dim, dtype_key(dtype))
            yield Problem("finish", sizes, finish_candidates(*sizes), run)


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    strides = dict.fromkeys(("items_row_stride", "items_stride", "table_stride", "positions_stride"), "i32")
    facts = {"width": "i32", "window": "i32", "pad_id": "i32", "eps": "fp32"}
    for dtype, name in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
        inputs = {"p_items": "*i64", "p_lengths": "*i64", "p_norm": "*fp32"}
        inputs |= dict.fromkeys(("p_table", "p_positions"), f"*{dtype}")
        for dim, heads, width in ((64, 2, 50), (128, 4, 20), (256, 4, 200)) if dtype == "fp16" else ((128, 4, 20),):
            sizes = {"D": dim, "BLOCK_D": block_of(dim)}
            yield Case(
                f"embed {dtype} D={dim}",
                _embed_kernel,
                {**inputs, **strides, **facts, "p_x": "*fp32", "p_narrow": f"*{dtype}", "n_rows": "i32"},
                {**sizes, "NEWEST": True, "BLOCK_R": _embed_rows(dim)},
                {"num_warps": 4},
            )
            for i, config in enumerate(_attend_candidates(1, next_power_of_2(width), heads, dim)):
                outputs = {"p_asked": f"*{dtype}", "p_mixed": f"*{dtype}", "p_x": "*fp32", "p_has_key": "*i8"}
                for from_table in (True, False) if i == 0 else (True,):
                    yield Case(
                        f"attend {dtype} D={dim} H={heads} {config.words()}{'' if from_table else ' from rows'}",
                        _attend_kernel,
                        {**inputs, **strides, **facts, **outputs},
                        {**sizes, **config.constants, "H": heads, "BLOCK_H": heads, "FROM_TABLE": from_table},
                        config.options(),
                    )
            for config in finish_candidates(16, dim, name):
                last = {"p_residual": "*fp32", "p_has_key": "*i8", "p_empty": f"*{dtype}", "p_y": f"*{dtype}"}
                constants = {"DEPTH": heads * dim, "F": 4 * dim, "SELECT": True, "GELU": True}
                yield Case(
                    f"finish {dtype} D={dim} {config.words()}",
                    finish_kernel,
                    {**finish_types(dtype), **last},
                    {**sizes, **constants, **config.constants},
                    config.options(),
                    tensor_core=dtype != "fp32",
                )
