"""How a loop in C++ comes by the draws of its steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.noise import GivenNoise, Noise, PhiloxNoise, StartNoise


@dataclass(frozen=True)
class StepNoise:
    """The draws of S steps, given or to be made by the loop; neither where no step needs one.

    given    [up to S, R, D] float32, the draw of step i at place i
    row_key  [R] int64, sample [R] int64, seed (signed 64 bits): see `fastdiff.ops.philox_normals`
    """

    given: Tensor | None = None
    row_key: Tensor | None = None
    sample: Tensor | None = None
    seed: int = 0


def step_noise(noise: Noise, coef: Tensor) -> StepNoise:
    """What the steps of `coef` `[S, 3]` need of `noise`; other kinds than given and Philox are drawn here, in order."""
    while isinstance(noise, StartNoise):
        noise = noise.rest
    if isinstance(noise, PhiloxNoise):
        seed = noise.seed & 0xFFFFFFFFFFFFFFFF
        return StepNoise(None, noise.row_key, noise.sample, seed - (seed >> 63 << 64))
    if isinstance(noise, GivenNoise):
        return StepNoise(noise.noise[1:])
    factors = coef[:, 2].tolist()
    draws = {i: noise.draw(1 + i) for i, factor in enumerate(factors) if factor}
    if not draws:
        return StepNoise()
    unread = next(iter(draws.values()))
    return StepNoise(torch.stack([draws.get(i, unread) for i in range(len(factors))]))
