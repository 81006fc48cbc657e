"""The rest of a block behind its attention, in CDDRec's encoder and decoder: weights as kernels read them, what is done
to a block of rows, and the kernel that does all of it.

Matrices stand transposed, [inputs, outputs], vectors in float32, both with zeros up to whole blocks: tiles of weights
are read without masks, and what lies beyond the model's own dims is 0 at every stage. A row's residual stream, norms
and sums stay in registers, in float32; the left side of a product, in the dtype of the weights, goes through memory,
so that a product is a loop over depth whose tiles are fetched ahead, and no thread holds a whole row of operands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.packing import block_of, pack_weight
from fastdiff.kernels.rows import activate, layer_norm
from fastdiff.kernels.tuning import Config, bucket, choose
from fastdiff.ops.padded_transformer import Layer, PaddedBlock

_SHARED = 72 << 10  # bytes for the tiles that are fetched ahead: what every GPU since sm_80 has, with room for the rest


def whole(n: int, unit: int) -> int:
    """n rounded up to whole units."""
    return -(-n // unit) * unit


def pack_vectors(extent: int, *vectors: Tensor) -> Tensor:
    """[n, extent] float32."""
    return torch.stack([F.pad(x.detach().to(torch.float32), (0, extent - x.shape[0])) for x in vectors])


@dataclass(frozen=True)
class Finish:
    """The rest of a layer after its attention: h = LN_1(x + out(gathered)), then LN_2(h + down(act(up(h)))).

    out [E, BLOCK_D], up [BLOCK_D, F], down [F, BLOCK_D]   in the weights' dtype; E and F whole tiles of depth
    rows   [6, BLOCK_D]  out's bias, LN_1's weight and bias, down's bias, LN_2's weight and bias       up_bias  [F]
    """

    out: Tensor
    up: Tensor
    down: Tensor
    rows: Tensor
    up_bias: Tensor
    depth: int
    dim: int

    @classmethod
    def of(cls, out: Layer, norm_1: Layer, up: Layer, down: Layer, norm_2: Layer) -> Finish:
        dim, depth = out[0].shape
        block_d, tile = block_of(dim), 64
        hidden = whole(up[0].shape[0], tile)
        return cls(
            pack_weight(out[0], whole(depth, tile), block_d),
            pack_weight(up[0], block_d, hidden),
            pack_weight(down[0], hidden, block_d),
            pack_vectors(block_d, out[1], *norm_1, down[1], *norm_2),
            pack_vectors(hidden, up[1])[0],
            depth,
            dim,
        )

    def constants(self) -> dict[str, int]:
        """What a kernel that finishes rows is compiled for."""
        return {"D": self.dim, "DEPTH": self.out.shape[0], "F": self.up.shape[1], "BLOCK_D": self.out.shape[1]}


def finish_candidates(rows: int, block_d: int, dtype: str) -> list[Config]:
    """Tiles for `Finish`: 16 rows to a program, so that few users spread over many of the GPU's cores; 32 where there
    are rows enough for all of them, which halves how often weights are read. In float32 products run without matrix
    units and keep their operands in registers, which larger tiles would spill."""
    half, wide = dtype != "float32", block_d > 128
    depth, units = (min(block_d, 32 if wide else 64), 32 if wide else 64) if half else (16, 16 if wide else 32)
    shapes: list[tuple[int, int, int | None]]
    # rows, warps, and the most registers: where ptxas spills by its own choice, a number that keeps it from that
    if not half:
        shapes = [(16, 8, 255 if wide else 128), (16, 4, 255)]
    elif wide:
        shapes = [(16, 8, 255)]
    else:
        shapes = [(16, 4, 255), (16, 8, 128), (32, 8, None)]
    if rows > 8192 and half:
        shapes.reverse()
    tiles = 2 * block_d * units * (2 if half else 4)  # bytes of a stage: a tile of up and one of down
    stages = 1 if tiles > _SHARED else 2 if wide or 2 * tiles > _SHARED else 3
    return [
        Config(
            {"BLOCK_R": block_r, "BLOCK_K": depth, "BLOCK_F": units},
            warps,
            stages,
            maxnreg=registers,
            shared=max(1, stages - 1) * tiles + 4 * block_r * block_d + 2048,
        )
        for block_r, warps, registers in shapes
    ]


def dtype_key(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- row by row -------------------------------------------------------------------------------------------------------


@triton.jit
def feed_forward(
    b_h,
    p_shared,
    p_up,
    p_up_bias,
    p_down,
    GELU: tl.constexpr,
    F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h + down(act(up(h))), without down's bias, of rows h [R, BLOCK_D] float32.

    p_shared  [R] pointers to room for BLOCK_D numbers of each row, of this program alone
    """
    o_dim = tl.arange(0, BLOCK_D)
    tl.debug_barrier()  # what was read from there before has been read by all threads
    tl.store(p_shared[:, None] + o_dim[None, :], b_h.to(p_shared.dtype.element_ty))
    tl.debug_barrier()
    b_sum = b_h
    for first in range(0, F, BLOCK_F):
        o_unit = first + tl.arange(0, BLOCK_F)
        b_up = tl.zeros([b_h.shape[0], BLOCK_F], tl.float32) + tl.load(p_up_bias + o_unit)[None, :]
        for first_in in tl.static_range(0, BLOCK_D, BLOCK_K):
            o_in = first_in + tl.arange(0, BLOCK_K)
            b_input = tl.load(p_shared[:, None] + o_in[None, :])
            b_weight = tl.load(p_up + o_in[:, None] * F + o_unit[None, :])
            b_up = tl.dot(b_input, b_weight, b_up, input_precision="ieee")
        b_weight = tl.load(p_down + o_unit[:, None] * BLOCK_D + o_dim[None, :])
        b_up = activate(b_up, "gelu" if GELU else "relu").to(p_down.dtype.element_ty)
        b_sum = tl.dot(b_up, b_weight, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def after_attention(
    p_gathered,
    gathered_stride,
    p_residual,
    residual_stride,
    p_out,
    p_rows,
    o_row,
    m_row,
    depth,
    eps,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """LN_1(residual + out(gathered)) [R, BLOCK_D] float32 of the rows o_row [R]; see `Finish`."""
    o_dim = tl.arange(0, BLOCK_D)
    m_dim = m_row[:, None] & (o_dim < D)[None, :]
    p_residual_rows = p_residual + o_row[:, None] * residual_stride + o_dim[None, :]
    b_sum = tl.load(p_residual_rows, mask=m_dim, other=0.0).to(tl.float32) + tl.load(p_rows + o_dim)[None, :]
    for first in range(0, DEPTH, BLOCK_K):
        o_in = first + tl.arange(0, BLOCK_K)
        m_in = m_row[:, None] & (o_in < depth)[None, :]
        b_gathered = tl.load(p_gathered + o_row[:, None] * gathered_stride + o_in[None, :], mask=m_in, other=0.0)
        b_weight = tl.load(p_out + o_in[:, None] * BLOCK_D + o_dim[None, :])
        b_sum = tl.dot(b_gathered, b_weight, b_sum, input_precision="ieee")
    return layer_norm(b_sum, p_rows + BLOCK_D, p_rows + 2 * BLOCK_D, eps, D, BLOCK_D)


# --- all of it --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def finish_kernel(
    p_gathered,
    p_residual,
    p_out,
    p_rows,
    p_up,
    p_up_bias,
    p_down,
    p_shared,
    p_has_key,
    p_empty,
    p_y,
    depth,
    n_rows,
    eps,
    SELECT: tl.constexpr,
    GELU: tl.constexpr,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """A block's output y [n_rows, D] from the residual stream and what its heads gathered; where SELECT, `empty` for
    the users without a key."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < n_rows
    o_dim = tl.arange(0, BLOCK_D)
    b_h = after_attention(
        p_gathered, depth, p_residual, D, p_out, p_rows, o_row, m_row, depth, eps, D, DEPTH, BLOCK_D, BLOCK_K
    )
    b_y = feed_forward(b_h, p_shared + o_row * BLOCK_D, p_up, p_up_bias, p_down, GELU, F, BLOCK_D, BLOCK_F, BLOCK_K)
    b_y += tl.load(p_rows + 3 * BLOCK_D + o_dim)[None, :]
    b_y = layer_norm(b_y, p_rows + 4 * BLOCK_D, p_rows + 5 * BLOCK_D, eps, D, BLOCK_D)
    if SELECT:
        b_has_key = tl.load(p_has_key + o_row, mask=m_row, other=0)
        b_empty = tl.load(p_empty + o_dim, mask=o_dim < D, other=0.0).to(tl.float32)
        b_y = tl.where((b_has_key != 0)[:, None], b_y, b_empty[None, :])
    mask = m_row[:, None] & (o_dim < D)[None, :]
    tl.store(p_y + o_row[:, None] * D + o_dim[None, :], b_y.to(p_y.dtype.element_ty), mask=mask)


def finish_rows(
    block: PaddedBlock,
    finish: Finish,
    gathered: Tensor,
    residual: Tensor,
    y: Tensor,
    has_key: Tensor | None = None,
    empty: Tensor | None = None,
) -> None:
    """Fill y [R, D]; where there is `has_key` [R], with `empty` where that is 0."""
    rows, block_d = y.shape[0], finish.out.shape[1]
    key = (bucket(rows, least=16), block_d, dtype_key(gathered.dtype))
    config = choose("finish", key, finish_candidates, y.device)
    programs = triton.cdiv(rows, config.constants["BLOCK_R"])
    shared = gathered.new_empty(programs * config.constants["BLOCK_R"], block_d)
    finish_kernel[(programs,)](
        gathered,
        residual,
        finish.out,
        finish.rows,
        finish.up,
        finish.up_bias,
        finish.down,
        shared,
        finish.rows if has_key is None else has_key,
        finish.rows if empty is None else empty,
        y,
        finish.depth,
        rows,
        block.eps,
        SELECT=has_key is not None,
        GELU=block.activation == "gelu",
        **finish.constants(),
        **config.launch(),
    )


def finish_types(dtype: str) -> dict[str, Any]:
    """Signature of what the kernels that use `Finish` have in common."""
    pointers = dict.fromkeys(("p_gathered", "p_out", "p_up", "p_down", "p_shared"), f"*{dtype}")
    return {**pointers, "p_rows": "*fp32", "p_up_bias": "*fp32", "depth": "i32", "n_rows": "i32", "eps": "fp32"}
