"""The networks of denoise_mlp_loop in Triton: their weights as the kernel reads them, and the blocks that it takes.

Matrices stand transposed, [inputs, outputs], with zeros up to whole blocks; behind the first layer each is followed by
its bias, all of them in one buffer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.kernels.packing import block_of, blocks_of_64, coef_on, join, pack_vector, pack_weight
from fastdiff.kernels.runtime import multiprocessors, shared_memory
from fastdiff.kernels.tuning import Config, Key, bucket
from fastdiff.ops.denoise_mlp_loop import MLPSampler, MLPWeights
from fastdiff.per_object import packed

_WIDEST = 256  # block of features that a program's registers hold
ROOMY = 160 << 10
"""Bytes of shared memory of a data centre's GPUs, from which 128 KB of weights can stay in it."""


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """The weights on the device, as the kernel reads them, and what they are."""

    w_in: Tensor
    layers: Tensor
    norm: Tensor
    norm_eps: float
    constants: dict[str, Any]


def pack_sampler(sampler: MLPSampler) -> tuple[Network, Tensor, Tensor, int]:
    """The network; the steps' times [S, padded hidden] and coefficients [S, 3] float32; the last step that draws, -1
    where none does."""
    network = packed(sampler.mlp, pack_network)
    time = torch.nn.functional.pad(sampler.time.detach(), (0, network.w_in.shape[1] - sampler.time.shape[1]))
    coef = coef_on(sampler.coef, time.device)
    drawing = [step for step, factor in enumerate(sampler.coef[:, 2].tolist()) if factor]
    return network, time.contiguous(), coef, max(drawing, default=-1)


def pack_network(mlp: MLPWeights) -> Network:
    constants = shape_of(mlp.w_in.shape[1], mlp.w_in.shape[0], [weight.shape[0] for weight, _ in mlp.layers])
    block_d, n_in = constants["BLOCK_D"], constants["HIDDEN_PADDED"]
    w_in = pack_weight(mlp.w_in, block_d, n_in)
    parts = []
    for (weight, bias), width in zip(mlp.layers, constants["WIDTHS"], strict=True):
        parts += [pack_weight(weight, n_in, width), pack_vector(bias, width)]
        n_in = width
    norm, eps = w_in, 0.0
    if mlp.out_norm is not None:
        weight, bias, eps = mlp.out_norm
        norm = join(pack_vector(weight, block_d), pack_vector(bias, block_d))
    constants |= {"ACTIVATION": mlp.activation, "NORM": mlp.out_norm is not None}
    return Network(w_in, join(*parts) if parts else w_in, norm, eps, constants)


def shape_of(dim: int, hidden: int, widths: list[int]) -> dict[str, Any]:
    """The constants that a network's sizes decide."""
    blocks = tuple(block_of(width) for width in widths)
    if max((block_of(dim), *blocks)) > _WIDEST:
        raise InvalidArgument(
            f"denoise_mlp_loop: on 'triton' the state and the layers after the first hidden one have at most {_WIDEST} "
            f"features (got {[dim, *widths]}); use backend='torch'"
        )
    # the first hidden layer is never whole in registers: any number of blocks of 64 will do
    padded = block_of(hidden) if hidden <= 256 or not widths else blocks_of_64(hidden)
    offsets, offset, n_in = [], 0, padded
    for width in blocks:
        offsets.append(offset)
        offset += (n_in + 1) * width
        n_in = width
    return {
        "DIM": dim,
        "HIDDEN": hidden,
        "HIDDEN_PADDED": padded,
        "WIDTHS": blocks,
        "OFFSETS": tuple(offsets),
        "BLOCK_D": block_of(dim),
    }


# --- blocks -----------------------------------------------------------------------------------------------------------


def network_key(n_rows: int, network: dict[str, Any], itemsize: int, device: torch.device) -> Key:
    sizes = (network["BLOCK_D"], network["HIDDEN_PADDED"], *network["WIDTHS"])
    return bucket(n_rows), itemsize, multiprocessors(device), shared_memory(device), *sizes


def network_candidates(
    rows: int, itemsize: int, processors: int, shared: int, block_d: int, padded: int, *widths: int
) -> list[Config]:
    """What `_choose` says first; then other numbers of warps, and of weights in flight, for a GPU to say."""
    network = {"BLOCK_D": block_d, "HIDDEN_PADDED": padded, "WIDTHS": widths}
    constants, options = _choose(rows, network, itemsize, processors, shared)
    blocks = {name: value for name, value in constants.items() if name not in network}
    warps, stages, registers = options["num_warps"], options["num_stages"], options.get("maxnreg")
    return [
        Config(blocks, warps, stages, registers),
        Config(blocks, 12 - warps, stages, registers),
        Config(blocks, warps, stages - 1 if stages > 1 else 2, registers),
    ]


def _choose(
    n_rows: int, network: dict[str, Any], itemsize: int, processors: int, shared: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """The kernel's constants for a network and a number of rows, and the options of its launch."""
    block_d, padded, widths = network["BLOCK_D"], network["HIDDEN_PADDED"], network["WIDTHS"]
    widest = max((block_d, *widths))
    weights = itemsize * sum(n_in * n_out for n_in, n_out in itertools.pairwise((block_d, padded, *widths)))
    held = weights <= (128 << 10 if shared >= ROOMY else 64 << 10) and block_of(padded) == padded and len(widths) < 2
    chunk = (128 if block_d < 256 else 64 if shared >= ROOMY or itemsize == 4 else 32) // itemsize
    if itemsize == 4 and len(widths) > 1:
        chunk = 16  # what it saves, the rows of both branches of the deeper layers take
    block_h = padded if held or not widths else min(padded, chunk)
    block_r, most = 16, (4096 if itemsize == 2 else 2048) // (1 if len(widths) < 2 else 2)
    while 2 * block_r * max(widest, block_h) <= most and n_rows > 4 * processors * block_r:
        block_r *= 2
    # float32 is multiplied without matrix units, whose operands pass through registers in small pieces
    tile = (8192 if len(widths) < 2 else 2048) if itemsize == 4 else 1 << 20 if held else 16384
    constants = {**network, "STREAMED": not held, "BLOCK_R": block_r, "BLOCK_H": block_h, "TILE": tile}
    wide = weights >= 64 << 10 if itemsize == 2 else weights > 16 << 10
    roomy = itemsize == 2 and shared >= ROOMY and (len(widths) < 2 or widest < 256)  # sm_100 would spill
    stages = 1 if not widths else 3 if roomy else 2
    options = {"num_warps": 8 if wide else 4, "num_stages": stages}
    # left alone, ptxas gives up registers, and spills, for programs that will never run beside this one; told not to,
    # it spills in others: what the table of precompile shows decides
    alone = held or len(widths) > 0 if itemsize == 2 else block_d != 128 and len(widths) < 2
    return constants, {**options, "maxnreg": 255} if alone else options
