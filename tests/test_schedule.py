"""Schedules: each family in its author's own arithmetic."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.published.dreamrec import beta_table
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import BETA_FAMILIES, Schedule, ScheduleConfig

LENGTHS = (2, 10, 20, 32, 200, 1000, 2000)


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("family", ["linear", "exp", "cosine", "sqrt"])
def test_dreamrec_families_equal_its_float32_arithmetic_bit_for_bit(family, steps):
    schedule = ScheduleConfig(family, steps, arithmetic="float32").build()
    betas = beta_table(family, steps, 1e-4, 0.02)
    alphas = 1.0 - betas
    abar = torch.cumprod(alphas, dim=0)
    abar_prev = F.pad(abar[:-1], (1, 0), value=1.0)

    assert schedule.betas.dtype == torch.float32
    assert torch.equal(schedule.betas, betas)
    assert torch.equal(schedule.alphas_cumprod, abar)
    assert torch.equal(schedule.posterior_mean_coef1, betas * torch.sqrt(abar_prev) / (1.0 - abar))
    assert torch.equal(schedule.posterior_mean_coef2, (1.0 - abar_prev) * torch.sqrt(alphas) / (1.0 - abar))
    assert torch.equal(schedule.posterior_variance, betas * (1.0 - abar_prev) / (1.0 - abar))


def test_float32_arithmetic_leaves_its_mark_on_the_last_step():
    """posterior_mean_coef1 at t = 0 is 1 in exact arithmetic."""
    for family, expected in (("linear", 0.999834), ("cosine", 0.999834), ("exp", 1.0)):
        rounded = ScheduleConfig(family, 1000, arithmetic="float32").build().posterior_mean_coef1[0]
        assert float(rounded) == pytest.approx(expected, abs=1e-6)
        exact = ScheduleConfig(family, 1000, arithmetic="float64").build().posterior_mean_coef1[0]
        assert float(exact) == pytest.approx(1.0, abs=1e-11)


def adrec_betas(family: str, steps: int) -> np.ndarray:
    """ADRec's families written out, in float64 (its "linear" has ends that scale with 1 / T)."""
    scale = 1000 / steps
    if family == "linear":
        return torch.linspace(scale * 0.0001, scale * 0.02, steps, dtype=torch.float64).numpy()
    if family == "trunc_lin":
        first, last = scale * 0.0001 + 0.01, scale * 0.02 + 0.01
        return np.linspace(first, last if last <= 1 else scale * 0.001 + 0.01, steps)
    if family == "pw_lin":
        down = np.linspace(scale * 0.0001 + 0.01, scale * 0.0001, 10)
        return np.concatenate([down, np.linspace(scale * 0.0001, scale * 0.02, steps - 10)])
    alpha_bar = {
        "cosine_alpha_bar": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
        "sqrt": lambda t: 1 - math.sqrt(t + 0.0001),
        "trunc_cos": lambda t: math.cos((t + 0.1) / 1.1 * math.pi / 2) ** 2,
    }[family]
    betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]
    if family == "trunc_cos":
        betas = [min(1 - alpha_bar(0), 0.999), *betas[:-1]]
    return np.array(betas)


@pytest.mark.parametrize("steps", [20, 32, 100, 1000])
@pytest.mark.parametrize("family", ["linear", "cosine_alpha_bar", "sqrt", "trunc_cos", "trunc_lin", "pw_lin"])
def test_adrec_families_equal_its_float64_arithmetic(family, steps):
    scale = 1000 / steps
    ends = {"beta_start": scale * 0.0001, "beta_end": scale * 0.02} if family == "linear" else {}
    schedule = ScheduleConfig(family, steps, **ends).build()
    betas = adrec_betas(family, steps)
    abar = np.cumprod(1.0 - betas)
    abar_prev = np.append(1.0, abar[:-1])
    for ours, theirs in (
        (schedule.betas, betas),
        (schedule.alphas_cumprod, abar),
        (schedule.posterior_mean_coef1, betas * np.sqrt(abar_prev) / (1.0 - abar)),
        (schedule.posterior_mean_coef2, (1.0 - abar_prev) * np.sqrt(1.0 - betas) / (1.0 - abar)),
        (schedule.posterior_variance, betas * (1.0 - abar_prev) / (1.0 - abar)),
    ):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-13, atol=0)


def test_adrec_default_has_the_published_ends():
    schedule = ScheduleConfig("trunc_lin", 32).build()
    assert schedule.betas[0].item() == pytest.approx(0.013125)
    assert schedule.betas[-1].item() == pytest.approx(0.635)
    assert schedule.alphas_cumprod[0].item() == pytest.approx(0.986875)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(9.9e-7, rel=1e-2)
    short = ScheduleConfig("trunc_lin", 15).build()  # an end above 1 falls back to scale * 0.001 + 0.01
    assert short.betas[-1].item() == pytest.approx(1000 / 15 * 0.001 + 0.01)


def test_beta_family_inverts_the_beta_distribution():
    stats = pytest.importorskip("scipy.stats")
    schedule = ScheduleConfig("beta", 30, beta_a=0.4, beta_b=3.0).build()
    grid = torch.arange(1, 31, dtype=torch.float64) / 30
    np.testing.assert_allclose(
        stats.beta.cdf(schedule.alphas_cumprod[:-1].numpy(), 0.4, 3.0), (1 - grid[:-1]).numpy(), rtol=1e-9
    )
    assert schedule.betas[-1] == 1


@pytest.mark.parametrize(
    ("dataset", "steps", "beta_end", "abar_end", "sigma_0"),
    [("Office", 20, 0.04, 0.66, 0.009781), ("Beauty", 30, 0.002, 0.97, 0.007896),
     ("Tools", 20, 0.08, 0.44, 0.009886), ("Toys", 25, 0.002, 0.97, 0.008011)],
)  # fmt: skip
def test_cddrec_draws_its_grid_in_float32_and_goes_on_in_float64(dataset, steps, beta_end, abar_end, sigma_0):
    schedule = ScheduleConfig("linear", steps, beta_end=beta_end, linspace_dtype="float32").build()
    betas = torch.linspace(1e-4, beta_end, steps).double()
    assert schedule.betas.dtype == torch.float64
    assert torch.equal(schedule.betas, betas)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(abar_end, abs=0.01)
    assert math.sqrt(float(schedule.posterior_variance[1].float())) == pytest.approx(sigma_0, abs=6e-7)


@pytest.mark.parametrize("family", sorted(set(BETA_FAMILIES) - {"beta"}))
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_every_family_is_a_schedule(family, arithmetic):
    schedule = ScheduleConfig(family, 40, arithmetic=arithmetic).build()
    assert schedule.num_train_timesteps == 40
    assert schedule.posterior_variance.dtype == getattr(torch, arithmetic)
    assert bool(((schedule.betas > 0) & (schedule.betas <= 1)).all())
    assert bool((schedule.alphas_cumprod[1:] < schedule.alphas_cumprod[:-1]).all())
    assert schedule.posterior_variance[0] == 0
    assert schedule.alphas_cumprod_prev[0] == 1


def test_explicit_betas_are_taken_as_they_are():
    betas = (0.1, 0.25, 1.0)
    assert ScheduleConfig("explicit", 3, betas=betas).build().betas.tolist() == list(betas)


def test_a_config_survives_the_way_to_json_and_back():
    for config in (
        ScheduleConfig("linear", 20, beta_end=0.04, linspace_dtype="float32"),
        ScheduleConfig("exp", 500, arithmetic="float32", beta_max=8.0),
        ScheduleConfig("explicit", 2, betas=(0.5, 0.25)),
    ):
        assert ScheduleConfig(**config.to_dict()) == config
    assert ScheduleConfig("exp", 500).to_dict() == {
        "family": "exp", "num_train_timesteps": 500, "arithmetic": "float64",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "quadratic"}, r"unknown family 'quadratic'; known families: beta, cosine.*explicit"),
        ({"num_train_timesteps": 0}, r"num_train_timesteps must be an int of at least 1 \(got 0\)"),
        ({"num_train_timesteps": 2.5}, r"num_train_timesteps must be an int of at least 1 \(got 2.5\)"),
        ({"arithmetic": "float16"}, r"arithmetic must be 'float32' or 'float64' \(got 'float16'\)"),
        ({"linspace_dtype": "int"}, r"linspace_dtype must be 'float32' or 'float64' \(got 'int'\)"),
        ({"family": "explicit", "num_train_timesteps": 3}, r"needs 3 betas.*\(got none\)"),
        ({"family": "explicit", "num_train_timesteps": 3, "betas": (0.1,)}, r"needs 3 betas.*\(got 1\)"),
    ],
)
def test_settings_that_make_no_schedule_are_named(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        ScheduleConfig(**settings)


def test_betas_outside_their_range_are_named():
    with pytest.raises(InvalidArgument, match=r"every beta must lie in \(0, 1\] \(got 1\.5\)"):
        ScheduleConfig("linear", 2, beta_start=0.1, beta_end=1.5).build()
    with pytest.raises(InvalidArgument, match="1-D floating tensor"):
        Schedule(torch.ones(2, 2))
    with pytest.raises(InvalidArgument, match="at least 10 training timesteps"):
        ScheduleConfig("pw_lin", 9).build()
