"""sample_affine in Triton: two products and a draw in one launch; a program makes some columns of some rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.closed_form import ClosedForm
from fastdiff.kernels.normals import draw_rows
from fastdiff.kernels.packing import blocks_of_64, pack_vector, pack_weight
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import device_int, multiprocessors, require, rows_together
from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.per_object import packed


@triton.jit(do_not_specialize=["n_rows"])
def _sample_affine_kernel(
    p_cond,
    p_uncond,
    p_z,
    p_seed,
    p_row_key,
    p_sample,
    p_gain,
    p_offset,
    p_factor,
    p_x_0,
    cond_stride,
    uncond_stride,
    z_stride,
    guidance_scale,
    n_rows,
    padded,
    DIM: tl.constexpr,
    GUIDED: tl.constexpr,
    DRAWN: tl.constexpr,  # z is made here
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < n_rows
    if DRAWN:
        seed = tl.load(p_seed)
        b_key = tl.load(p_row_key + o_row, mask=m_row, other=0)
        b_sample = tl.load(p_sample + o_row, mask=m_row, other=0)
    b_x_0 = tl.zeros([BLOCK_R, BLOCK_N], tl.float32) + tl.load(p_offset + o_out).to(tl.float32)[None, :]
    for first in range(0, padded, BLOCK_K):
        o_dim = first + tl.arange(0, BLOCK_K)
        m_x = m_row[:, None] & (o_dim < DIM)[None, :]
        b_gain = tl.load(p_gain + o_dim[:, None] * padded + o_out[None, :])
        b_factor = tl.load(p_factor + o_dim[:, None] * padded + o_out[None, :])
        b_cond = tl.load(p_cond + o_row[:, None] * cond_stride + o_dim[None, :], mask=m_x, other=0.0)
        if GUIDED:
            p_null = p_uncond + o_row[:, None] * uncond_stride + o_dim[None, :]
            b_uncond = tl.load(p_null, mask=m_x, other=0.0).to(tl.float32)
            b_cond = (b_uncond + guidance_scale * (b_cond.to(tl.float32) - b_uncond)).to(b_gain.dtype)
        if DRAWN:
            b_z = draw_rows(seed, b_key, b_sample, 0, m_x, p_cond.dtype.element_ty, first).to(b_factor.dtype)
        else:
            b_z = tl.load(p_z + o_row[:, None] * z_stride + o_dim[None, :], mask=m_x, other=0.0)
        b_x_0 = tl.dot(b_cond, b_gain, b_x_0, input_precision="ieee")
        b_x_0 = tl.dot(b_z, b_factor, b_x_0, input_precision="ieee")
    p_out = p_x_0 + o_row[:, None] * DIM + o_out[None, :]
    tl.store(p_out, b_x_0.to(p_x_0.dtype.element_ty), mask=m_row[:, None] & (o_out < DIM)[None, :])


def sample_affine(form: ClosedForm, cond: Tensor, uncond: Tensor | None, guidance_scale: float, noise: Noise) -> Tensor:
    """See `fastdiff.ops.sample_affine.sample_affine_ref`. Philox draws are made inside."""
    gain, offset, factor = packed(form, _pack)
    n_rows, dim = cond.shape[0], form.offset.shape[0]
    require("sample_affine", "cond", cond, (n_rows, dim), gain.dtype)
    if uncond is not None:
        require("sample_affine", "uncond", uncond, (n_rows if uncond.shape[0] != 1 else 1, dim), gain.dtype)
        uncond = rows_together(uncond)
    drawn = noise if isinstance(noise, PhiloxNoise) else None
    z = cond if drawn is not None else noise.draw(0)
    require("sample_affine", "noise", z, (n_rows, dim), gain.dtype)
    x_0 = torch.empty(n_rows, dim, dtype=cond.dtype, device=cond.device)
    if x_0.numel() == 0:
        return x_0
    cond, z = rows_together(cond), rows_together(z)
    constants = _blocks(n_rows, dim, cond.element_size(), multiprocessors(cond.device))
    _sample_affine_kernel[(triton.cdiv(n_rows, constants["BLOCK_R"]), triton.cdiv(dim, constants["BLOCK_N"]))](
        cond,
        cond if uncond is None else uncond,
        z,
        offset if drawn is None else device_int(drawn.seed, cond.device),
        offset if drawn is None else drawn.row_key.contiguous(),
        offset if drawn is None else drawn.sample.contiguous(),
        gain,
        offset,
        factor,
        x_0,
        cond.stride(0),
        0 if uncond is None or uncond.shape[0] == 1 else uncond.stride(0),
        z.stride(0),
        guidance_scale,
        n_rows,
        gain.shape[1],  # an argument, because LLVM unrolls loops whose length it knows
        DIM=dim,
        GUIDED=uncond is not None,
        DRAWN=drawn is not None,
        **constants,
        num_warps=4,
        num_stages=2,
    )
    return x_0


def _pack(form: ClosedForm) -> tuple[Tensor, Tensor, Tensor]:
    n = blocks_of_64(form.offset.shape[0])
    return pack_weight(form.gain, n, n), pack_vector(form.offset, n), pack_weight(form.factor, n, n)


def _blocks(n_rows: int, dim: int, itemsize: int, processors: int) -> dict[str, int]:
    padded = blocks_of_64(dim)
    many = itemsize == 2 and n_rows >= 32 * processors  # float32 would spill
    return {
        "BLOCK_R": 32 if many else 16,
        "BLOCK_K": min(padded, 32),
        "BLOCK_N": min(padded, 64 if many else 32),
    }


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    for dtype, n_rows, dim in (
        ("fp32", 1, 64),
        ("fp32", 1 << 20, 128),
        ("fp16", 1, 128),
        ("fp16", 1 << 20, 64),
        ("bf16", 1, 64),
        ("bf16", 1 << 20, 128),
    ):
        yield Case(
            f"{dtype} R={n_rows} D={dim}",
            _sample_affine_kernel,
            dict.fromkeys(("p_cond", "p_uncond", "p_z", "p_gain", "p_offset", "p_factor", "p_x_0"), f"*{dtype}")
            | dict.fromkeys(("p_seed", "p_row_key", "p_sample"), "*i64")
            | dict.fromkeys(("cond_stride", "uncond_stride", "z_stride", "n_rows", "padded"), "i32")
            | {"guidance_scale": "fp32"},
            {"DIM": dim, "GUIDED": True, "DRAWN": True} | _blocks(n_rows, dim, 4 if dtype == "fp32" else 2, 132),
            {"num_warps": 4, "num_stages": 2},
            tensor_core=dtype != "fp32",
        )
