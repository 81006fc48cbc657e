"""Post-norm transformer blocks inside kernels: weights as kernels read them, and the parts that act row by row.

A block's matrices stand transposed, [inputs, outputs], one after another in one buffer, so that a tile is read in whole
lines and every offset is known when a kernel is compiled:

    queries [D, E]   keys [D, E]   values [D, E]   out [E, D]   up [D, F]   down [F, D]

Its vectors stand in another, in float32: three biases [E]; out_bias, norm_1 (weight, bias), down_bias, norm_2 (weight,
bias) [D]; up_bias [F]. D, E and F are here extents of tiles, with zeros where the model has no numbers: D holds the
hidden size, F the hidden units, E all heads side by side, head h from h BLOCK_DH on. So weights are read without masks,
and what is beyond the model's own dims is 0 at every stage.

The residual stream, norms and sums stay in registers, in float32. The left side of a matrix product, in the dtype of
the weights, goes through memory that only its own program touches and that stays in its L1: so a product is a loop over
depth whose tiles, of both sides, are fetched ahead, and no thread holds a whole row of operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.packing import block_of, blocks_of_64
from fastdiff.kernels.rows import layer_norm
from fastdiff.kernels.runtime import next_power_of_2
from fastdiff.ops.causal_transformer import BlockWeights
from fastdiff.per_object import packed
from fastdiff.staging import finish

# --- sizes and weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of a block's model, and the extents that hold them: see the module's docstring."""

    dim: int
    n_heads: int
    hidden: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def block_d(self) -> int:
        return block_of(self.dim)

    @property
    def block_h(self) -> int:
        return next_power_of_2(self.n_heads)

    @property
    def block_dh(self) -> int:
        return block_of(self.head_dim)

    @property
    def block_e(self) -> int:
        return self.block_h * self.block_dh

    @property
    def padded_hidden(self) -> int:
        return blocks_of_64(self.hidden)

    def constants(self) -> dict[str, int]:
        """What every kernel that acts on rows is compiled for."""
        return {
            "D": self.dim,
            "H": self.n_heads,
            "DH": self.head_dim,
            "F": self.padded_hidden,
            "BLOCK_D": self.block_d,
            "BLOCK_H": self.block_h,
            "BLOCK_DH": self.block_dh,
        }

    def of_heads(self) -> dict[str, int]:
        """What a kernel that attends is compiled for."""
        return {name: size for name, size in self.constants().items() if name not in ("F", "BLOCK_D")}

    @classmethod
    def of(cls, block: BlockWeights) -> BlockSizes:
        return cls(block.out_bias.shape[0], block.n_heads, block.up_bias.shape[0])


@dataclass(frozen=True)
class PackedBlocks:
    """matrices [n_blocks, ..] in the weights' dtype, vectors [n_blocks, ..] float32, and their sizes."""

    matrices: Tensor
    vectors: Tensor
    sizes: BlockSizes
    eps: float

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        return self.matrices[i], self.vectors[i]


def pack_block(block: BlockWeights) -> tuple[Tensor, Tensor]:
    """The two buffers of one block."""
    sizes = BlockSizes.of(block)
    dim, hidden = (0, sizes.block_d - sizes.dim), (0, sizes.padded_hidden - sizes.hidden)

    def in_heads(x: Tensor) -> Tensor:
        """[.., D] -> [.., E]"""
        by_head = x.reshape(*x.shape[:-1], sizes.n_heads, sizes.head_dim)
        extra = (0, sizes.block_dh - sizes.head_dim, 0, sizes.block_h - sizes.n_heads)
        return F.pad(by_head, extra).flatten(-2)

    matrices = [
        *(in_heads(F.pad(part.T, (0, 0, *dim))) for part in block.qkv_weight.detach().chunk(3)),
        F.pad(in_heads(block.out_weight.detach()), (0, 0, *dim)).T,
        F.pad(block.up_weight.detach(), (*dim, *hidden)).T,
        F.pad(block.down_weight.detach(), (*hidden, *dim)).T,
    ]
    vectors = [
        *map(in_heads, block.qkv_bias.detach().chunk(3)),
        *(F.pad(x.detach(), dim) for x in (block.out_bias, *block.norm_1, block.down_bias, *block.norm_2)),
        F.pad(block.up_bias.detach(), hidden),
    ]
    return torch.cat([x.flatten() for x in matrices]), torch.cat(vectors).to(torch.float32)


def packed_blocks(blocks: Sequence[BlockWeights]) -> PackedBlocks:
    """The buffers of all blocks, made once; all have the sizes of the first."""
    stacks = packed(blocks[0], _no_stacks)
    others = tuple(blocks[1:])
    key = tuple(map(id, others))
    if key not in stacks:
        pairs = [pack_block(block) for block in blocks]
        stack = PackedBlocks(
            torch.stack([matrices for matrices, _ in pairs]),
            torch.stack([vectors for _, vectors in pairs]),
            BlockSizes.of(blocks[0]),
            blocks[0].eps,
        )
        finish(stack.matrices.device)
        stacks.setdefault(key, (others, stack))  # the others are kept, so that their ids stay theirs
    return stacks[key][1]


def _no_stacks(first: BlockWeights) -> dict[tuple[int, ...], tuple[tuple[BlockWeights, ...], PackedBlocks]]:
    return {}


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CASES = (
    *((name, BlockSizes(128, 4, 512)) for name in DTYPES),
    *((name, BlockSizes(64, 2, 256)) for name in ("fp32", "fp16")),  # bfloat16 has the configurations of float16
    ("fp16", BlockSizes(256, 4, 1024)),
)
"""Dtypes and sizes that `python -m fastdiff.kernels.precompile` compiles kernels for."""


# --- row by row -------------------------------------------------------------------------------------------------------


@triton.jit
def share(p_rows, b_x):
    """Put rows [R, K] where p_rows [R] points, for all threads of the program to read."""
    tl.store(p_rows[:, None] + tl.arange(0, b_x.shape[1])[None, :], b_x.to(p_rows.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def times(b_sum, p_rows, p_weight, o_out, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """b_sum + x W: the rows x [DEPTH] stand at p_rows [R], W is [DEPTH, WIDTH], of which columns o_out are meant."""
    for first in range(0, DEPTH, BLOCK_K):
        o_in = first + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_rows[:, None] + o_in[None, :])
        b_weight = tl.load(p_weight + o_in[:, None] * WIDTH + o_out[None, :])
        b_sum = tl.dot(b_x, b_weight, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def project(
    p_rows,
    p_matrices,
    p_vectors,
    QUERIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Queries, keys and values [R, BLOCK_E] float32 of the rows at p_rows; without QUERIES those are zeros."""
    o_out = tl.arange(0, BLOCK_E)
    p_keys, p_values = p_matrices + BLOCK_D * BLOCK_E, p_matrices + 2 * BLOCK_D * BLOCK_E
    b_query = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    b_key = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    b_value = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for first in range(0, BLOCK_D, BLOCK_K):
        o_in = first + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_rows[:, None] + o_in[None, :])
        o_tile = o_in[:, None] * BLOCK_E + o_out[None, :]
        if QUERIES:
            b_query = tl.dot(b_x, tl.load(p_matrices + o_tile), b_query, input_precision="ieee")
        b_key = tl.dot(b_x, tl.load(p_keys + o_tile), b_key, input_precision="ieee")
        b_value = tl.dot(b_x, tl.load(p_values + o_tile), b_value, input_precision="ieee")
    if QUERIES:
        b_query += tl.load(p_vectors + o_out)[None, :]
    b_key += tl.load(p_vectors + BLOCK_E + o_out)[None, :]
    b_value += tl.load(p_vectors + 2 * BLOCK_E + o_out)[None, :]
    return b_query, b_key, b_value


@triton.jit
def gelu_tanh(b_x):
    """x / 2 (1 + tanh(z)) = x / (1 + exp(-2 z)) with z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return b_x / (1.0 + tl.exp(-1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x)))


@triton.jit
def finish_block(
    b_x,
    p_attended,
    p_shared,
    p_matrices,
    p_vectors,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block's output [R, BLOCK_D] float32 from its input b_x and what its heads gathered, which stands at p_attended.

    p_shared  [R] where there is room for BLOCK_D numbers of each row
    """
    p_out = p_matrices + 3 * BLOCK_D * BLOCK_E
    p_up = p_out + BLOCK_E * BLOCK_D
    p_down = p_up + BLOCK_D * F
    p_row = p_vectors + 3 * BLOCK_E
    o_dim = tl.arange(0, BLOCK_D)
    b_h = times(b_x, p_attended, p_out, o_dim, BLOCK_E, BLOCK_D, BLOCK_K) + tl.load(p_row + o_dim)[None, :]
    b_h = layer_norm(b_h, p_row + BLOCK_D, p_row + 2 * BLOCK_D, eps, D, BLOCK_D)
    share(p_shared, b_h)
    b_h += tl.load(p_row + 3 * BLOCK_D + o_dim)[None, :]
    for first in range(0, F, BLOCK_F):
        o_unit = first + tl.arange(0, BLOCK_F)
        b_up = tl.zeros([b_x.shape[0], BLOCK_F], tl.float32)
        for first_in in tl.static_range(0, BLOCK_D, BLOCK_K):
            o_in = first_in + tl.arange(0, BLOCK_K)
            b_input = tl.load(p_shared[:, None] + o_in[None, :])
            b_weight = tl.load(p_up + o_in[:, None] * F + o_unit[None, :])
            b_up = tl.dot(b_input, b_weight, b_up, input_precision="ieee")
        b_up = gelu_tanh(b_up + tl.load(p_row + 6 * BLOCK_D + o_unit)[None, :])
        b_weight = tl.load(p_down + o_unit[:, None] * BLOCK_D + o_dim[None, :])
        b_h = tl.dot(b_up.to(p_matrices.dtype.element_ty), b_weight, b_h, input_precision="ieee")
    return layer_norm(b_h, p_row + 4 * BLOCK_D, p_row + 5 * BLOCK_D, eps, D, BLOCK_D)


def stage_bytes(block_r: int, block_f: int, block_k: int, block_d: int, block_e: int, itemsize: int) -> int:
    """Bytes of shared memory that a stage of `project` or `finish_block` moves: rows, and the tiles of weights that
    they meet, three [BLOCK_K, E], or one [D, BLOCK_F] and one [BLOCK_F, D]. One stage less is held than there are, but
    by the matrix units of sm_90 and sm_100 with 64 rows, whose chips have room for it."""
    projections = block_r * block_k + 3 * block_k * block_e
    units = block_r * block_d + 2 * block_f * block_d
    return itemsize * max(projections, units)
