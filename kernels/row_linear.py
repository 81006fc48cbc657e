"""row_linear in Triton: tiles of y, with enough of them for all multiprocessors before they grow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.precompile import Case
from fastdiff.kernels.runtime import multiprocessors, require, rows_together
from fastdiff.kernels.tuning import Config, Problem, bucket, choose
from fastdiff.ops.row_linear import LinearWeights
from fastdiff.per_object import packed

_TILES = ((64, 64), (32, 64), (16, 64), (16, 32), (16, 16))  # rows by outputs


@triton.jit(do_not_specialize=["n_rows"])
def _row_linear_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    x_stride,
    n_rows,
    n_in,
    n_out,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_out = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row, m_out = (o_row < n_rows)[:, None], (o_out < n_out)[None, :]
    b_bias = tl.load(p_bias + o_out, mask=o_out < n_out, other=0.0).to(tl.float32)
    b_y = tl.zeros([BLOCK_R, BLOCK_N], tl.float32) + b_bias[None, :]
    for first in range(0, n_in, BLOCK_K):
        o_in = first + tl.arange(0, BLOCK_K)
        m_in = o_in < n_in
        b_x = tl.load(p_x + o_row[:, None] * x_stride + o_in[None, :], mask=m_row & m_in[None, :], other=0.0)
        b_w = tl.load(p_weight + o_out[None, :] * n_in + o_in[:, None], mask=m_in[:, None] & m_out, other=0.0)
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
    tl.store(p_y + o_row[:, None] * n_out + o_out[None, :], b_y.to(p_y.dtype.element_ty), mask=m_row & m_out)


def row_linear(x: Tensor, layer: LinearWeights) -> Tensor:
    """See `fastdiff.ops.row_linear.row_linear_ref`."""
    weight, bias = packed(layer, _pack)
    n_rows, n_in, n_out = x.shape[0], weight.shape[1], weight.shape[0]
    require("row_linear", "x", x, (n_rows, n_in), weight.dtype)
    y = torch.empty(n_rows, n_out, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = rows_together(x)
    key = (bucket(n_rows), bucket(n_out, least=16), x.element_size(), multiprocessors(x.device))
    config = choose("row_linear", key, _candidates, x.device)
    block_r, block_n = config.constants["BLOCK_R"], config.constants["BLOCK_N"]
    _row_linear_kernel[(triton.cdiv(n_rows, block_r), triton.cdiv(n_out, block_n))](
        x,
        weight,
        bias,
        y,
        x.stride(0),
        n_rows,
        n_in,
        n_out,
        **config.launch(),
    )
    return y


def _pack(layer: LinearWeights) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().contiguous(), layer.bias.detach().contiguous()


def _candidates(rows: int, outputs: int, itemsize: int, processors: int) -> list[Config]:
    """The largest tile of which there are as many as multiprocessors, or the smallest; then the other ones."""
    enough = [tile for tile in _TILES if triton.cdiv(rows, tile[0]) * triton.cdiv(outputs, tile[1]) >= processors]
    first = enough[0] if enough else _TILES[-1]
    return [_config(*tile, itemsize) for tile in (first, *(tile for tile in _TILES if tile != first))]


def _config(block_r: int, block_n: int, itemsize: int) -> Config:
    return Config({"BLOCK_R": block_r, "BLOCK_N": block_n, "BLOCK_K": 128 // itemsize})


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times."""
    for dtype in (torch.float32, torch.float16):  # bfloat16 is as float16
        for rows, n_in, n_out in ((1, 128, 512), (32, 128, 512), (1024, 128, 512), (1024, 64, 64), (8192, 128, 512)):
            x, weight = (torch.randn(n, n_in, device=device).to(dtype) for n in (rows, n_out))
            layer = LinearWeights(weight, torch.zeros(n_out, dtype=dtype, device=device))
            key = (rows, n_out, x.element_size(), multiprocessors(device))
            yield Problem("row_linear", key, _candidates(*key), partial(row_linear, x, layer))


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    for dtype, tiles in (("fp32", _TILES), ("fp16", _TILES), ("bf16", _TILES[:1])):
        itemsize = 4 if dtype == "fp32" else 2
        for block_r, block_n in tiles:
            config = _config(block_r, block_n, itemsize)
            yield Case(
                f"{dtype} {block_r} x {block_n}",
                _row_linear_kernel,
                dict.fromkeys(("p_x", "p_weight", "p_bias", "p_y"), f"*{dtype}")
                | dict.fromkeys(("x_stride", "n_rows", "n_in", "n_out"), "i32"),
                config.constants,
                config.options(),
                tensor_core=itemsize == 2,
                divisible=("p_x", "p_weight", "p_bias", "p_y", "x_stride", "n_in"),
            )
