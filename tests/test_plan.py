"""Plans: tables against samplers written out as loops."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import plan as plans
from fastdiff.errors import InvalidArgument
from fastdiff.plan import StepPlan
from fastdiff.schedule import Schedule, ScheduleConfig
from tests.tolerances import AGREE, assert_agree, relative_error

SCHEDULES = {
    "linear": ScheduleConfig("linear", 12, beta_start=0.01, beta_end=0.4).build(),
    "exp": ScheduleConfig("exp", 12).build(),
    "cosine": ScheduleConfig("cosine", 12).build(),
}
TYPES = ("sample", "epsilon", "v_prediction")
descending = st.sets(st.integers(0, 11), min_size=1).map(lambda steps: sorted(steps, reverse=True))


def to_start(output: Tensor, x_t: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """x_start from what the network returns."""
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (x_t - (1 - abar).sqrt() * output) / abar.sqrt()
    return abar.sqrt() * x_t - (1 - abar).sqrt() * output


def apply(plan: StepPlan, x: Tensor, outputs: Tensor, noise: Tensor) -> Tensor:
    for i in range(plan.num_steps):
        c_out, c_xt, c_noise = plan.coef[i]
        x = c_out * outputs[i] + c_xt * x + c_noise * noise[i]
    return x


def random_run(num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    x, outputs, noise = torch.randn(1, 5), torch.randn(num_steps, 1, 5), torch.randn(num_steps, 1, 5)
    return x.double(), outputs.double(), noise.double()


# --- DDPM -------------------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    timesteps=st.none() | descending,
    prediction_type=st.sampled_from(TYPES),
    variance_type=st.sampled_from(["fixed_small", "fixed_large"]),
    noise_at_last_step=st.booleans(),
)
def test_ddpm_is_the_posterior_of_the_steps_that_are_run(
    name, timesteps, prediction_type, variance_type, noise_at_last_step
):
    schedule = SCHEDULES[name]
    plan = plans.ddpm(schedule, timesteps, prediction_type, variance_type, noise_at_last_step)
    steps = list(range(12))[::-1] if timesteps is None else timesteps
    assert plan.timesteps.tolist() == steps

    abar = torch.cumprod(1 - schedule.betas, 0)
    inputs = x, outputs, noise = random_run(len(steps))
    for i, t in enumerate(steps):
        last = i == len(steps) - 1
        abar_prev = torch.tensor(1.0).double() if last else abar[steps[i + 1]]
        alpha = abar[t] / abar_prev
        x_start = to_start(outputs[i], x, abar[t], prediction_type)
        # q(x_prev | x_t, x_start) by Bayes' rule on q(x_t | x_prev) q(x_prev | x_start)
        precision = alpha / (1 - alpha) + 1 / (1 - abar_prev) if not last else torch.tensor(math.inf).double()
        mean = x_start if last else (
            x * alpha.sqrt() / (1 - alpha) + x_start * abar_prev.sqrt() / (1 - abar_prev)
        ) / precision  # fmt: skip
        variance = 1 / precision if variance_type == "fixed_small" else 1 - alpha
        x = mean + (variance.sqrt() * noise[i] if noise_at_last_step or not last else 0)
    assert_agree(apply(plan, *inputs), x, torch.float64)


def test_ddpm_over_the_whole_chain_holds_the_authors_tables_bit_for_bit():
    schedule = ScheduleConfig("linear", 500, arithmetic="float32").build()
    plan = plans.ddpm(schedule)
    table = plan.coef.flip(0)
    assert torch.equal(table[:, 0], schedule.posterior_mean_coef1.double())
    assert torch.equal(table[:, 1], schedule.posterior_mean_coef2.double())
    assert torch.equal(table[1:, 2], schedule.posterior_variance.sqrt()[1:].double())
    assert table[0, 2] == 0
    assert plan.draws_noise.tolist() == [True] * 499 + [False]
    assert not plan.uses_start  # posterior_mean_coef2 is 0 at t = 0


def test_adrec_takes_the_square_root_of_beta_for_sigma():
    schedule = ScheduleConfig("trunc_lin", 32).build()
    plan = plans.ddpm(schedule, variance_type="fixed_large")
    sigma = plan.coef[:, 2].flip(0)
    assert_agree(sigma[1:], schedule.betas.sqrt()[1:], torch.float64)
    assert sigma[0] == 0
    assert sigma[1].item() == pytest.approx(0.182, abs=5e-4)
    # what its code computes: exp(log(variance) / 2)
    assert_agree(sigma[1:], torch.exp(0.5 * torch.log(schedule.betas))[1:], torch.float64)


@pytest.mark.parametrize(
    ("dataset", "steps", "beta_end", "sigma_0"),
    [("Office", 20, 0.04, 0.009781), ("Beauty", 30, 0.002, 0.007896),
     ("Tools", 20, 0.08, 0.009886), ("Toys", 25, 0.002, 0.008011)],
)  # fmt: skip
def test_cddrec_returns_the_mean_itself_and_adds_noise_at_the_last_step(dataset, steps, beta_end, sigma_0):
    schedule = ScheduleConfig("linear", steps, beta_end=beta_end, linspace_dtype="float32").build()
    plan = plans.ddpm(schedule, [0], "prev_mean", "fixed_small_clipped", noise_at_last_step=True)
    variance = torch.cat([schedule.posterior_variance[1:2].float(), schedule.posterior_variance[1:]])
    assert plan.coef[0, :2].tolist() == [1.0, 0.0]
    assert plan.coef[0, 2].item() == pytest.approx(sigma_0, abs=6e-7)
    assert_agree(plan.coef[0, 2], torch.exp(0.5 * torch.log(variance))[0], torch.float64)
    whole = plans.ddpm(schedule, None, "prev_mean", "fixed_small_clipped", noise_at_last_step=True)
    assert_agree(whole.coef[:, 2].flip(0), torch.exp(0.5 * torch.log(variance)), torch.float64)


# --- DDIM -------------------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    timesteps=st.none() | descending,
    prediction_type=st.sampled_from(TYPES),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_ddim_is_equation_12(name, timesteps, prediction_type, eta):
    schedule = SCHEDULES[name]
    plan = plans.ddim(schedule, timesteps, eta, prediction_type)
    steps = list(range(12))[::-1] if timesteps is None else timesteps
    abar = torch.cumprod(1 - schedule.betas, 0)
    inputs = x, outputs, noise = random_run(len(steps))
    for i, t in enumerate(steps):
        abar_prev = abar[steps[i + 1]] if i + 1 < len(steps) else torch.tensor(1.0).double()
        x_start = to_start(outputs[i], x, abar[t], prediction_type)
        epsilon = (x - abar[t].sqrt() * x_start) / (1 - abar[t]).sqrt()
        sigma = eta * ((1 - abar_prev) / (1 - abar[t])).sqrt() * (1 - abar[t] / abar_prev).sqrt()
        x = abar_prev.sqrt() * x_start + (1 - abar_prev - sigma**2).sqrt() * epsilon + sigma * noise[i]
    assert_agree(apply(plan, *inputs), x, torch.float64)
    if eta == 0:
        assert not plan.draws_noise.any()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("timesteps", [None, [11, 7, 6, 2], [5]])
def test_ddim_with_eta_one_is_ddpm(name, prediction_type, timesteps):
    ancestral = plans.ddpm(SCHEDULES[name], timesteps, prediction_type)
    implicit = plans.ddim(SCHEDULES[name], timesteps, 1.0, prediction_type)
    assert torch.equal(implicit.timesteps, ancestral.timesteps)
    assert relative_error(implicit.coef, ancestral.coef) < AGREE[torch.float64]


# --- few steps --------------------------------------------------------------------------------------------------------


def test_one_step_returns_the_output():
    plan = plans.one_step(SCHEDULES["linear"])
    assert plan.timesteps.tolist() == [11]
    assert plan.coef.tolist() == [[1.0, 0.0, 0.0]]
    assert plans.one_step(SCHEDULES["linear"], 3).timesteps.tolist() == [3]
    assert plans.one_step(SCHEDULES["linear"], normalize=True).normalize


@pytest.mark.parametrize("stride", [2, 3, 5, 20])
@pytest.mark.parametrize("noise", ["none", "posterior_by_grid_index"])
def test_shifted_grid_equals_the_code_of_tdm_and_preferdiff_bit_for_bit(stride, noise):
    schedule = ScheduleConfig("linear", 20, arithmetic="float32", beta_end=0.3).build()
    plan = plans.shifted_ddim(schedule, stride, noise)
    grid = list(range(0, 21, stride))
    abar = schedule.alphas_cumprod[[0] + [point - 1 for point in grid[1:]]]
    x_tables = x_plan = torch.randn(3, dtype=torch.float32)
    outputs, draws = torch.randn(len(grid), 3), torch.randn(len(grid), 3)
    for i, n in enumerate(reversed(range(len(grid)))):
        # deterministic DDIM, solved for x_t and x_start as that code writes it
        prev = abar[n - 1] if n > 0 else torch.tensor(1.0)
        c_start = torch.sqrt(prev) - torch.sqrt(1.0 - prev) / torch.sqrt(1.0 / abar[n] - 1)
        x_tables = c_start * outputs[i] + torch.sqrt(1.0 - prev) / torch.sqrt(1.0 - abar[n]) * x_tables
        if noise == "posterior_by_grid_index" and n > 0:
            x_tables = x_tables + torch.sqrt(schedule.posterior_variance[n]) * draws[i]

        c_out, c_xt, c_noise = (float(c) for c in plan.coef[i])
        x_plan = c_out * outputs[i] + c_xt * x_plan
        x_plan = x_plan + c_noise * draws[i] if c_noise else x_plan
    assert plan.timesteps.tolist() == grid[::-1]
    assert torch.equal(x_plan, x_tables)


@given(total=st.integers(1, 50), spacing=st.sampled_from(plans.TIMESTEP_SPACINGS), data=st.data())
def test_spaced_timesteps_descend_within_the_chain(total, spacing, data):
    num_steps = data.draw(st.integers(1, total))
    steps = plans.spaced_timesteps(total, num_steps, spacing)
    assert len(steps) == num_steps
    assert all(0 <= t < total for t in steps)
    assert all(later < earlier for earlier, later in itertools.pairwise(steps))
    if spacing == "trailing" or (spacing == "linspace"):
        assert steps[0] == total - 1
    if spacing == "leading" or (spacing == "linspace" and num_steps > 1):
        assert steps[-1] == 0
    assert plans.spaced_timesteps(total, total, spacing) == list(range(total))[::-1]


def test_spacings_are_the_usual_ones():
    assert plans.spaced_timesteps(1000, 5, "leading") == [800, 600, 400, 200, 0]
    assert plans.spaced_timesteps(1000, 5, "trailing") == [999, 799, 599, 399, 199]
    assert plans.spaced_timesteps(1000, 5, "linspace") == [999, 749, 500, 250, 0]
    assert plans.spaced_timesteps(1000, 1) == [999]


# --- what is refused --------------------------------------------------------------------------------------------------


def build(builder: str, schedule: Schedule, **arguments) -> StepPlan:
    return getattr(plans, builder)(schedule, **arguments)


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        ("ddpm", {"timesteps": []}, r"ddpm: timesteps must be a non-empty sequence of ints \(got \[\]\)"),
        ("ddpm", {"timesteps": [3.0]}, r"ddpm: timesteps must be a non-empty sequence of ints \(got \[3.0\]\)"),
        ("ddpm", {"timesteps": [12, 3]}, r"ddpm: timesteps must lie in 0\.\.11, the training chain \(got \[12, 3\]\)"),
        ("ddpm", {"timesteps": [3, 7]}, r"ddpm: timesteps must strictly descend, from noise to clean \(got \[3, 7\]\)"),
        ("ddpm", {"prediction_type": "x0"}, r"ddpm: prediction_type must be one of sample, epsilon.* \(got 'x0'\)"),
        ("ddpm", {"variance_type": "learned"}, r"ddpm: variance_type must be one of fixed_small.* \(got 'learned'\)"),
        ("ddim", {"timesteps": [3, 3]}, r"ddim: timesteps must strictly descend"),
        ("ddim", {"eta": -0.5}, r"ddim: eta must be a number from 0, .* to 1, as DDPM \(got -0.5\)"),
        ("ddim", {"eta": 1.001}, r"ddim: eta must be a number from 0, .* to 1, as DDPM \(got 1.001\)"),
        ("ddim", {"eta": math.nan}, r"ddim: eta must be a number from 0, .* to 1, as DDPM \(got nan\)"),
        ("ddim", {"prediction_type": "prev_mean"}, r"ddim: prediction_type must be one of sample, epsilon, v_pred"),
        ("one_step", {"timestep": -1}, r"one_step: timestep must be an int of at least 0 \(got -1\)"),
        ("shifted_ddim", {"stride": 13}, r"shifted_ddim: stride must be an int in 1\.\.12 \(got 13\)"),
        ("shifted_ddim", {"stride": 2, "noise": "beta"}, r"shifted_ddim: noise must be one of none"),
        ("shifted_ddim", {"stride": 1, "noise": "posterior_by_grid_index"}, r"needs a stride of at least 2 \(got 1\)"),
    ],
)
def test_arguments_that_make_no_plan_are_named(builder, arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        build(builder, SCHEDULES["linear"], **arguments)


def test_step_counts_that_make_no_grid_are_named():
    for count in (0, 13, 2.0, True):
        with pytest.raises(InvalidArgument, match=r"num_inference_steps must be an int in 1\.\.12"):
            plans.spaced_timesteps(12, count)
    with pytest.raises(InvalidArgument, match="spacing must be one of leading, trailing, linspace"):
        plans.spaced_timesteps(12, 3, "log")


def test_tables_that_make_no_plan_are_named():
    good = StepPlan(torch.tensor([1, 0]), torch.ones(2, 3))
    assert good.coef.dtype == torch.float64
    assert good.timesteps.dtype == torch.int64
    assert good.uses_start
    for change, message in (
        ({"timesteps": torch.tensor([])}, "timesteps must be a non-empty 1-D integer tensor"),
        ({"timesteps": torch.tensor([1.0, 0.0])}, "timesteps must be a non-empty 1-D integer tensor"),
        ({"coef": torch.ones(3, 3)}, r"coef must be a floating tensor \[S, 3\] = \[2, 3\]"),
        ({"coef": torch.ones(2, 3, dtype=torch.int64)}, "coef must be a floating tensor"),
        ({"coef": torch.tensor([[1.0, 0, 0], [math.inf, 0, 0]])}, r"coef\[1\] is not finite \(got \[inf, 0.0, 0.0\]\)"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            replace(good, **change)
