"""Noise schedules: betas, and what follows from them, in the arithmetic of each author.

Forward process, for t = 0 .. T-1 (DDPM, Ho et al. 2020, eq. 2 and 4; indices here start at 0):

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    alpha_t          = 1 - beta_t
    alphas_cumprod_t = prod_{s <= t} alpha_s
    q(x_t | x_start) = N(sqrt(alphas_cumprod_t) x_start, (1 - alphas_cumprod_t) I)

and its posterior q(x_{t-1} | x_t, x_start) = N(c_1 x_start + c_2 x_t, posterior_variance_t I) (eq. 6 and 7).

The authors' codes compute these in different precisions (DreamRec and TA-Rec in float32, ADRec and CDDRec in float64),
which changes coefficients by up to 2e-4; so the arithmetic dtype is a property of a schedule, and each formula below is
evaluated in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument

ARITHMETIC = {"float32": torch.float32, "float64": torch.float64}
MAX_TRAIN_TIMESTEPS = 1_000_000
"""A thousand times what anybody trains with; more is a damaged or mistyped setting, refused before it is allocated."""


@dataclass(frozen=True)
class ScheduleConfig:
    """A named family of betas with its parameters; what `config.json` stores under `"schedule"`.

    family               one of `BETA_FAMILIES`, or "explicit" (then `betas` holds them)
    num_train_timesteps  T, the length of the training chain, 1 to 1,000,000
    arithmetic           "float32" or "float64": the dtype in which every derived quantity is computed
    beta_start, beta_end ends of "linear" (dimensionless variances)
    linspace_dtype       dtype of the linear grid where it differs from `arithmetic` (CDDRec draws it in float32)
    beta_min, beta_max   rates of "exp" (the variance-preserving SDE's beta(0) and beta(1))
    clip_min, clip_max   bounds put on each beta by "cosine" and the alpha-bar families
    beta_a, beta_b       the two shape parameters of "beta"
    betas                T explicit values, for "explicit"
    """

    family: str = "linear"
    num_train_timesteps: int = 1000
    arithmetic: str = "float64"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    linspace_dtype: str | None = None
    beta_min: float = 0.1
    beta_max: float = 10.0
    clip_min: float = 1e-4
    clip_max: float = 0.9999
    beta_a: float = 0.3
    beta_b: float = 10.0
    betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        where = "ScheduleConfig"
        if self.family not in BETA_FAMILIES and self.family != "explicit":
            known = ", ".join(sorted([*BETA_FAMILIES, "explicit"]))
            raise InvalidArgument(f"{where}: unknown family {self.family!r}; known families: {known}")
        if not isinstance(self.num_train_timesteps, int) or self.num_train_timesteps < 1:
            raise InvalidArgument(
                f"{where}: num_train_timesteps must be an int of at least 1 (got {self.num_train_timesteps!r})"
            )
        if self.num_train_timesteps > MAX_TRAIN_TIMESTEPS:
            raise InvalidArgument(
                f"{where}: num_train_timesteps must be at most {MAX_TRAIN_TIMESTEPS} (got {self.num_train_timesteps})"
            )
        for name in ("arithmetic", "linspace_dtype"):
            value = getattr(self, name)
            if value not in ARITHMETIC and not (name == "linspace_dtype" and value is None):
                raise InvalidArgument(f"{where}: {name} must be 'float32' or 'float64' (got {value!r})")
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if self.family == "explicit" and (self.betas is None or len(self.betas) != self.num_train_timesteps):
            given = "none" if self.betas is None else str(len(self.betas))
            raise InvalidArgument(
                f"{where}: family 'explicit' needs {self.num_train_timesteps} betas, one per training timestep "
                f"(got {given})"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, plus the three that always matter; ready for JSON."""
        always = {"family", "num_train_timesteps", "arithmetic"}
        defaults = {field.name: field.default for field in fields(self)}
        values = asdict(self)
        if values["betas"] is not None:
            values["betas"] = list(values["betas"])
        return {name: value for name, value in values.items() if name in always or value != defaults[name]}

    def build(self) -> Schedule:
        """Evaluate the family and wrap it as a `Schedule`."""
        dtype = ARITHMETIC[self.arithmetic]
        if self.family == "explicit":
            betas = torch.tensor(self.betas, dtype=torch.float64)
        else:
            betas = BETA_FAMILIES[self.family](self)
        return Schedule(betas.to(dtype))


@dataclass(frozen=True)
class Schedule:
    """Betas `[T]` and everything that follows from them, each `[T]` in the dtype of `betas`."""

    betas: Tensor

    def __post_init__(self) -> None:
        betas = self.betas
        if betas.ndim != 1 or not betas.is_floating_point():
            raise InvalidArgument(
                f"Schedule: betas must be a 1-D floating tensor (got shape {tuple(betas.shape)}, {betas.dtype})"
            )
        if not bool(((betas > 0) & (betas <= 1)).all()):
            worst = betas[~((betas > 0) & (betas <= 1))][0].item()
            raise InvalidArgument(
                f"Schedule: every beta must lie in (0, 1] (got {worst:g}); check the family, its ends and "
                "num_train_timesteps"
            )

    @property
    def num_train_timesteps(self) -> int:
        return self.betas.shape[0]

    @cached_property
    def alphas(self) -> Tensor:
        return 1.0 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return torch.cumprod(self.alphas, dim=0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """`alphas_cumprod` shifted by one; 1 (clean) in front."""
        return torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Factor of x_start: beta_t sqrt(alphas_cumprod_{t-1}) / (1 - alphas_cumprod_t)."""
        return self.betas * torch.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Factor of x_t: (1 - alphas_cumprod_{t-1}) sqrt(alpha_t) / (1 - alphas_cumprod_t)."""
        return (1.0 - self.alphas_cumprod_prev) * torch.sqrt(self.alphas) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta_t (1 - alphas_cumprod_{t-1}) / (1 - alphas_cumprod_t); 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)


# --- families of betas. Each returns [T]; the caller casts to the arithmetic dtype. -----------------------------------


def _linear(config: ScheduleConfig) -> Tensor:
    """An even grid from beta_start to beta_end (Ho et al. 2020)."""
    dtype = ARITHMETIC[config.linspace_dtype or config.arithmetic]
    return torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=dtype)


def _exp(config: ScheduleConfig) -> Tensor:
    """beta_t = 1 - exp(-beta_min / T - x_t (beta_max - beta_min) / (2 T^2)), x an even grid 1 .. 2 T + 1 (DreamRec)."""
    steps, low, high = config.num_train_timesteps, config.beta_min, config.beta_max
    grid = torch.linspace(1, 2 * steps + 1, steps, dtype=ARITHMETIC[config.arithmetic])
    return 1 - torch.exp(-low / steps - grid * 0.5 * (high - low) / (steps * steps))


def _cosine(config: ScheduleConfig) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, on T + 1 points, each beta clipped to [clip_min, clip_max] (DreamRec)."""
    steps, offset = config.num_train_timesteps, 0.008
    grid = torch.linspace(0, steps, steps + 1, dtype=ARITHMETIC[config.arithmetic])
    alphas_cumprod = torch.cos(((grid / steps) + offset) / (1 + offset) * torch.pi * 0.5) ** 2
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    betas = 1 - (alphas_cumprod[1:] / alphas_cumprod[:-1])
    return torch.clip(betas, config.clip_min, config.clip_max)


def _from_alpha_bar(alpha_bar: Callable[[float], float], steps: int) -> list[float]:
    """beta_i = min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) in Python floats (Nichol & Dhariwal 2021)."""
    return [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]


def _cosine_alpha_bar(config: ScheduleConfig) -> Tensor:
    """The cosine alpha-bar evaluated per step and capped at 0.999 (ADRec's "cosine")."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor(_from_alpha_bar(alpha_bar, config.num_train_timesteps), dtype=torch.float64)


def _sqrt(config: ScheduleConfig) -> Tensor:
    """alpha_bar(t) = 1 - sqrt(t + 1e-4), capped at 0.999 (Diffusion-LM; ADRec's and DreamRec's "sqrt")."""

    def alpha_bar(t: float) -> float:
        return 1 - math.sqrt(t + 0.0001)

    return torch.tensor(_from_alpha_bar(alpha_bar, config.num_train_timesteps), dtype=torch.float64)


def _trunc_cos(config: ScheduleConfig) -> Tensor:
    """A cosine alpha-bar that starts below 1: beta_0 = 1 - alpha_bar(0), then the ratios of steps 0 .. T-2 (ADRec)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.1) / 1.1 * math.pi / 2) ** 2

    ratios = _from_alpha_bar(alpha_bar, config.num_train_timesteps)[: config.num_train_timesteps - 1]
    return torch.tensor([min(1 - alpha_bar(0.0), 0.999), *ratios], dtype=torch.float64)


def _trunc_lin(config: ScheduleConfig) -> Tensor:
    """An even grid whose ends are shifted by 0.01; an end above 1 is replaced by 1/T + 0.01 (ADRec's default)."""
    scale = 1000 / config.num_train_timesteps
    start, end = scale * 0.0001 + 0.01, scale * 0.02 + 0.01
    if end > 1:
        end = scale * 0.001 + 0.01
    return torch.from_numpy(np.linspace(start, end, config.num_train_timesteps, dtype=np.float64))


def _pw_lin(config: ScheduleConfig) -> Tensor:
    """Ten steps down from scale * 1e-4 + 0.01 to scale * 1e-4, then up to scale * 0.02, scale = 1000 / T (ADRec)."""
    steps = config.num_train_timesteps
    if steps < 10:
        raise InvalidArgument(f"schedule 'pw_lin': needs at least 10 training timesteps (got {steps})")
    scale = 1000 / steps
    first = np.linspace(scale * 0.0001 + 0.01, scale * 0.0001, 10, dtype=np.float64)
    second = np.linspace(scale * 0.0001, scale * 0.02, steps - 10, dtype=np.float64)
    return torch.from_numpy(np.concatenate([first, second]))


def _beta(config: ScheduleConfig) -> Tensor:
    """alphas_cumprod(s) = the quantile function of Beta(beta_a, beta_b) at 1 - s, s an even grid of [0, 1] (ADRec)."""
    try:
        from scipy.stats import beta as beta_distribution  # only this family needs it
    except ImportError as error:
        raise InvalidArgument(
            "schedule 'beta': the quantile function of the Beta distribution comes from scipy, which is not installed; "
            "run `pip install scipy`"
        ) from error
    grid = np.linspace(0, 1, config.num_train_timesteps + 1)
    alphas_cumprod = beta_distribution.ppf(1 - grid, config.beta_a, config.beta_b)
    return torch.from_numpy(1 - alphas_cumprod[1:] / alphas_cumprod[:-1])


BETA_FAMILIES: dict[str, Callable[[ScheduleConfig], Tensor]] = {
    "linear": _linear,
    "exp": _exp,
    "cosine": _cosine,
    "cosine_alpha_bar": _cosine_alpha_bar,
    "sqrt": _sqrt,
    "trunc_cos": _trunc_cos,
    "trunc_lin": _trunc_lin,
    "pw_lin": _pw_lin,
    "beta": _beta,
}
