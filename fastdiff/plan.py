"""Samplers as tables: every sampler of these models is one affine update per step.

    x_prev = c_out * model_output + c_xt * x_t + c_noise * noise        (then L2-normalised, for models on the sphere)

A `StepPlan` holds what the denoiser is fed (`timesteps [S]`) and the three numbers per step (`coef [S, 3]`); the
builders below are pure functions of a `Schedule`. An author's quirk is a row of the table, not a branch in a loop.

Prediction types (what the network's output means; `abar` is `alphas_cumprod[t]`), each turned into x_start:

    sample        x_start = output
    epsilon       x_start = (x_t - sqrt(1 - abar) output) / sqrt(abar)
    v_prediction  x_start = sqrt(abar) x_t - sqrt(1 - abar) output            (Salimans & Ho 2022)
    prev_mean     the output is the mean of x_prev itself
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import Schedule

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction", "prev_mean")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "fixed_small_clipped")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class StepPlan:
    """What a sampler does, step by step.

    timesteps  [S] int64, what the denoiser is fed at each step (an index of the training chain; TDM feeds T itself)
    coef       [S, 3] float64, columns c_out, c_xt, c_noise; values computed in the schedule's own arithmetic
    normalize  L2-normalise x after every update (models on the sphere)
    name       how the plan was made; shown in reports
    """

    timesteps: Tensor
    coef: Tensor
    normalize: bool = False
    name: str = "custom"

    def __post_init__(self) -> None:
        timesteps, coef = self.timesteps, self.coef
        if timesteps.ndim != 1 or timesteps.is_floating_point() or timesteps.numel() == 0:
            raise InvalidArgument(
                "StepPlan: timesteps must be a non-empty 1-D integer tensor "
                f"(got shape {tuple(timesteps.shape)}, {timesteps.dtype})"
            )
        if tuple(coef.shape) != (timesteps.shape[0], 3) or not coef.is_floating_point():
            raise InvalidArgument(
                f"StepPlan: coef must be a floating tensor [S, 3] = [{timesteps.shape[0]}, 3], columns c_out, c_xt, "
                f"c_noise (got shape {tuple(coef.shape)}, {coef.dtype})"
            )
        if not bool(torch.isfinite(coef).all()):
            row = int((~torch.isfinite(coef)).any(dim=1).nonzero()[0])
            raise InvalidArgument(f"StepPlan: coef[{row}] is not finite (got {coef[row].tolist()})")
        object.__setattr__(self, "timesteps", timesteps.to(torch.int64))
        object.__setattr__(self, "coef", coef.to(torch.float64))

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def draws_noise(self) -> Tensor:
        """[S] bool: the steps at which noise has a non-zero factor."""
        return self.coef[:, 2] != 0

    @property
    def uses_start(self) -> bool:
        """Whether x_T can reach the result through the plan itself (the denoiser may use it too)."""
        return bool((self.coef[:, 1] != 0).all())


# --- builders ---------------------------------------------------------------------------------------------------------


def ddpm(
    schedule: Schedule,
    timesteps: Sequence[int] | Tensor | None = None,
    prediction_type: str = "sample",
    variance_type: str = "fixed_small",
    noise_at_last_step: bool = False,
    normalize: bool = False,
) -> StepPlan:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2): x_prev ~ N(c_1 x_start + c_2 x_t, sigma_t^2 I).

    timesteps           the steps to run, descending; None runs all of T-1 .. 0. On a subset, the posterior of the
                        strided chain is used: alpha = abar_t / abar_{t_prev} (Nichol & Dhariwal 2021, sec. 4)
    variance_type       "fixed_small": sigma^2 = posterior variance; "fixed_large": sigma^2 = beta_t;
                        "fixed_small_clipped": the posterior variance, whose entry at t = 0 is the one at t = 1, taken
                        through float32 as CDDRec's code does
    noise_at_last_step  CDDRec adds noise at t = 0 as well; all others return the mean there
    """
    _check_choice("ddpm", "prediction_type", prediction_type, PREDICTION_TYPES)
    _check_choice("ddpm", "variance_type", variance_type, VARIANCE_TYPES)
    steps = _check_timesteps("ddpm", timesteps, schedule.num_train_timesteps)
    rows = []
    for i, t in enumerate(steps):
        last = i == len(steps) - 1
        t_prev = -1 if last else steps[i + 1]
        beta, alpha, abar, abar_prev = _transition(schedule, t, t_prev)
        if t_prev == t - 1:  # the tables as the authors hold them, bit for bit
            mean_start, mean_xt = schedule.posterior_mean_coef1[t], schedule.posterior_mean_coef2[t]
            variance = schedule.posterior_variance[t]
        else:
            mean_start = beta * torch.sqrt(abar_prev) / (1.0 - abar)
            mean_xt = (1.0 - abar_prev) * torch.sqrt(alpha) / (1.0 - abar)
            variance = beta * (1.0 - abar_prev) / (1.0 - abar)
        if variance_type == "fixed_large":
            variance = beta
        elif variance_type == "fixed_small_clipped" and t == 0 and schedule.num_train_timesteps > 1:
            variance = schedule.posterior_variance[1].to(torch.float32).to(schedule.betas.dtype)
        sigma = torch.sqrt(variance) if noise_at_last_step or not last else torch.zeros_like(variance)
        rows.append(_as_row(prediction_type, mean_start, mean_xt, sigma, abar))
    return StepPlan(torch.tensor(steps), torch.stack(rows), normalize, f"ddpm-{len(steps)}")


def ddim(
    schedule: Schedule,
    timesteps: Sequence[int] | Tensor | None = None,
    eta: float = 0.0,
    prediction_type: str = "sample",
    normalize: bool = False,
) -> StepPlan:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic at eta = 0, ancestral at eta = 1. Any other eta
    is refused: beyond 1, sigma^2 may be more than the 1 - abar_prev that there is.

        x_prev = sqrt(abar_prev) x_start + sqrt(1 - abar_prev - sigma^2) epsilon + sigma noise
        sigma  = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)

    timesteps  the steps to run, descending, any spacing (`spaced_timesteps` makes the usual ones); None runs all
    """
    _check_choice("ddim", "prediction_type", prediction_type, PREDICTION_TYPES[:3])
    if not (isinstance(eta, (int, float)) and 0 <= eta <= 1):  # NaN neither
        raise InvalidArgument(f"ddim: eta must be a number from 0, deterministic, to 1, as DDPM (got {eta!r})")
    steps = _check_timesteps("ddim", timesteps, schedule.num_train_timesteps)
    rows = []
    for i, t in enumerate(steps):
        t_prev = -1 if i == len(steps) - 1 else steps[i + 1]
        beta, _, abar, abar_prev = _transition(schedule, t, t_prev)
        variance = (1.0 - abar_prev) / (1.0 - abar) * beta
        sigma = eta * torch.sqrt(variance)
        direction = torch.sqrt(torch.clamp(1.0 - abar_prev - sigma**2, min=0.0))  # at eta = 1 rounding may go below
        mean_xt = direction / torch.sqrt(1.0 - abar)
        mean_start = torch.sqrt(abar_prev) - mean_xt * torch.sqrt(abar)
        rows.append(_as_row(prediction_type, mean_start, mean_xt, sigma, abar))
    return StepPlan(torch.tensor(steps), torch.stack(rows), normalize, f"ddim-{len(steps)}-eta{eta:g}")


def one_step(schedule: Schedule, timestep: int | None = None, normalize: bool = False) -> StepPlan:
    """x_start = f(x_T, T), once (TA-Rec, Algorithm 3). `timestep` is the index fed to the denoiser; None is T-1."""
    t = schedule.num_train_timesteps - 1 if timestep is None else timestep
    if not isinstance(t, int) or isinstance(t, bool) or t < 0:
        raise InvalidArgument(f"one_step: timestep must be an int of at least 0 (got {timestep!r})")
    return StepPlan(torch.tensor([t]), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), normalize, "one_step")


def shifted_ddim(schedule: Schedule, stride: int, noise: str = "none") -> StepPlan:
    """The few-step grid of TDM and PreferDiff: 0, s, 2s, .., T, with coefficients one index left of the timesteps.

    Grid point g uses alphas_cumprod[g - 1] (the first one alphas_cumprod[0]) while the denoiser gets t = g, so also
    t = T, one past the chain. `noise` is "none" (PreferDiff) or "posterior_by_grid_index" (TDM adds noise with
    sqrt(posterior_variance[n]) at the n-th grid point, n counting grid points, not timesteps).
    """
    _check_choice("shifted_ddim", "noise", noise, ("none", "posterior_by_grid_index"))
    total = schedule.num_train_timesteps
    if not isinstance(stride, int) or isinstance(stride, bool) or not 1 <= stride <= total:
        raise InvalidArgument(f"shifted_ddim: stride must be an int in 1..{total} (got {stride!r})")
    grid = list(range(0, total + 1, stride))
    if noise == "posterior_by_grid_index" and len(grid) > total:
        raise InvalidArgument(
            f"shifted_ddim: noise 'posterior_by_grid_index' needs a stride of at least 2 (got {stride}): the last of "
            f"the {len(grid)} grid points would read entry {len(grid) - 1} of a table that ends at {total - 1}"
        )
    index = [0] + [point - 1 for point in grid[1:]]
    abar = schedule.alphas_cumprod[index]
    abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
    mean_start = torch.sqrt(abar_prev) - torch.sqrt(1.0 - abar_prev) / torch.sqrt(1.0 / abar - 1)
    mean_xt = torch.sqrt(1.0 - abar_prev) / torch.sqrt(1.0 - abar)
    sigma = torch.zeros_like(abar)
    if noise == "posterior_by_grid_index":
        sigma[1:] = torch.sqrt(schedule.posterior_variance[1 : len(grid)])
    coef = torch.stack([mean_start, mean_xt, sigma], dim=1).flip(0)
    return StepPlan(torch.tensor(grid[::-1]), coef, name=f"shifted_ddim-{len(grid)}")


def spaced_timesteps(num_train_timesteps: int, num_steps: int, spacing: str = "trailing") -> list[int]:
    """`num_steps` of the T training timesteps, descending.

    leading   0, r, 2r, .. with r = T // S        trailing  T-1, T-1-r, .. with r = T / S, rounded
    linspace  an even grid from T-1 to 0, both ends in it (a single step takes T-1)
    """
    _check_choice("spaced_timesteps", "spacing", spacing, TIMESTEP_SPACINGS)
    total = num_train_timesteps
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or not 1 <= num_steps <= total:
        raise InvalidArgument(
            f"generate: num_inference_steps must be an int in 1..{total}, the length of the training chain "
            f"(got {num_steps!r})"
        )
    if spacing == "leading":
        return [i * (total // num_steps) for i in range(num_steps)][::-1]
    if spacing == "trailing":
        return [round(total - i * total / num_steps) - 1 for i in range(num_steps)]
    if num_steps == 1:
        return [total - 1]
    return [round((total - 1) * i / (num_steps - 1)) for i in range(num_steps)][::-1]


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _transition(schedule: Schedule, t: int, t_prev: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """beta, alpha, abar, abar_prev of the step t -> t_prev (t_prev = -1 is clean) in the schedule's arithmetic."""
    abar = schedule.alphas_cumprod[t]
    if t_prev == t - 1:
        return schedule.betas[t], schedule.alphas[t], abar, schedule.alphas_cumprod_prev[t]
    abar_prev = schedule.alphas_cumprod[t_prev] if t_prev >= 0 else torch.ones_like(abar)
    alpha = abar / abar_prev
    return 1.0 - alpha, alpha, abar, abar_prev


def _as_row(prediction_type: str, mean_start: Tensor, mean_xt: Tensor, sigma: Tensor, abar: Tensor) -> Tensor:
    """Fold the prediction type into (c_out, c_xt, c_noise), given factors of x_start and x_t."""
    if prediction_type == "sample":
        c_out, c_xt = mean_start, mean_xt
    elif prediction_type == "epsilon":
        c_out = -mean_start * torch.sqrt(1.0 - abar) / torch.sqrt(abar)
        c_xt = mean_xt + mean_start / torch.sqrt(abar)
    elif prediction_type == "v_prediction":
        c_out = -mean_start * torch.sqrt(1.0 - abar)
        c_xt = mean_xt + mean_start * torch.sqrt(abar)
    else:  # prev_mean
        c_out, c_xt = torch.ones_like(mean_start), torch.zeros_like(mean_xt)
    return torch.stack([c_out, c_xt, sigma]).to(torch.float64)


def _check_choice(where: str, name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise InvalidArgument(f"{where}: {name} must be one of {', '.join(accepted)} (got {value!r})")


def _check_timesteps(where: str, timesteps: Sequence[int] | Tensor | None, total: int) -> list[int]:
    if timesteps is None:
        return list(range(total))[::-1]
    values = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
    if not values or any(isinstance(t, bool) or not isinstance(t, int) for t in values):
        raise InvalidArgument(f"{where}: timesteps must be a non-empty sequence of ints (got {timesteps!r})")
    if any(not 0 <= t < total for t in values):
        raise InvalidArgument(f"{where}: timesteps must lie in 0..{total - 1}, the training chain (got {values})")
    if any(later >= earlier for earlier, later in itertools.pairwise(values)):
        raise InvalidArgument(f"{where}: timesteps must strictly descend, from noise to clean (got {values})")
    return values
