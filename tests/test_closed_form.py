"""The closed form: its moments against the chain's, its draws against the loop's, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

from fastdiff import plan as plans
from fastdiff.closed_form import MAX_AMPLIFICATION, collapse
from fastdiff.config import DreamRecConfig
from fastdiff.errors import InvalidArgument
from fastdiff.models.base import Histories
from fastdiff.models.dreamrec import DreamRec
from fastdiff.noise import GivenNoise, PhiloxNoise
from fastdiff.ops.denoise_mlp_loop import MLPSampler, MLPWeights, denoise_mlp_loop_ref
from fastdiff.ops.sample_affine import sample_affine_ref
from fastdiff.plan import StepPlan
from fastdiff.schedule import ScheduleConfig
from tests.tolerances import AGREE, FLOOR, assert_agree, relative_error

DIM = 6
PLANS = {
    "ddpm, exp 500": lambda: plans.ddpm(ScheduleConfig("exp", 500, "float32").build()),
    "ddpm, linear 1000": lambda: plans.ddpm(ScheduleConfig("linear", 1000, "float32").build()),
    "ddpm, cosine 1000": lambda: plans.ddpm(ScheduleConfig("cosine", 1000, "float32").build()),
    "ddpm, sqrt 50": lambda: plans.ddpm(ScheduleConfig("sqrt", 50).build()),
    "ddpm, sqrt(beta)": lambda: plans.ddpm(ScheduleConfig("trunc_lin", 32).build(), variance_type="fixed_large"),
    "ddpm, strided": lambda: plans.ddpm(ScheduleConfig("linear", 1000).build(), range(999, 0, -37)),
    "ddim": lambda: plans.ddim(ScheduleConfig("linear", 1000).build(), range(999, 0, -37)),
    "ddim, eta 0.5": lambda: plans.ddim(ScheduleConfig("exp", 100).build(), eta=0.5),
    "shifted grid": lambda: plans.shifted_ddim(ScheduleConfig("linear", 1000).build(), 100, "posterior_by_grid_index"),
    "one step": lambda: plans.one_step(ScheduleConfig("linear", 1000).build()),
}  # fmt: skip


@pytest.fixture(params=PLANS)
def plan(request) -> StepPlan:
    return PLANS[request.param]()


def denoiser(plan: StepPlan, dim: int = DIM, rows: int = 3, scale: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """w_x [D, D], cond [R, D], time [S, D] in float64."""
    w_x = torch.randn(dim, dim).double() * scale / math.sqrt(dim)
    return w_x, torch.randn(rows, dim).double(), torch.randn(plan.num_steps, dim).double() * 0.3


def run_loop(plan: StepPlan, w_x: Tensor, cond: Tensor, time: Tensor, noise: Tensor) -> Tensor:
    """The loop itself, for draws `[S + 1, R, D]`."""
    given = GivenNoise(noise)
    sampler = MLPSampler(MLPWeights(w_x), time, plan.coef)
    return denoise_mlp_loop_ref(given.draw(0), sampler, cond, None, 1.0, given)


# --- moments, in float64 ----------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_chain_propagated_step_by_step(plan):
    w_x, cond, time = denoiser(plan)
    form = collapse(plan, w_x, time)
    identity = torch.eye(DIM).double()
    mean, covariance = torch.zeros_like(cond), identity  # of x_T
    for i in range(plan.num_steps):
        c_out, c_xt, c_noise = plan.coef[i]
        step = c_out * w_x + c_xt * identity
        mean = mean @ step.T + c_out * (cond + time[i])
        covariance = step @ covariance @ step.T + c_noise**2 * identity
    assert_agree(form.offset + cond @ form.gain.T, mean, torch.float64)
    assert_agree(form.covariance, covariance, torch.float64)
    assert_agree(form.factor @ form.factor.T, covariance, torch.float64)
    assert torch.equal(form.covariance, form.covariance.T)


@pytest.mark.parametrize("name", [name for name in PLANS if "1000" not in name])
def test_moments_are_those_of_the_loop_answering_to_each_draw(name):
    """x_0 is affine in the draws: its mean is the loop's answer to no noise, its covariance that to unit impulses."""
    plan = PLANS[name]()
    w_x, cond, time = denoiser(plan)
    form = collapse(plan, w_x, time)
    draws = plan.num_steps + 1
    silence = torch.zeros(draws, 3, DIM).double()
    assert_agree(form.sample(cond, silence[0]), run_loop(plan, w_x, cond, time, silence), torch.float64)

    impulses = torch.eye(draws * DIM).double().view(draws, DIM, draws * DIM).transpose(1, 2)
    nothing = torch.zeros(draws * DIM, DIM).double()
    answers = run_loop(plan, w_x, nothing, torch.zeros_like(time), impulses)
    assert_agree(form.covariance, answers.T @ answers, torch.float64)


def test_the_result_takes_dtype_and_scale_of_the_run(plan):
    w_x, cond, time = denoiser(plan)
    z = torch.randn(3, DIM).double()
    exact = collapse(plan, w_x, time).sample(cond, z)
    form = collapse(plan, w_x.float(), time.float())
    ours = form.sample(cond.float(), z.float())
    assert ours.dtype == torch.float32
    assert form.covariance.dtype == torch.float64
    assert relative_error(ours, exact) <= 2 * AGREE[torch.float32]


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm, sqrt 50", "ddim, eta 0.5", "shifted grid"])
def test_draws_of_both_have_one_law(name):
    """Two samples of 20000: mean and covariance by z-scores, and Kolmogorov-Smirnov along random directions."""
    plan, count = PLANS[name](), 20000
    w_x, cond, time = denoiser(plan, rows=1, scale=0.8)
    cond = cond.expand(count, -1)
    keys, first = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    stepped_noise = PhiloxNoise(1, keys, first, DIM, torch.float64)
    sampler = MLPSampler(MLPWeights(w_x), time, plan.coef)
    stepped = denoise_mlp_loop_ref(stepped_noise.draw(0), sampler, cond, None, 1.0, stepped_noise)
    drawn = collapse(plan, w_x, time).sample(cond, PhiloxNoise(2, keys, first, DIM, torch.float64).draw(0))

    def z_scores(a: Tensor, b: Tensor) -> Tensor:
        return (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / count).sqrt()

    assert float(z_scores(stepped, drawn).abs().max()) < 4
    centred = [x - x.mean(0) for x in (stepped, drawn)]
    products = [(x[:, :, None] * x[:, None, :]).flatten(1) for x in centred]
    assert float(z_scores(*products).abs().max()) < 4.5

    directions = torch.randn(DIM, 8).double()
    for a, b in zip((stepped @ directions).T, (drawn @ directions).T, strict=True):
        a, b = a.sort().values, b.sort().values
        distance = (torch.searchsorted(a, b).double() - torch.arange(count)).abs().max() / count
        assert float(distance) < 2.23 * math.sqrt(2 / count)  # the 1 in 10^4 level


def test_where_no_draw_reaches_the_result_both_are_equal():
    """A denoiser blind to x_t under deterministic DDIM: x_0 is its last output, whatever the noise."""
    plan = plans.ddim(ScheduleConfig("linear", 100).build())
    _, cond, time = denoiser(plan)
    blind = torch.zeros(DIM, DIM).double()
    noise = torch.randn(plan.num_steps + 1, 3, DIM).double()
    form = collapse(plan, blind, time)
    assert form.factor.abs().max() == 0
    assert_agree(form.sample(cond, noise[0]), run_loop(plan, blind, cond, time, noise), torch.float64)


def test_a_singular_covariance_has_a_factor():
    """One step of a denoiser of rank 1."""
    plan = plans.one_step(ScheduleConfig("linear", 10).build())
    w_x = torch.outer(torch.randn(DIM), torch.randn(DIM)).double()
    form = collapse(plan, w_x, torch.zeros(1, DIM).double())
    assert_agree(form.factor @ form.factor.T, w_x @ w_x.T, torch.float64, factor=10)


def test_a_model_hands_over_what_its_loop_computes():
    """DreamRec with guidance: the mean of the closed form is its sampler's answer to no noise."""
    config = DreamRecConfig(7, 8, 4, ScheduleConfig("exp", 60, "float32"))
    weights = {name: torch.randn(shape).double() * 0.2 for name, shape in DreamRec.weight_shapes(config).items()}
    model = DreamRec(config, weights)
    histories = Histories(torch.tensor([[1, 2], [3, 7]]), torch.tensor([2, 1]))
    plan = model.plan("ddpm")
    state = model.prepare(model.encode(histories, model.item_table), plan, 3.0)
    denoise = model.affine(state, plan)
    silence = torch.zeros(61, 2, 8).double()
    form, (_, cond, _, uncond, scale) = collapse(plan, denoise.w_x, denoise.time), denoise
    mean = sample_affine_ref(form, cond, uncond, scale, GivenNoise(silence))
    assert_agree(mean, model.sample(state, plan, GivenNoise(silence)), torch.float64)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_plans_on_the_sphere_are_refused():
    plan = plans.ddpm(ScheduleConfig("linear", 20).build(), normalize=True)
    w_x, _, time = denoiser(plan)
    with pytest.raises(
        InvalidArgument, match=r"closed_form: the plan normalises x after every step.*use scheduler='ddpm'"
    ):
        collapse(plan, w_x, time)


@pytest.mark.parametrize("bad", [40.0, math.nan])
def test_chains_that_amplify_their_input_are_refused(bad):
    plan = plans.ddpm(ScheduleConfig("linear", 200, beta_end=0.1).build())
    _, _, time = denoiser(plan)
    with pytest.raises(InvalidArgument, match=r"amplifies its input \(by .* over its last \d+ steps\); at most 10000"):
        collapse(plan, bad * torch.eye(DIM).double(), time)


def test_what_is_accepted_keeps_its_digits():
    """The rule behind the limit: a float32 perturbation of x_T comes out at most `amplification` times as large."""
    plan = plans.ddpm(ScheduleConfig("linear", 200, beta_end=0.1).build())
    _, cond, time = denoiser(plan)
    w_x = 1.5 * torch.eye(DIM).double()
    form = collapse(plan, w_x, time)
    assert 1 < form.amplification < MAX_AMPLIFICATION
    noise = torch.zeros(plan.num_steps + 1, 3, DIM).double()
    before = run_loop(plan, w_x, cond, time, noise)
    noise[0] += FLOOR[torch.float32]
    moved = (run_loop(plan, w_x, cond, time, noise) - before).norm(dim=1)
    assert bool((moved <= form.amplification * noise[0].norm(dim=1)).all())
