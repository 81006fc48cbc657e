"""denoise_mlp_loop in Triton: one program takes some rows through all S steps.

x_t stays in registers in float32; nothing but weights, the users' shares of the first layer and given draws is read in
a step, and a step waits for nothing but its own two (or more) products. What decides the time:

    linear         one product per step
    one hidden     per BLOCK_H columns of the hidden layer: h = x W_in + cond + time, y += act(h) W_out
    deeper         the same for the first two layers; then one product per layer, its rows in registers

Where all weights of the first two layers fit in shared memory, BLOCK_H is all of the hidden layer: then no load depends
on the step, and Triton moves them before the loop (the table of precompile shows it: shared memory as large as the
weights). Else they stream from L2, the next tiles being copied while one is multiplied.

Guidance shares x W_in; and as the layer after the activations is linear, one hidden layer without a norm adds up the
two branches before it: W_out act(u) + g (W_out act(c) - W_out act(u)) = W_out (act(u) + g (act(c) - act(u))).

Few rows are spread over the multiprocessors, 16 to a program (the least of a matrix instruction); with more of them a
program takes what its registers hold, up to 64 in half precision and 32 in float32, since every program reads all
weights in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.kernels.denoise_mlp_network import (
    ROOMY,
    network_candidates,
    network_key,
    pack_network,
    pack_sampler,
    shape_of,
)
from fastdiff.kernels.normals import draw_rows
from fastdiff.kernels.precompile import Case
from fastdiff.kernels.rows import activate, layer_norm_rows, linear_rows, rows_dot
from fastdiff.kernels.runtime import device_int, require, rows_together
from fastdiff.kernels.sampler_step import unit_rows
from fastdiff.kernels.tuning import Config, Problem, choose
from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.denoise_mlp_loop import MLPSampler, MLPWeights
from fastdiff.ops.step_noise import step_noise
from fastdiff.per_object import packed


@triton.jit(do_not_specialize=["n_rows", "n_steps"])
def _denoise_mlp_kernel(
    p_x_t,
    p_cond,
    p_uncond,
    p_given,
    p_seed,
    p_row_key,
    p_sample,
    p_w_in,
    p_layers,
    p_norm,
    p_time,
    p_coef,
    p_x_0,
    x_t_stride,
    cond_stride,
    uncond_stride,
    given_step_stride,
    given_row_stride,
    guidance_scale,
    norm_eps,
    n_rows,
    n_steps,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,  # width of the first layer's output
    HIDDEN_PADDED: tl.constexpr,
    WIDTHS: tl.constexpr,  # blocks of the outputs of the layers after the first
    OFFSETS: tl.constexpr,  # where these layers stand in p_layers
    ACTIVATION: tl.constexpr,
    START: tl.constexpr,  # x_T: "given" or "drawn"
    NOISE: tl.constexpr,  # of the steps: "given", "drawn" or "none"
    GUIDED: tl.constexpr,
    NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_BEFORE: tl.constexpr,
    NORMALIZE_START: tl.constexpr,
    STREAMED: tl.constexpr,  # the weights do not fit in shared memory
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    N_LAYERS: tl.constexpr = len(WIDTHS)
    ONE_SUM: tl.constexpr = GUIDED and N_LAYERS == 1 and not NORM
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < n_rows
    o_dim, o_hidden = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    m_x = m_row[:, None] & (o_dim < DIM)[None, :]
    seed, b_key, b_sample = 0, o_row, o_row
    if START == "drawn" or NOISE == "drawn":
        seed = tl.load(p_seed)
        b_key = tl.load(p_row_key + o_row, mask=m_row, other=0)
        b_sample = tl.load(p_sample + o_row, mask=m_row, other=0)

    if START == "drawn":
        b_x = draw_rows(seed, b_key, b_sample, 0, m_x, p_cond.dtype.element_ty)
    else:
        b_x = tl.load(p_x_t + o_row[:, None] * x_t_stride + o_dim[None, :], mask=m_x, other=0.0).to(tl.float32)
    if NORMALIZE_START:
        b_x = unit_rows(b_x)

    p_cond_rows = p_cond + o_row[:, None] * cond_stride + o_hidden[None, :]
    p_uncond_rows = p_uncond + o_row[:, None] * uncond_stride + o_hidden[None, :]

    for i in range(n_steps):
        if NORMALIZE_BEFORE:
            b_x = unit_rows(b_x)
        stay = 0
        if STREAMED:
            stay = tl.minimum(i, 0)  # which is 0, but keeps loads of weights in the loop
        p_now = p_time + tl.full([], i, tl.int64) * HIDDEN_PADDED + o_hidden

        if N_LAYERS == 0:
            m_hidden = m_row[:, None] & (o_hidden < HIDDEN)[None, :]
            b_h = tl.zeros([BLOCK_R, BLOCK_H], tl.float32) + tl.load(p_now).to(tl.float32)[None, :]
            b_h = rows_dot(b_x, p_w_in + stay, b_h, HIDDEN_PADDED, TILE)
            b_y = b_h + tl.load(p_cond_rows, mask=m_hidden, other=0.0).to(tl.float32)
            if GUIDED:
                b_y_uncond = b_h + tl.load(p_uncond_rows, mask=m_hidden, other=0.0).to(tl.float32)
        else:
            WIDTH: tl.constexpr = WIDTHS[0]
            b_bias = tl.load(p_layers + HIDDEN_PADDED * WIDTH + tl.arange(0, WIDTH)).to(tl.float32)
            b_y = tl.zeros([BLOCK_R, WIDTH], tl.float32) + b_bias[None, :]
            b_y_uncond = b_y
            for first in range(0, HIDDEN_PADDED, BLOCK_H):
                m_hidden = m_row[:, None] & (o_hidden + first < HIDDEN)[None, :]
                p_w_out = p_layers + first * WIDTH
                b_h = tl.zeros([BLOCK_R, BLOCK_H], tl.float32) + tl.load(p_now + first).to(tl.float32)[None, :]
                b_h = rows_dot(b_x, p_w_in + first, b_h, HIDDEN_PADDED, TILE)
                b_cond = tl.load(p_cond_rows + first, mask=m_hidden, other=0.0).to(tl.float32)
                b_a = activate(b_h + b_cond, ACTIVATION)
                if GUIDED:
                    b_uncond = tl.load(p_uncond_rows + first, mask=m_hidden, other=0.0).to(tl.float32)
                    b_a_uncond = activate(b_h + b_uncond, ACTIVATION)
                    if ONE_SUM:
                        b_a = b_a_uncond + guidance_scale * (b_a - b_a_uncond)
                    else:
                        b_y_uncond = rows_dot(b_a_uncond, p_w_out, b_y_uncond, WIDTH, TILE)
                b_y = rows_dot(b_a, p_w_out, b_y, WIDTH, TILE)
            for layer in tl.static_range(1, N_LAYERS):
                b_y = _deeper(b_y, p_layers + stay, layer, WIDTHS, OFFSETS, ACTIVATION, TILE)
                if GUIDED:
                    b_y_uncond = _deeper(b_y_uncond, p_layers + stay, layer, WIDTHS, OFFSETS, ACTIVATION, TILE)
        if NORM:
            b_y = layer_norm_rows(b_y, p_norm, norm_eps, DIM)
            if GUIDED:
                b_y_uncond = layer_norm_rows(b_y_uncond, p_norm, norm_eps, DIM)
        if GUIDED and not ONE_SUM:
            b_y = b_y_uncond + guidance_scale * (b_y - b_y_uncond)

        c_out, c_xt, c_noise = tl.load(p_coef + i * 3), tl.load(p_coef + i * 3 + 1), tl.load(p_coef + i * 3 + 2)
        b_x = c_out * b_y + c_xt * b_x
        if NOISE != "none":  # noqa: SIM102 (one is known to the compiler, one is not)
            if c_noise != 0.0:
                if NOISE == "drawn":
                    b_noise = draw_rows(seed, b_key, b_sample, 1 + i, m_x, p_cond.dtype.element_ty)
                else:
                    p_step = p_given + tl.full([], i, tl.int64) * given_step_stride
                    p_rows = p_step + o_row[:, None] * given_row_stride
                    b_noise = tl.load(p_rows + o_dim[None, :], mask=m_x, other=0.0).to(tl.float32)
                b_x += c_noise * b_noise
        if NORMALIZE:
            b_x = unit_rows(b_x)

    tl.store(p_x_0 + o_row[:, None] * DIM + o_dim[None, :], b_x.to(p_x_0.dtype.element_ty), mask=m_x)


@triton.jit
def _deeper(
    b_h,
    p_layers,
    LAYER: tl.constexpr,
    WIDTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    WIDTH: tl.constexpr = WIDTHS[LAYER]
    return linear_rows(activate(b_h, ACTIVATION), p_layers + OFFSETS[LAYER], WIDTH, TILE)


def denoise_mlp_loop(
    x_t: Tensor | None,
    sampler: MLPSampler,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    noise: Noise,
) -> Tensor:
    """See `fastdiff.ops.denoise_mlp_loop.denoise_mlp_loop_ref`. Philox draws are made inside the loop, other ones are
    asked for before it, in the same order. Blocks of features hold up to 256: D, and the layers between the second and
    the last."""
    network, time, coef, last_draw = packed(sampler, pack_sampler)
    n_rows, dim = cond.shape[0], sampler.mlp.w_in.shape[1]
    hidden, dtype = sampler.mlp.w_in.shape[0], cond.dtype
    require("denoise_mlp_loop", "cond", cond, (n_rows, hidden), sampler.mlp.w_in.dtype)
    if x_t is None and not isinstance(noise, PhiloxNoise):
        x_t = noise.draw(0)
    if x_t is not None:
        require("denoise_mlp_loop", "x_t", x_t, (n_rows, dim), dtype)
        x_t = rows_together(x_t)
    if uncond is not None:
        require("denoise_mlp_loop", "uncond", uncond, (n_rows if uncond.shape[0] != 1 else 1, hidden), dtype)
        uncond = rows_together(uncond)
    cond = rows_together(cond)
    drawn = step_noise(noise, sampler.coef)
    given = drawn.given if last_draw >= 0 else None
    if given is not None:
        if given.shape[0] <= last_draw:
            raise InvalidArgument(
                f"denoise_mlp_loop: noise must hold the draws of {last_draw + 1} steps (got {list(given.shape)})"
            )
        require("denoise_mlp_loop", "noise", given, (given.shape[0], n_rows, dim), dtype)
        given = given if given.stride(2) == 1 else given.contiguous()
    x_0 = torch.empty(n_rows, dim, dtype=dtype, device=cond.device)
    if x_0.numel() == 0:
        return x_0
    from_philox = drawn.row_key is not None and (x_t is None or last_draw >= 0)
    key = network_key(n_rows, network.constants, cond.element_size(), cond.device)
    config = choose("denoise_mlp_loop", key, network_candidates, cond.device)
    _denoise_mlp_kernel[(triton.cdiv(n_rows, config.constants["BLOCK_R"]),)](
        cond if x_t is None else x_t,
        cond,
        cond if uncond is None else uncond,
        cond if given is None else given,
        device_int(drawn.seed, cond.device) if from_philox else coef,
        drawn.row_key.contiguous() if drawn.row_key is not None else coef,
        drawn.sample.contiguous() if drawn.sample is not None else coef,
        network.w_in,
        network.layers,
        network.norm,
        time,
        coef,
        x_0,
        0 if x_t is None else x_t.stride(0),
        cond.stride(0),
        0 if uncond is None or uncond.shape[0] == 1 else uncond.stride(0),
        0 if given is None else given.stride(0),
        0 if given is None else given.stride(1),
        guidance_scale,
        network.norm_eps,
        n_rows,
        sampler.coef.shape[0],
        START="drawn" if x_t is None else "given",
        NOISE="none" if last_draw < 0 else "given" if given is not None else "drawn",
        GUIDED=uncond is not None,
        NORMALIZE=sampler.normalize,
        NORMALIZE_BEFORE=sampler.normalize_before,
        NORMALIZE_START=sampler.normalize_start,
        **network.constants,
        **config.launch(),
    )
    return x_0


def tuning_problems(device: torch.device) -> Iterator[Problem]:
    """What `python -m fastdiff.kernels.tuning` times: DreamRec's and TA-Rec's networks, guided, draws made inside."""
    for dtype in (torch.float32, torch.float16):
        for rows, steps, dim, widths in (
            (1, 3, 64, ()),
            (1024, 500, 64, ()),
            (64, 500, 64, (256,)),
            (1024, 500, 64, (256,)),
            (8192, 50, 64, (256,)),
            (1024, 50, 128, (512,)),
        ):

            def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                scale = 1.0 / float(shape[-1]) ** 0.5
                values: Tensor = (scale * torch.randn(*shape, device=device)).to(dtype)
                return values

            first = widths[0] if widths else dim
            layers = ((drawn(dim, first), drawn(dim)),) if widths else ()
            coef = torch.full((steps, 3), 0.3, dtype=torch.float64)
            sampler = MLPSampler(MLPWeights(drawn(first, dim), layers), drawn(steps, first), coef, normalize=True)
            keys = torch.arange(rows, device=device)
            noise = PhiloxNoise(1, keys, keys * 0, dim, dtype)
            uncond = drawn(1, first) if widths else None
            key = network_key(rows, pack_network(sampler.mlp).constants, dtype.itemsize, device)
            arguments: tuple[Any, ...] = (None, sampler, drawn(rows, first), uncond, 3.0, noise)
            run = partial(denoise_mlp_loop, *arguments)
            yield Problem("denoise_mlp_loop", key, network_candidates(*key), run)  # type: ignore[arg-type]


def cases() -> Iterator[Case]:
    """What `python -m fastdiff.kernels.precompile` compiles."""
    many, small = 1 << 20, 99 << 10
    yield from _cases("fp32", 1, 64, (), NORMALIZE_BEFORE=True, NORMALIZE_START=True, START="given", NOISE="given")
    yield from _cases("fp32", many, 64, (256,))
    yield from _cases("fp32", 1, 64, (256, 64), GUIDED=True, ACTIVATION="tanh")
    yield from _cases("fp32", 1, 128, (512,), GUIDED=True, NORM=True, ACTIVATION="silu")
    yield from _cases("bf16", many, 64, ())
    yield from _cases("fp16", 1, 64, (128,), GUIDED=True)
    yield from _cases("fp16", many, 64, (256, 64), GUIDED=True, ACTIVATION="tanh")
    yield from _cases("fp16", many, 128, (512,), GUIDED=True, NORM=True, ACTIVATION="silu")
    yield from _cases("fp16", 1, 256, (512,))
    yield from _cases("bf16", 1, 64, (256,))
    yield from _cases("bf16", 1, 128, (256,), small)
    yield from _cases("bf16", 1, 128, (256, 256, 128), ACTIVATION="relu")


def _cases(
    dtype: str, n_rows: int, dim: int, widths: tuple[int, ...], shared: int = 227 << 10, **changes: bool | str
) -> Iterator[Case]:
    """`widths` of the hidden layers; the linear layer behind the last of them has `dim` outputs."""
    shape = shape_of(dim, *((widths[0], [*widths[1:], dim]) if widths else (dim, [])))
    kinds = {"ACTIVATION": "gelu", "NORM": False, "GUIDED": False, "START": "drawn", "NOISE": "drawn"}
    sphere = {"NORMALIZE": True, "NORMALIZE_BEFORE": False, "NORMALIZE_START": False}
    itemsize = 4 if dtype == "fp32" else 2
    found = network_candidates(
        n_rows, itemsize, 132, shared, shape["BLOCK_D"], shape["HIDDEN_PADDED"], *shape["WIDTHS"]
    )
    floating = ("p_x_t", "p_cond", "p_uncond", "p_given", "p_w_in", "p_layers", "p_norm", "p_time", "p_x_0")
    strides = ("x_t_stride", "cond_stride", "uncond_stride", "given_step_stride", "given_row_stride")
    words = [str(value if isinstance(value, str) else name).lower() for name, value in changes.items()]
    words += ["small"] if shared < ROOMY else []
    tuned = (dim, widths) == (64, (256,))  # of the sizes that are tuned, one
    for i, config in enumerate(found if tuned else found[:1]):
        yield Case(
            " ".join([f"{dtype} R={n_rows} D={dim} H={widths}", *words, *([_words(config)] if i else [])]),
            _denoise_mlp_kernel,
            dict.fromkeys(floating, f"*{dtype}")
            | dict.fromkeys(("p_seed", "p_row_key", "p_sample"), "*i64")
            | {"p_coef": "*fp32"}
            | dict.fromkeys(strides, "i32")
            | {"guidance_scale": "fp32", "norm_eps": "fp32", "n_rows": "i32", "n_steps": "i32"},
            shape | kinds | sphere | changes | dict(config.constants),
            config.options(),
            hot=i == 0,  # another one is taken only where it was measured to be faster
            tensor_core=itemsize == 2,
        )


def _words(config: Config) -> str:
    return f"warps={config.num_warps} stages={config.num_stages}"
