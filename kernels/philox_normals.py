"""philox_normals in Triton."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.normals import normal_rows
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import device_int, next_power_of_2

_NUMBERS = 2048  # that one program makes


@triton.jit(do_not_specialize=["first_draw", "n_rows"])
def _philox_normals_kernel(
    p_seed, p_row_key, p_sample, p_out, first_draw, n_rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    n_programs = tl.cdiv(n_rows, BLOCK_R)  # of a draw
    i_draw = (tl.program_id(0) // n_programs).to(tl.int64)
    o_row = (tl.program_id(0) % n_programs).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < n_rows
    b_key = tl.load(p_row_key + o_row, mask=m_row, other=0)
    b_sample = tl.load(p_sample + o_row, mask=m_row, other=0)
    b_normals = normal_rows(tl.load(p_seed), b_key, b_sample, first_draw + i_draw, BLOCK_D)
    o_dim = tl.arange(0, BLOCK_D)
    o_out = (i_draw * n_rows + o_row)[:, None] * dim + o_dim[None, :]
    tl.store(p_out + o_out, b_normals, mask=m_row[:, None] & (o_dim < dim)[None, :])


def philox_normals(
    seed: int | Tensor, row_key: Tensor, sample: Tensor, first_draw: int, n_draws: int, dim: int
) -> Tensor:
    """See `fastdiff.ops.philox_normals.philox_normals_ref`."""
    n_rows = row_key.shape[0]
    normals = torch.empty(n_draws, n_rows, dim, device=row_key.device)
    if normals.numel():
        block_r, block_d = _blocks(n_rows, dim)
        _philox_normals_kernel[(triton.cdiv(n_rows, block_r) * n_draws,)](  # only the first axis is long enough
            device_int(seed, row_key.device),
            row_key.contiguous(),
            sample.contiguous(),
            normals,
            first_draw,
            n_rows,
            dim,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
        )
    return normals


def _blocks(n_rows: int, dim: int) -> tuple[int, int]:
    block_d = max(4, next_power_of_2(dim))
    return max(1, min(_NUMBERS // block_d, next_power_of_2(n_rows))), block_d


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    for n_rows, dim in ((1, 64), (1024, 128), (1024, 100)):
        block_r, block_d = _blocks(n_rows, dim)
        yield Case(
            f"R={n_rows} D={dim}",
            _philox_normals_kernel,
            {
                "p_seed": "*i64",
                "p_row_key": "*i64",
                "p_sample": "*i64",
                "p_out": "*fp32",
                "first_draw": "i32",
                "n_rows": "i32",
                "dim": "i32",
            },
            {"BLOCK_R": block_r, "BLOCK_D": block_d},
        )
