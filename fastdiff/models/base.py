"""The protocol of a model: encode, prepare, denoise, sample, readout. The engine knows nothing else about it.

    histories -> encode -> Condition -> prepare(plan) -> State -> sample(noise) -> x_0 -> readout -> query

encode is run once per batch; prepare computes everything that is constant over the steps of a plan; denoise is one
step; sample runs all of them. Axis letters: B users, L history, D hidden, S steps, R = B x samples rows, N items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from fastdiff import plan as plans
from fastdiff.closed_form import AffineDenoiser
from fastdiff.config import ModelConfig
from fastdiff.errors import InvalidArgument
from fastdiff.noise import Noise
from fastdiff.ops.backend import BoundOp, Op
from fastdiff.ops.philox_normals import philox_normals
from fastdiff.ops.sampler_step import sampler_step
from fastdiff.plan import StepPlan
from fastdiff.schedule import Schedule

Weights = dict[str, Tensor]
OnStep = Callable[[int, int, Tensor], Tensor | None]
"""Called after each step with (step index, timestep, x [R, D]); a tensor that it returns takes the place of x."""


@dataclass(frozen=True)
class Histories:
    """The histories of a batch as the model sees them: cut to the window, oldest item first.

    items    [B, n] int64 rows of the item table, left-aligned whatever the model's own pad side; n is at
             least the longest history of the batch (it may be 0). Beyond a row's length stands the model's pad row.
    lengths  [B] int64, 0 for a cold user
    """

    items: Tensor
    lengths: Tensor

    @property
    def batch_size(self) -> int:
        return self.items.shape[0]


ConditionT = TypeVar("ConditionT")
StateT = TypeVar("StateT")


class Model(ABC, Generic[ConditionT, StateT]):
    """A trained model: a config, its weights under the authors' own parameter names, and the five methods.

    Weights are on one device and of one floating dtype; a model never changes them. Work that depends on weights only
    (pad vectors, folded matrices) is done in `__init__`.
    """

    ops: ClassVar[tuple[Op, ...]] = (sampler_step, philox_normals)
    """The ops that a call of the model runs, `philox_normals` for its noise among them; the engine binds them once and
    hands them over in `bound`."""

    item_table_key: ClassVar[str]
    """The name of the item table `[n_rows, D]` among the weights."""

    def __init__(self, config: ModelConfig, weights: Weights, bound: dict[str, BoundOp] | None = None) -> None:
        self.config = config
        self.weights = weights
        self.schedule: Schedule = config.schedule.build()
        self.bound = bound if bound is not None else {op.name: op.bind("torch", self.device) for op in self.ops}

    # --- what the checkpoint loader asks ------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def weight_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter that a checkpoint of this config must hold."""

    @classmethod
    def unused_weights(cls) -> tuple[str, ...]:
        """Prefixes of parameters in the authors' checkpoints that inference never reads; conversion drops them."""
        return ()

    # --- the protocol -------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, histories: Histories, item_table: Tensor) -> ConditionT:
        """What the histories say, once per batch.

        item_table  [at least n_rows, D]: the model's own table, or one that goes on with items added to the catalogue
        """

    @abstractmethod
    def prepare(self, condition: ConditionT, plan: StepPlan, guidance_scale: float) -> StateT:
        """Everything that is constant over the steps of `plan`, for B rows."""

    @abstractmethod
    def repeat(self, state: StateT, num_samples: int) -> StateT:
        """The state for R = B x num_samples rows: each user's row `num_samples` times in a row."""

    @abstractmethod
    def denoise(self, x_t: Tensor, step: int, state: StateT) -> Tensor:
        """The model's output `[R, D]`, guidance included, at step number `step` of the plan (no timestep)."""

    def sample(self, state: StateT, plan: StepPlan, noise: Noise, on_step: OnStep | None = None) -> Tensor:
        """x_0 `[R, D]`. Models with a loop op call that where `on_step` is None."""
        return self.run_steps(self.start(noise), state, plan, noise, on_step)

    def run_steps(
        self, x_t: Tensor, state: StateT, plan: StepPlan, noise: Noise, on_step: OnStep | None = None, first: int = 0
    ) -> Tensor:
        """The loop written out, from step number `first` on."""
        step_op = self.bound["sampler_step"]
        for i, (c_out, c_xt, c_noise) in enumerate(plan.coef.tolist()[first:], start=first):
            x_t = self.before_step(x_t)
            draw = noise.draw(1 + i) if c_noise else None
            x_t = step_op(self.denoise(x_t, i, state), x_t, draw, c_out, c_xt, c_noise, plan.normalize)
            if on_step is not None:
                x_t = _after_step(on_step, i, plan, x_t)
        return x_t

    def before_step(self, x_t: Tensor) -> Tensor:
        """What is done to x before each step, apart from the plan."""
        return x_t

    def start(self, noise: Noise) -> Tensor:
        """x_T `[R, D]`."""
        return noise.draw(0)

    def readout(self, x_0: Tensor) -> Tensor:
        """The query `[R, D]` that is scored against the catalogue."""
        return x_0

    # --- plans and the closed form ------------------------------------------------------------------------------------

    def plan(
        self,
        scheduler: str,
        num_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float = 0.0,
        spacing: str = "trailing",
    ) -> StepPlan:
        """The table of a named sampler under this model's prediction type, variance and normalisation."""
        config = self.config
        if scheduler == "one_step":
            return self.one_step_plan()
        if scheduler == "ddim" and config.prediction_type == "prev_mean":
            raise InvalidArgument(
                f"generate: eta and scheduler='ddim' need a prediction of x_start, epsilon or v, and this "
                f"{config.method} model predicts the mean of x_prev; use 'one_step' or 'ddpm'"
            )
        if timesteps is None and num_steps is not None and num_steps != self.schedule.num_train_timesteps:
            timesteps = plans.spaced_timesteps(self.schedule.num_train_timesteps, num_steps, spacing)
        if scheduler == "ddpm":
            return plans.ddpm(
                self.schedule,
                timesteps,
                config.prediction_type,
                config.variance_type,
                config.noise_at_last_step,
                self.normalizes,
            )
        if scheduler == "ddim":
            return plans.ddim(self.schedule, timesteps, eta, config.prediction_type, self.normalizes)
        raise InvalidArgument(f"generate: unknown scheduler {scheduler!r}; known: ddpm, ddim, one_step, closed_form")

    def timesteps_of(self, plan: StepPlan, lowest: int, highest: int) -> Tensor:
        """The plan's timesteps `[S]` on the model's device; raises where the denoiser was not made for one of them."""
        if bool(((plan.timesteps < lowest) | (plan.timesteps > highest)).any()):
            raise InvalidArgument(
                f"generate: the plan's timesteps must lie in {lowest}..{highest}, what this {self.config.method} model "
                f"can be fed (got {plan.timesteps.tolist()}); make the plan from the model's own schedule"
            )
        return plan.timesteps.to(self.device)

    def one_step_plan(self) -> StepPlan:
        return plans.one_step(self.schedule, None, self.normalizes)

    @property
    def uses_start(self) -> bool:
        """Whether x_T can reach the result."""
        return True

    @property
    def normalizes(self) -> bool:
        """Whether x is put back on the unit sphere after every step."""
        return False

    def affine(self, state: StateT, plan: StepPlan) -> AffineDenoiser | None:
        """The denoiser as output = w_x x_t + cond + time[i], where it is one (guidance folded in); else None."""
        return None

    # --- facts --------------------------------------------------------------------------------------------------------

    @cached_property
    def item_table(self) -> Tensor:
        """[n_rows, D], special rows included."""
        return self.weights[self.item_table_key]

    @cached_property
    def device(self) -> torch.device:
        return self.item_table.device

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.item_table.dtype


def _after_step(on_step: OnStep, step: int, plan: StepPlan, x_t: Tensor) -> Tensor:
    """x after the caller's step function has seen it, and perhaps replaced it."""
    replaced = on_step(step, int(plan.timesteps[step]), x_t)
    if replaced is None:
        return x_t
    if not isinstance(replaced, Tensor) or replaced.shape != x_t.shape or replaced.dtype != x_t.dtype:
        got = f"{list(replaced.shape)} {replaced.dtype}" if isinstance(replaced, Tensor) else type(replaced).__name__
        raise InvalidArgument(
            f"generate: callback_on_step_end must return None or a tensor {list(x_t.shape)} of {x_t.dtype} (got {got})"
        )
    return replaced
