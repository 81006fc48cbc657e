"""sample_affine in Triton: two products and a draw in one launch; a program makes some columns of some rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.closed_form import ClosedForm
from fastdiff.kernels.normals import draw_rows
from fastdiff.kernels.packing import blocks_of_64, pack_vector, pack_weight
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import device_int, multiprocessors, require, rows_together
from fastdiff.kernels.tuning import Config, Key, Problem, bucket, choose
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
    key = _key(n_rows, gain.shape[1], cond.element_size(), cond.device)
    config = choose("sample_affine", key, _candidates, cond.device)
    programs = (triton.cdiv(n_rows, config.constants["BLOCK_R"]), triton.cdiv(dim, config.constants["BLOCK_N"]))
    _sample_affine_kernel[programs](
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
        **config.launch(),
    )
    return x_0


def _pack(form: ClosedForm) -> tuple[Tensor, Tensor, Tensor]:
    n = blocks_of_64(form.offset.shape[0])
    return pack_weight(form.gain, n, n), pack_vector(form.offset, n), pack_weight(form.factor, n, n)


def _key(n_rows: int, padded: int, itemsize: int, device: torch.device) -> Key:
    many = itemsize == 2 and n_rows >= 32 * multiprocessors(device)  # float32 would spill
    return bucket(n_rows), "many" if many else "few", padded, itemsize


def _candidates(rows: int, many: str, padded: int, itemsize: int) -> list[Config]:
    """Tiles of x_0 with programs enough; then other ones, of which wider ones make the draws of a row less often, and
    one whose weights are fetched two tiles ahead."""
    tiles = [(16, 32), (16, 64), *([(32, 64)] if itemsize == 2 else [])]
    if many == "many":
        tiles.reverse()
    depth = min(padded, 32)

    def config(block_r: int, block_n: int, stages: int = 2) -> Config:
        block_n = min(padded, block_n)
        shared = (stages - 1) * itemsize * depth * (2 * block_r + 2 * block_n)
        return Config({"BLOCK_R": block_r, "BLOCK_K": depth, "BLOCK_N": block_n}, 4, stages, shared=shared)

    found = [*(config(*tile) for tile in tiles), config(*tiles[0], stages=3)]
    return [config for i, config in enumerate(found) if config not in found[:i]]


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times: DreamRec's linear denoiser, guided, its draw made inside."""
    for dtype in (torch.float32, torch.float16):  # bfloat16 is as float16
        for rows, dim in ((1, 64), (32, 64), (1024, 64), (8192, 64), (1024, 128), (8192, 128)):
            gain, factor = (torch.randn(2, dim, dim, device=device) / dim**0.5).to(dtype)
            offset = torch.zeros(dim, dtype=dtype, device=device)
            form = ClosedForm(gain, offset, factor, factor, 1.0)
            cond, uncond = (torch.randn(n, dim, device=device).to(dtype) for n in (rows, 1))
            keys = torch.arange(rows, device=device)
            noise = PhiloxNoise(1, keys, keys * 0, dim, dtype)
            key = _key(rows, blocks_of_64(dim), dtype.itemsize, device)
            run = partial(sample_affine, form, cond, uncond, 3.0, noise)
            yield Problem("sample_affine", key, _candidates(*key), run)  # type: ignore[arg-type]


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    seen: dict[str, list[Config]] = {}
    floating = ("p_gain", "p_offset", "p_factor", "p_cond", "p_uncond", "p_z", "p_x_0")
    strides = ("cond_stride", "uncond_stride", "z_stride")
    for dtype, many, dim in (
        ("fp32", "few", 64),
        ("fp32", "few", 128),
        ("fp16", "few", 128),
        ("fp16", "many", 64),
        ("bf16", "few", 64),
        ("bf16", "many", 128),
    ):
        first, *others = _candidates(1, many, blocks_of_64(dim), 4 if dtype == "fp32" else 2)
        pointers = dict.fromkeys(floating, f"*{dtype}") | dict.fromkeys(("p_seed", "p_row_key", "p_sample"), "*i64")
        done = seen.setdefault(dtype, [])
        new = [config for config in others if config not in done and dtype != "bf16"]  # which is as float16
        done += new
        for config in (first, *new):
            yield Case(
                f"{dtype} {many} D={dim} {config.words()} stages={config.num_stages}",
                _sample_affine_kernel,
                pointers | dict.fromkeys((*strides, "n_rows", "padded"), "i32") | {"guidance_scale": "fp32"},
                {"DIM": dim, "GUIDED": True, "DRAWN": True, **config.constants},
                config.options(),
                hot=config == first,  # another one is taken only where it was measured to be faster
                tensor_core=dtype != "fp32",
                divisible=(*pointers, *strides, "padded"),
            )
