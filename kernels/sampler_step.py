"""sampler_step in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import next_power_of_2, rows_together
from fastdiff.kernels.tuning import Config, Problem, bucket, choose

_NUMBERS = (4096, 2048, 1024)  # of a tensor, that one program may read


@triton.jit(do_not_specialize=["n_rows"])
def _sampler_step_kernel(
    p_output,
    p_x_t,
    p_noise,
    p_x_prev,
    output_stride,
    x_t_stride,
    noise_stride,
    c_out,
    c_xt,
    c_noise,
    n_rows,
    dim,
    HAS_X_T: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (o_row < n_rows)[:, None] & (o_dim < dim)
    o_row = o_row[:, None]
    b_x_prev = c_out * tl.load(p_output + o_row * output_stride + o_dim, mask=mask, other=0.0).to(tl.float32)
    if HAS_X_T:
        b_x_prev += c_xt * tl.load(p_x_t + o_row * x_t_stride + o_dim, mask=mask, other=0.0).to(tl.float32)
    if HAS_NOISE:
        b_x_prev += c_noise * tl.load(p_noise + o_row * noise_stride + o_dim, mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        b_x_prev = unit_rows(b_x_prev)
    tl.store(p_x_prev + o_row * dim + o_dim, b_x_prev.to(p_x_prev.dtype.element_ty), mask=mask)


@triton.jit
def unit_rows(b_x):
    """x / max(|x|, 1e-12) of the rows of a block [R, D] that is 0 beyond the rows' own dims."""
    b_norm = tl.sqrt_rn(tl.sum(b_x * b_x, axis=1))
    return b_x / tl.maximum(b_norm, 1e-12)[:, None]


def sampler_step(
    model_output: Tensor,
    x_t: Tensor,
    noise: Tensor | None,
    c_out: float,
    c_xt: float,
    c_noise: float,
    normalize: bool = False,
) -> Tensor:
    """See `fastdiff.ops.sampler_step.sampler_step_ref`."""
    if noise is None and c_noise:
        raise InvalidArgument(f"sampler_step: noise must be given where c_noise is not 0 (got None with {c_noise:g})")
    n_rows, dim = model_output.shape
    x_prev = torch.empty_like(model_output, memory_format=torch.contiguous_format)
    if x_prev.numel() == 0:
        return x_prev
    model_output, x_t = rows_together(model_output), rows_together(x_t)
    noise = x_t if noise is None else rows_together(noise)
    block_d = next_power_of_2(dim)
    config = choose("sampler_step", (bucket(n_rows), block_d), _candidates, x_prev.device)
    _sampler_step_kernel[(triton.cdiv(n_rows, config.constants["BLOCK_R"]),)](
        model_output,
        x_t,
        noise,
        x_prev,
        model_output.stride(0),
        x_t.stride(0),
        noise.stride(0),
        c_out,
        c_xt,
        c_noise,
        n_rows,
        dim,
        HAS_X_T=c_xt != 0.0,
        HAS_NOISE=c_noise != 0.0,
        NORMALIZE=normalize,
        BLOCK_D=block_d,
        **config.launch(),
    )
    return x_prev


def _candidates(rows: int, block_d: int) -> list[Config]:
    blocks = dict.fromkeys(max(1, min(numbers // block_d, rows)) for numbers in _NUMBERS)
    return [Config({"BLOCK_R": block_r}, num_warps=warps, num_stages=1) for block_r in blocks for warps in (4, 8)]


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times."""
    for rows, block_d in ((32, 64), (1024, 64), (32, 128), (1024, 128), (65536, 128)):
        output, x_t, noise = torch.randn(3, rows, block_d, device=device)
        run = partial(sampler_step, output, x_t, noise, 0.9, 0.3, 0.2, True)
        yield Problem("sampler_step", (rows, block_d), _candidates(rows, block_d), run)


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    for dtype in ("fp32", "fp16", "bf16"):
        pointers = dict.fromkeys(("p_output", "p_x_t", "p_noise", "p_x_prev"), f"*{dtype}")
        strides = dict.fromkeys(("output_stride", "x_t_stride", "noise_stride"), "i32")
        factors = dict.fromkeys(("c_out", "c_xt", "c_noise"), "fp32")
        flags = {"HAS_X_T": True, "HAS_NOISE": True, "NORMALIZE": True}
        for rows, block_d in ((1, 64), (1024, 128)):
            for i, config in enumerate(_candidates(rows, block_d)):
                yield Case(
                    f"{dtype} R={config.constants['BLOCK_R']} D={block_d} warps={config.num_warps}",
                    _sampler_step_kernel,
                    {**pointers, **strides, **factors, "n_rows": "i32", "dim": "i32"},
                    {**flags, "BLOCK_D": block_d, **config.constants},
                    config.options(),
                    hot=i == 0,  # another one is taken only where it was measured to be faster
                )
