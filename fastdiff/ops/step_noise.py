"""How a loop that runs outside Python, in C++ or in a kernel, comes by the draws of its steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.noise import GivenNoise, Noise, PhiloxNoise, StartNoise
from fastdiff.ops.cpu.philox_normals import signed


class StepNoise(NamedTuple):
    """The draws of S steps, given or to be made by the loop: the last four arguments of its op.

    given    [up to S, R, D] float32, the draw of step i at place i; None where no step draws, or Philox does
    seed     signed, 64 bits, or a tensor [1] int64
    row_key  [R] int64, sample [R] int64: see `fastdiff.ops.philox_normals`
    """

    given: Tensor | None
    seed: int | Tensor
    row_key: Tensor | None
    sample: Tensor | None

    def on_host(self) -> StepNoise:
        """With the seed as an int, as C++ takes it."""
        return self._replace(seed=signed(self.seed)) if isinstance(self.seed, Tensor) else self


def step_noise(noise: Noise, coef: Tensor, first: int = 0) -> StepNoise:
    """What the steps of `coef` `[S, 3]` from number `first` on need of `noise`: draws 1 + first, 2 + first, ...

    Other kinds than given and Philox are drawn here, in the order of the steps; x_T comes before them.
    """
    if isinstance(noise, PhiloxNoise):  # the usual kind is asked for first
        seed = noise.seed if isinstance(noise.seed, Tensor) else signed(noise.seed)
        return StepNoise(None, seed, noise.row_key, noise.sample)
    if isinstance(noise, StartNoise):
        return step_noise(noise.rest, coef, first)
    steps = coef[first:, 2].nonzero().flatten().tolist()
    if not steps:
        return StepNoise(None, 0, None, None)
    if isinstance(noise, GivenNoise):
        return StepNoise(noise.noise[1 + first :], 0, None, None)
    draws = {step: noise.draw(1 + first + step) for step in steps}
    unread = draws[steps[0]]
    given = torch.stack([draws.get(step, unread) for step in range(steps[-1] + 1)])
    return StepNoise(given, 0, None, None)
