"""encode_last_item in Triton: one program takes 16 users (the rows of a matrix instruction) from ids to h, or its head.

Their histories are read once, some places at a time, with a running softmax: what a place adds needs its logit alone.
The rows of all users stay in registers between the five products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.packing import block, join, pack_vector, pack_weight
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.rows import activate, layer_norm_rows, linear_rows_through
from fastdiff.kernels.runtime import require, rows_together
from fastdiff.ops.encode_last_item import LastItemBlock
from fastdiff.per_object import packed

_BLOCK_B = 16
_BLOCK_N = 64  # outputs of the head made at once


@triton.jit
def _encode_last_item_kernel(
    p_items,
    p_lengths,
    p_table,
    p_positions,
    p_weights,
    p_scratch,
    p_out,
    items_stride,
    table_stride,
    n_users,
    n_places,
    n_in,
    pad_id,
    eps,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    OUTPUTS: tl.constexpr,  # of the head; 0 without one
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    LAYER: tl.constexpr = BLOCK_D * BLOCK_D + BLOCK_D
    p_norms = p_weights + 4 * LAYER
    p_scratch += tl.program_id(0).to(tl.int64) * BLOCK_B * BLOCK_D
    o_user = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_dim = tl.arange(0, BLOCK_D)
    m_user, m_dim = o_user < n_users, o_dim < DIM
    b_length = tl.load(p_lengths + o_user, mask=m_user, other=0)

    b_last = tl.maximum(b_length - 1, 0)
    b_item = tl.load(p_items + o_user * items_stride + b_last, mask=b_length > 0, other=pad_id)
    b_inside = b_item != pad_id
    m_last = b_inside[:, None] & m_dim[None, :]
    b_e = tl.load(p_table + b_item[:, None] * table_stride + o_dim[None, :], mask=m_last, other=0.0).to(tl.float32)
    b_e += tl.load(p_positions + b_last[:, None] * DIM + o_dim[None, :], mask=m_last, other=0.0).to(tl.float32)
    b_query = layer_norm_rows(b_e, p_norms, eps, DIM)
    b_key = linear_rows_through(b_query, p_scratch, p_weights, n_in, BLOCK_D, BLOCK_D, BLOCK_K, BLOCK_D * BLOCK_D)

    b_top = tl.full([BLOCK_B], -1e38, tl.float32)  # of the logits so far
    b_sum = tl.zeros([BLOCK_B], tl.float32)
    b_mixed = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    b_whole = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for first in range(0, n_places, BLOCK_J):
        o_place = first + tl.arange(0, BLOCK_J)
        m_place = o_place[None, :] < b_length[:, None]
        b_items = tl.load(p_items + o_user[:, None] * items_stride + o_place[None, :], mask=m_place, other=pad_id)
        m_item = b_items != pad_id
        m_e = m_item[:, :, None] & m_dim[None, None, :]
        p_rows = p_table + b_items[:, :, None] * table_stride + o_dim[None, None, :]
        b_rows = tl.load(p_rows, mask=m_e, other=0.0).to(tl.float32)
        p_places = p_positions + o_place[None, :, None] * DIM + o_dim[None, None, :]
        b_rows += tl.load(p_places, mask=m_e, other=0.0).to(tl.float32)
        m_seen = m_item & _has_features(b_rows, p_table.dtype.element_ty, 2)
        b_logits = tl.sum(b_rows * b_key[:, None, :], axis=2)
        b_new_top = tl.maximum(b_top, tl.max(tl.where(m_seen, b_logits, -1e38), axis=1))
        b_share = tl.exp(tl.where(m_seen, b_logits - b_new_top[:, None], -1e38))
        b_scale = tl.exp(b_top - b_new_top)
        b_sum = b_sum * b_scale + tl.sum(b_share, axis=1)
        b_mixed = b_mixed * b_scale[:, None] + tl.sum(b_share[:, :, None] * b_rows, axis=1)
        b_whole += tl.sum(b_rows, axis=1)
        b_top = b_new_top
    m_any = b_sum > 0.0
    b_mixed = tl.where(m_any[:, None], b_mixed / tl.where(m_any, b_sum, 1.0)[:, None], b_whole / WINDOW)

    b_attention = linear_rows_through(
        b_mixed, p_scratch, p_weights + LAYER, n_in, BLOCK_D, BLOCK_D, BLOCK_K, BLOCK_D * BLOCK_D
    )
    m_query = _has_features(b_query, p_table.dtype.element_ty, 1)
    b_z = layer_norm_rows(b_query + tl.where(m_query[:, None], b_attention, 0.0), p_norms + 2 * BLOCK_D, eps, DIM)
    b_hidden = activate(
        linear_rows_through(b_z, p_scratch, p_weights + 2 * LAYER, n_in, BLOCK_D, BLOCK_D, BLOCK_K, BLOCK_D * BLOCK_D),
        "relu",
    )
    b_h = layer_norm_rows(
        linear_rows_through(
            b_hidden, p_scratch, p_weights + 3 * LAYER, n_in, BLOCK_D, BLOCK_D, BLOCK_K, BLOCK_D * BLOCK_D
        )
        + b_z,
        p_norms + 4 * BLOCK_D,
        eps,
        DIM,
    )
    b_h = layer_norm_rows(tl.where(b_inside[:, None], b_h, 0.0), p_norms + 6 * BLOCK_D, eps, DIM)

    if OUTPUTS == 0:
        p_rows_out = p_out + o_user[:, None] * DIM + o_dim[None, :]
        tl.store(p_rows_out, b_h.to(p_out.dtype.element_ty), mask=m_user[:, None] & m_dim[None, :])
    else:
        PADDED: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        p_head = p_norms + 8 * BLOCK_D
        for first in range(0, PADDED, BLOCK_N):
            o_out = first + tl.arange(0, BLOCK_N)
            b_y = linear_rows_through(b_h, p_scratch, p_head + first, n_in, BLOCK_N, PADDED, BLOCK_K, BLOCK_D * PADDED)
            p_rows_out = p_out + o_user[:, None] * OUTPUTS + o_out[None, :]
            tl.store(p_rows_out, b_y.to(p_out.dtype.element_ty), mask=m_user[:, None] & (o_out < OUTPUTS)[None, :])


@triton.jit
def _has_features(b_x, DTYPE: tl.constexpr, AXIS: tl.constexpr):
    """False where features sum to exactly 0: for float32 in float64, which finds every sum that is 0 in exact
    arithmetic whatever the order; in half precision only rows of zeros count."""
    if DTYPE.primitive_bitwidth == 32:
        return tl.sum(b_x.to(tl.float64), axis=AXIS) != 0.0
    else:
        return tl.max(tl.abs(b_x), axis=AXIS) > 0.0


def encode_last_item(items: Tensor, lengths: Tensor, item_table: Tensor, block: LastItemBlock) -> Tensor:
    """See `fastdiff.ops.encode_last_item.encode_last_item_ref`; items and lengths are taken for valid: they are on the
    device. A sum of features counts as 0 where it is 0 in float64 (float32), or all features are (half precision)."""
    weights, positions = packed(block, _pack)
    n_users, dim = items.shape[0], item_table.shape[1]
    require("encode_last_item", "item_table", item_table, (item_table.shape[0], positions.shape[1]), positions.dtype)
    require("encode_last_item", "items", items, (n_users, items.shape[1]), torch.int64)
    require("encode_last_item", "lengths", lengths, (n_users,), torch.int64)
    outputs = 0 if block.head is None else block.head[1].shape[0]
    h = torch.empty(n_users, outputs or dim, dtype=item_table.dtype, device=item_table.device)
    if n_users == 0:
        return h
    items, item_table = rows_together(items), rows_together(item_table)
    constants, options = _choose(dim, item_table.element_size())
    programs = triton.cdiv(n_users, _BLOCK_B)
    scratch = torch.empty(programs, _BLOCK_B, constants["BLOCK_D"], dtype=torch.float32, device=h.device)
    _encode_last_item_kernel[(programs,)](
        items,
        lengths.contiguous(),
        item_table,
        positions,
        weights,
        scratch,
        h,
        items.stride(0),
        item_table.stride(0),
        n_users,
        items.shape[1],
        constants["BLOCK_D"],
        block.pad_id,
        block.eps,
        WINDOW=positions.shape[0],
        OUTPUTS=outputs,
        **constants,
        **options,
    )
    return h


def _pack(encoder: LastItemBlock) -> tuple[Tensor, Tensor]:
    """The four layers, the four norms and the head in one buffer; the positions."""
    n = block(encoder.positions.shape[1])
    layers = [encoder.qk, encoder.value, encoder.up, encoder.down]
    norms = [encoder.norm_1, encoder.norm_2, encoder.norm_ff, encoder.norm_3]
    parts = [part for weight, bias in layers for part in (pack_weight(weight, n, n), pack_vector(bias, n))]
    parts += [pack_vector(values, n) for norm in norms for values in norm]
    if encoder.head is not None:
        weight, bias = encoder.head
        outputs = triton.cdiv(bias.shape[0], _BLOCK_N) * _BLOCK_N
        parts += [pack_weight(weight, n, outputs), pack_vector(bias, outputs)]
    return join(*parts), encoder.positions.detach().contiguous()


def _choose(dim: int, itemsize: int) -> tuple[dict[str, Any], dict[str, int]]:
    block_d = block(dim)
    constants = {
        "DIM": dim,
        "BLOCK_K": min(block_d, 64 if itemsize == 2 else 32 if block_d < 256 else 16),
        "BLOCK_B": _BLOCK_B,
        "BLOCK_J": max(1, 256 // block_d),
        "BLOCK_D": block_d,
        "BLOCK_N": _BLOCK_N,
    }
    return constants, {"num_warps": 8, "num_stages": 1}


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    for dtype in ("fp32", "fp16", "bf16"):
        itemsize = 4 if dtype == "fp32" else 2
        for dim, outputs in ((64, 0), (64, 64), (64, 128), (128, 0), (128, 128), (128, 256), (256, 512)):
            constants, options = _choose(dim, itemsize)
            yield Case(
                f"{dtype} D={dim} head={outputs}",
                _encode_last_item_kernel,
                dict.fromkeys(("p_items", "p_lengths"), "*i64")
                | dict.fromkeys(("p_table", "p_positions", "p_weights", "p_out"), f"*{dtype}")
                | {"p_scratch": "*fp32"}
                | dict.fromkeys(("items_stride", "table_stride", "n_users", "n_places", "n_in", "pad_id"), "i32")
                | {"eps": "fp32"},
                {"WINDOW": 10, "OUTPUTS": outputs} | constants,
                options,
                tensor_core=itemsize == 2,
            )
