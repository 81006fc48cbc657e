"""encode_last_item in Triton: four kernels over rows, and the library's products between them.

    query    q = LN1(e_last)                           some users to a program
             qk(q)                                     product
    attend   sum_j softmax_j(qk(q) . e_j) e_j          one user to a program
             W_v (..) + b_v                            product
    residual z = LN2(q + attention)                    some users to a program
             W_2 relu(W_1 z + b_1) + b_2               products
    finish   h = LN3(LN_ff(.. + z) 1[s_last is item])  some users to a program
             head(h)                                   product

One kernel for all of it would hold the rows of 16 users in registers from product to product, and spills from D = 128;
it would save launches alone, which a CUDA graph saves as well: each D x D weight is read once either way. A history is
read once, some places at a time, with a running softmax: what a place adds needs its logit alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.packing import join, pack_vector
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.rows import layer_norm_rows
from fastdiff.kernels.runtime import next_power_of_2, require, rows_together
from fastdiff.kernels.tuning import Config, Problem, bucket, choose
from fastdiff.ops.encode_last_item import LastItemBlock
from fastdiff.per_object import packed

_ROWS = 1024  # numbers of rows that a program norms
_PLACES = 2048  # numbers of a history that a program reads at once


@triton.jit(do_not_specialize=["items_stride", "n_users", "pad_id"])
def _query_kernel(
    p_items,
    p_lengths,
    p_table,
    p_positions,
    p_norms,
    p_query,
    p_query_in,
    items_stride,
    table_stride,
    n_users,
    pad_id,
    eps,
    DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_user = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_dim = tl.arange(0, BLOCK_D)
    m_user, m_dim = o_user < n_users, (o_dim < DIM)[None, :]
    b_last, b_item = _last_items(p_items, p_lengths, o_user, m_user, items_stride, pad_id)
    m_e = (b_item != pad_id)[:, None] & m_dim
    b_e = tl.load(p_table + b_item[:, None] * table_stride + o_dim[None, :], mask=m_e, other=0.0).to(tl.float32)
    b_e += tl.load(p_positions + b_last[:, None] * DIM + o_dim[None, :], mask=m_e, other=0.0).to(tl.float32)
    b_query = layer_norm_rows(b_e, p_norms, eps, DIM)
    _store_twice(b_query, p_query, p_query_in, o_user[:, None] * DIM + o_dim[None, :], m_user[:, None] & m_dim)


@triton.jit(do_not_specialize=["items_stride", "pad_id"])
def _attend_kernel(
    p_items,
    p_lengths,
    p_table,
    p_positions,
    p_key,
    p_mixed,
    items_stride,
    table_stride,
    pad_id,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_user = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, BLOCK_D)
    m_dim = o_dim < DIM
    length = tl.load(p_lengths + i_user)
    b_key = tl.load(p_key + i_user * DIM + o_dim, mask=m_dim, other=0.0).to(tl.float32)

    top, total = -1e38, 0.0  # of the logits so far, and of their exponentials
    b_mixed = tl.zeros([BLOCK_D], tl.float32)
    b_whole = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_J):
        o_place = first + tl.arange(0, BLOCK_J)
        b_items = tl.load(p_items + i_user * items_stride + o_place, mask=o_place < length, other=pad_id)
        m_item = b_items != pad_id
        m_e = m_item[:, None] & m_dim[None, :]
        b_e = tl.load(p_table + b_items[:, None] * table_stride + o_dim[None, :], mask=m_e, other=0.0).to(tl.float32)
        b_e += tl.load(p_positions + o_place[:, None] * DIM + o_dim[None, :], mask=m_e, other=0.0).to(tl.float32)
        m_seen = m_item & _has_features(b_e, p_table.dtype.element_ty)
        b_logits = tl.where(m_seen, tl.sum(b_e * b_key[None, :], axis=1), -1e38)
        new_top = tl.maximum(top, tl.max(b_logits, axis=0))
        b_share = tl.exp(tl.where(m_seen, b_logits - new_top, -1e38))
        scale = tl.exp(top - new_top)
        total = total * scale + tl.sum(b_share, axis=0)
        b_mixed = b_mixed * scale + tl.sum(b_share[:, None] * b_e, axis=0)
        b_whole += tl.sum(b_e, axis=0)
        top = new_top
    b_mixed = tl.where(total > 0.0, b_mixed / tl.where(total > 0.0, total, 1.0), b_whole / WINDOW)
    tl.store(p_mixed + i_user * DIM + o_dim, b_mixed.to(p_mixed.dtype.element_ty), mask=m_dim)


@triton.jit(do_not_specialize=["n_users"])
def _residual_kernel(
    p_query,
    p_attention,
    p_norms,
    p_z,
    p_z_in,
    n_users,
    eps,
    DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_user = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_dim = tl.arange(0, BLOCK_D)
    o_row = o_user[:, None] * DIM + o_dim[None, :]
    m_row = (o_user < n_users)[:, None] & (o_dim < DIM)[None, :]
    b_query = tl.load(p_query + o_row, mask=m_row, other=0.0)
    b_attention = tl.load(p_attention + o_row, mask=m_row, other=0.0).to(tl.float32)
    m_query = _has_features(b_query, p_z_in.dtype.element_ty)[:, None]
    b_z = layer_norm_rows(b_query + tl.where(m_query, b_attention, 0.0), p_norms + 2 * BLOCK_D, eps, DIM)
    _store_twice(b_z, p_z, p_z_in, o_row, m_row)


@triton.jit(do_not_specialize=["items_stride", "n_users", "pad_id"])
def _finish_kernel(
    p_items,
    p_lengths,
    p_z,
    p_update,
    p_norms,
    p_h,
    items_stride,
    n_users,
    pad_id,
    eps,
    DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_user = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_dim = tl.arange(0, BLOCK_D)
    m_user = o_user < n_users
    o_row = o_user[:, None] * DIM + o_dim[None, :]
    m_row = m_user[:, None] & (o_dim < DIM)[None, :]
    b_item = _last_items(p_items, p_lengths, o_user, m_user, items_stride, pad_id)[1]
    b_h = tl.load(p_z + o_row, mask=m_row, other=0.0) + tl.load(p_update + o_row, mask=m_row, other=0.0).to(tl.float32)
    b_h = tl.where((b_item != pad_id)[:, None], layer_norm_rows(b_h, p_norms + 4 * BLOCK_D, eps, DIM), 0.0)
    b_h = layer_norm_rows(b_h, p_norms + 6 * BLOCK_D, eps, DIM)
    tl.store(p_h + o_row, b_h.to(p_h.dtype.element_ty), mask=m_row)


@triton.jit
def _last_items(p_items, p_lengths, o_user, m_user, items_stride, pad_id):
    """The last place of each user's history, 0 of an empty one, and the item there, a pad of an empty one."""
    b_length = tl.load(p_lengths + o_user, mask=m_user, other=0)
    b_last = tl.maximum(b_length - 1, 0)
    return b_last, tl.load(p_items + o_user * items_stride + b_last, mask=b_length > 0, other=pad_id)


@triton.jit
def _store_twice(b_x, p_x, p_x_in, o_x, m_x):
    """x in float32 for the residual, and in the model's dtype for the product; in float32 they are one tensor."""
    tl.store(p_x + o_x, b_x, mask=m_x)
    if p_x_in.dtype.element_ty != tl.float32:
        tl.store(p_x_in + o_x, b_x.to(p_x_in.dtype.element_ty), mask=m_x)


@triton.jit
def _has_features(b_x, DTYPE: tl.constexpr):
    """False where the features of a row sum to exactly 0: for float32 in float64, which finds every sum that is 0 in
    exact arithmetic whatever the order; in half precision only rows of zeros count."""
    if DTYPE.primitive_bitwidth == 32:
        return tl.sum(b_x.to(tl.float64), axis=1) != 0.0
    else:
        return tl.max(tl.abs(b_x), axis=1) > 0.0


@dataclass(frozen=True)
class _Packed:
    """positions [L, D] contiguous; the norms' weights and biases, each padded to the block, in the order of their use;
    (weight, bias) of the products, the head None where there is none."""

    positions: Tensor
    norms: Tensor
    qk: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    head: tuple[Tensor, Tensor] | None


def encode_last_item(items: Tensor, lengths: Tensor, item_table: Tensor, block: LastItemBlock) -> Tensor:
    """See `fastdiff.ops.encode_last_item.encode_last_item_ref`; items and lengths are taken for valid: they are on the
    device. A sum of features counts as 0 where it is 0 in float64 (float32), or all features are (half precision).
    The products are torch's, which makes them in TF32 only where `torch.backends.cuda.matmul` says so."""
    weights = packed(block, _pack)
    n_users, (window, dim), dtype = items.shape[0], weights.positions.shape, weights.positions.dtype
    require("encode_last_item", "item_table", item_table, (item_table.shape[0], dim), dtype)
    require("encode_last_item", "items", items, (n_users, items.shape[1]), torch.int64)
    require("encode_last_item", "lengths", lengths, (n_users,), torch.int64)
    if n_users == 0:
        outputs = dim if weights.head is None else weights.head[1].shape[0]
        return torch.empty(0, outputs, dtype=dtype, device=item_table.device)
    items, lengths, item_table = rows_together(items), lengths.contiguous(), rows_together(item_table)
    history, strides = (items, lengths, item_table, weights.positions), (items.stride(0), item_table.stride(0))
    constants, options = _choose_rows(dim)
    programs = (triton.cdiv(n_users, constants["BLOCK_B"]),)

    query, query_in = _two_rows(n_users, item_table)
    _query_kernel[programs](
        *history, weights.norms, query, query_in, *strides, n_users, block.pad_id, block.eps, **constants, **options
    )
    mixed = torch.empty_like(query_in)
    key = (bucket(items.shape[1]), next_power_of_2(dim))
    attend = choose("encode_last_item", key, _attend_candidates, items.device)
    _attend_kernel[(n_users,)](
        *history,
        F.linear(query_in, *weights.qk),
        mixed,
        *strides,
        block.pad_id,
        DIM=dim,
        WINDOW=window,
        BLOCK_D=next_power_of_2(dim),
        **attend.launch(),
    )
    attention = F.linear(mixed, *weights.value)
    z, z_in = _two_rows(n_users, item_table)
    _residual_kernel[programs](query, attention, weights.norms, z, z_in, n_users, block.eps, **constants, **options)
    update = F.linear(F.linear(z_in, *weights.up).relu_(), *weights.down)
    h = torch.empty_like(z_in)
    _finish_kernel[programs](
        items,
        lengths,
        z,
        update,
        weights.norms,
        h,
        items.stride(0),
        n_users,
        block.pad_id,
        block.eps,
        **constants,
        **options,
    )
    return h if weights.head is None else F.linear(h, *weights.head)


def _two_rows(n_users: int, item_table: Tensor) -> tuple[Tensor, Tensor]:
    """Room for a residual [B, D] in float32, and for it in the model's dtype, which may be the same room."""
    residual = torch.empty(n_users, item_table.shape[1], dtype=torch.float32, device=item_table.device)
    if item_table.dtype == torch.float32:
        return residual, residual
    return residual, torch.empty(residual.shape, dtype=item_table.dtype, device=item_table.device)


def _pack(encoder: LastItemBlock) -> _Packed:
    block_d = next_power_of_2(encoder.positions.shape[1])
    norms = (encoder.norm_1, encoder.norm_2, encoder.norm_ff, encoder.norm_3)

    def layer(weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return weights[0].detach(), weights[1].detach()

    return _Packed(
        encoder.positions.detach().contiguous(),
        join(*(pack_vector(values, block_d) for norm in norms for values in norm)),
        layer(encoder.qk),
        layer(encoder.value),
        layer(encoder.up),
        layer(encoder.down),
        None if encoder.head is None else layer(encoder.head),
    )


def _choose_rows(dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """The constants of the kernels that norm rows, and the options of their launches."""
    block_d = next_power_of_2(dim)
    return {"DIM": dim, "BLOCK_B": max(1, _ROWS // block_d), "BLOCK_D": block_d}, {"num_warps": 4}


def _attend_candidates(places: int, block_d: int) -> list[Config]:
    found = {}
    for numbers, warps in ((_PLACES, 4), (_PLACES // 2, 2), (_PLACES // 2, 4), (_PLACES // 4, 1)):
        block_j = min(places, max(1, numbers // block_d))
        # without a word on registers, ptxas spills at 72 of them to fit more programs beside each other
        found[block_j, warps] = Config({"BLOCK_J": block_j}, warps, maxnreg=128)
    return list(found.values())


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times: attention of DreamRec's windows and of longer ones, whole op."""
    for dtype in (torch.float32, torch.float16):
        for places, dim, users in ((16, 64, 32), (64, 64, 4096), (64, 128, 4096)):
            matrix, vector = torch.randn(dim, dim, device=device).to(dtype) / dim**0.5, torch.ones(dim, device=device)
            pair = (matrix, vector.to(dtype))
            norm = (vector.to(dtype), vector.to(dtype))
            table = torch.randn(1000, dim, device=device).to(dtype)
            block = LastItemBlock(table[:places].clone(), pair, pair, pair, pair, norm, norm, norm, norm, 0)
            items = torch.randint(1, 1000, (users, places), device=device)
            lengths = torch.full((users,), places, device=device)
            run = partial(encode_last_item, items, lengths, table, block)
            yield Problem("encode_last_item", (places, dim), _attend_candidates(places, dim), run)


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    floating = ("p_table", "p_positions", "p_norms", "p_query_in", "p_key", "p_mixed", "p_attention", "p_z_in")
    sizes = ("items_stride", "table_stride", "n_users", "pad_id")
    for dtype, dim, n_places in (("fp32", 64, 10), ("fp32", 256, 200), ("fp16", 128, 50)):
        types = (
            dict.fromkeys(("p_items", "p_lengths"), "*i64")
            | dict.fromkeys((*floating, "p_update", "p_h"), f"*{dtype}")
            | dict.fromkeys(("p_query", "p_z"), "*fp32")
            | dict.fromkeys(sizes, "i32")
            | {"eps": "fp32"}
        )
        rows, options = _choose_rows(dim)
        for kernel in (_query_kernel, _residual_kernel, _finish_kernel):
            yield Case(
                f"{kernel.__name__[1:].removesuffix('_kernel')} {dtype} n={n_places} D={dim}",
                kernel,
                {name: types[name] for name in kernel.arg_names if name in types},
                rows,
                options,
            )
        for config in _attend_candidates(next_power_of_2(n_places), next_power_of_2(dim)):
            yield Case(
                f"attend {dtype} n={n_places} D={dim} {config.words()}",
                _attend_kernel,
                {name: types[name] for name in _attend_kernel.arg_names if name in types},
                {"DIM": dim, "WINDOW": n_places, "BLOCK_D": next_power_of_2(dim), **config.constants},
                config.options(),
            )
