"""TA-Rec: one step of DreamRec's network, against Algorithm 3 of the paper."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.published.dreamrec import Diffusion
from bench.published.tarec import TARec as PublishedTARec
from fastdiff.config import ScheduleConfig, TARecConfig, default_generation_config
from fastdiff.models.base import Histories
from fastdiff.models.tarec import TARec
from fastdiff.noise import GivenNoise
from tests.tolerances import assert_agree

BASE = TARecConfig(
    n_items=19, hidden_size=12, max_seq_len=6, schedule=ScheduleConfig("linear", 50, arithmetic="float32")
)


def make(config: TARecConfig, seed: int = 0) -> tuple[TARec, PublishedTARec]:
    torch.manual_seed(seed)
    published = PublishedTARec(config.hidden_size, config.n_items, config.max_seq_len, config.denoiser)
    published = published.double().eval()
    unused = TARec.unused_weights()
    weights = {name: value.detach() for name, value in published.state_dict().items() if not name.startswith(unused)}
    return TARec(config, weights), published


def histories_and_states(config: TARecConfig, lengths: list[int]) -> tuple[Histories, Tensor, Tensor]:
    states = torch.full((len(lengths), config.max_seq_len), config.pad_id)
    for row, length in enumerate(lengths):
        states[row, :length] = torch.randint(0, config.n_items, (length,))
    held = torch.tensor(lengths)
    return Histories(states[:, : max(lengths)], held), states, held.clamp(min=1)


def run(model: TARec, histories: Histories, noise: Tensor, guidance: float, **how) -> Tensor:
    plan = model.plan(**how)
    state = model.prepare(model.encode(histories, model.item_table), plan, guidance)
    return model.sample(state, plan, GivenNoise(noise))


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    denoiser=st.sampled_from(["mlp1", "mlp2"]),
    timestep=st.sampled_from([None, 0, 30, 50]),
    w=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 100),
)
def test_one_step_equals_the_algorithm_of_the_paper(lengths, denoiser, timestep, w, seed):
    config = replace(BASE, denoiser=denoiser, one_step_timestep=timestep)
    model, published = make(config, seed)
    histories, states, len_states = histories_and_states(config, lengths)
    noise = torch.randn(1, len(lengths), 12, dtype=torch.float64)
    with torch.no_grad():
        h = published.condition(states, len_states)
    truth = published.one_step(h, 49 if timestep is None else timestep, w, noise[0])
    assert_agree(run(model, histories, noise, 1.0 + w, scheduler="one_step"), truth, torch.float64)


def test_the_whole_chain_is_that_of_dreamrec():
    model, published = make(BASE)
    histories, states, len_states = histories_and_states(BASE, [0, 1, 4, 6])
    noise = torch.randn(50, 4, 12, dtype=torch.float64)
    diffusion = Diffusion(50, w=0.0, beta_schedule="linear")
    with torch.no_grad():
        h = published.condition(states, len_states)
    truth = diffusion.sample(published.forward, published.forward_uncon, h, noise)
    assert_agree(run(model, histories, noise, 1.0, scheduler="ddpm"), truth, torch.float64)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_few_steps_run_the_posterior_of_the_strided_chain(steps):
    """The multi-step variant, abar_{t-1} read at the next timestep that is run, alpha_t and beta_t of that stride."""
    model, published = make(BASE)
    histories, states, len_states = histories_and_states(BASE, [2, 6])
    noise = torch.randn(steps, 2, 12, dtype=torch.float64)
    timesteps = [49 - 10 * i for i in range(steps)]
    abar = torch.cumprod(1 - model.schedule.betas.double(), 0)
    x = noise[0]
    with torch.no_grad():
        h = published.condition(states, len_states)
        for i, t in enumerate(timesteps):
            prev = abar[timesteps[i + 1]] if i + 1 < steps else torch.tensor(1.0, dtype=torch.float64)
            alpha = abar[t] / prev
            x_start = published(x, h, torch.full((2,), t))
            x = (prev.sqrt() * (1 - alpha) * x_start + alpha.sqrt() * (1 - prev) * x) / (1 - abar[t])
            if i + 1 < steps:
                x = x + ((1 - alpha) * (1 - prev) / (1 - abar[t])).sqrt() * noise[1 + i]
    ours = run(model, histories, noise, 1.0, scheduler="ddpm", timesteps=timesteps)
    assert_agree(ours, x, torch.float32)  # the model's schedule is in float32


def test_one_step_is_what_the_paper_samples_with():
    assert default_generation_config(BASE).scheduler == "one_step"
    assert default_generation_config(BASE).guidance_scale == 1.0
    model, _ = make(BASE)
    plan = model.plan("one_step")
    assert plan.timesteps.tolist() == [49]
    assert plan.coef.tolist() == [[1.0, 0.0, 0.0]]
