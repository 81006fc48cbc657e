"""DreamRec, T = 500: the sampler alone, from the encoded condition to x_0, every provider given the same draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import compiled, in_float64, load_weights, static_compile
from bench.cases import (
    GOLDEN,
    Absent,
    Case,
    Gate,
    Options,
    Provider,
    draw_histories,
    draw_noise,
    our_models,
    padded,
    relative_error,
)
from bench.published.dreamrec import Diffusion
from bench.published.dreamrec import DreamRec as PublishedDreamRec
from bench.weights import random_weights
from fastdiff.closed_form import collapse
from fastdiff.config import DreamRecConfig
from fastdiff.models.base import Model
from fastdiff.models.dreamrec import DreamRec
from fastdiff.noise import GivenNoise
from fastdiff.plan import StepPlan
from fastdiff.schedule import ScheduleConfig

GUIDANCE = 3.0
"""DreamRec's w = 2."""

PROBE = 2.0**12
OURS = ("fastdiff", "fastdiff-closed-form")


def dreamrec_config(num_train_timesteps: int = 500, hidden_size: int = 64, n_items: int = 12_101) -> DreamRecConfig:
    """mlp1, a window of 10, the "exp" schedule in float32: the authors' defaults."""
    schedule = ScheduleConfig("exp", num_train_timesteps, arithmetic="float32")
    return DreamRecConfig(n_items=n_items, hidden_size=hidden_size, max_seq_len=10, schedule=schedule)


def published_dreamrec(
    config: DreamRecConfig, weights: dict[str, Tensor], device: torch.device
) -> tuple[PublishedDreamRec, Diffusion]:
    module = PublishedDreamRec(config.hidden_size, config.n_items, config.max_seq_len, config.denoiser)
    load_weights(module, config, weights, device)
    diffusion = Diffusion(config.schedule.num_train_timesteps, w=GUIDANCE - 1.0, beta_schedule=config.schedule.family)
    return module, diffusion


# --- truth ------------------------------------------------------------------------------------------------------------


def chain_covariance(diffusion: Diffusion, truth: PublishedDreamRec) -> Tensor:
    """Cov(x_0) `[D, D]` of the published chain in float64, by probing each of its steps.

    A step of a linear denoiser is x -> A x + b + s z; rows of the identity, against a row of zeros, read off A, and a
    draw of ones reads off s. Then C -> A C A^T + s^2 I, from C = I.
    """
    dim = truth.hidden_size
    probes = torch.cat([torch.zeros(2, dim), torch.eye(dim)]).double()
    draw = torch.zeros_like(probes)
    draw[1] = 1.0
    h = torch.zeros_like(probes)
    covariance = torch.eye(dim, dtype=torch.float64)
    for n in reversed(range(diffusion.timesteps)):
        t = torch.full((dim + 2,), n)
        after = diffusion._step(truth.forward, truth.forward_uncon, probes, h, t, n, draw)
        a = (after[2:] - after[0]).T
        sigma = after[1] - after[0]
        covariance = a @ covariance @ a.T + torch.diag(sigma**2)
    return covariance


def closed_form_gate(
    closed_form: Callable[[Tensor, Tensor], Tensor],
    h: Tensor,
    mean: Tensor,
    covariance: Tensor,
    output: Tensor,
    z: Tensor,
) -> Gate:
    """Equal in law: the map h -> mean at z = 0, and the covariance that the map z -> x_0 gives, against the float64
    chain; and `output`, of the draw `z`, is what those two maps say.

    closed_form  (h [R, D], z [R, D]) -> x_0 [R, D]
    """
    dim = h.shape[1]
    at_zero = closed_form(h, torch.zeros_like(h)).cpu()
    # rows of the identity times a large number, so that the rounding of the mean beside them does not count
    probes = PROBE * torch.cat([torch.zeros(1, dim), torch.eye(dim)]).to(h)
    read = closed_form(h[:1].expand(dim + 1, -1), probes).cpu().double()
    factor = (read[1:] - read[0]).T / PROBE
    errors = [
        relative_error(at_zero, mean),
        relative_error(factor @ factor.T, covariance),
        relative_error(output.cpu(), mean + z.cpu().double() @ factor.T),
    ]
    return Gate(max(errors), GOLDEN, "mean and covariance of the published chain in float64")


# --- providers --------------------------------------------------------------------------------------------------------


def our_closed_form(
    model: Model[Any, Any], plan: StepPlan, h: Tensor
) -> tuple[Callable[[Tensor, Tensor], Tensor], float]:
    """(h, z) -> x_0, and the seconds that the collapse took, once per model and plan."""
    start = time.perf_counter()
    affine = model.affine(model.prepare(h[:1], plan, GUIDANCE), plan)
    assert affine is not None, "mlp1 is one linear layer"
    form = collapse(plan, affine.w_x, affine.time)
    setup = time.perf_counter() - start

    def run(h: Tensor, z: Tensor) -> Tensor:
        affine = model.affine(model.prepare(h, plan, GUIDANCE), plan)
        assert affine is not None
        return form.sample(affine.cond, z)

    return run, setup


def providers(config: DreamRecConfig, batch: int, options: Options) -> Iterator[Provider | Absent]:
    device, steps, dim = options.device, config.schedule.num_train_timesteps, config.hidden_size
    weights = random_weights(config)
    published, diffusion = published_dreamrec(config, weights, device)
    truth = in_float64(published)
    histories = draw_histories(config, batch, "uniform")
    with torch.no_grad():
        h = published.condition(padded(histories, config).to(device), histories.lengths.to(device))
    noise = draw_noise(steps, batch, dim).to(device)

    h64, noise64 = h.cpu().double(), noise.cpu().double()
    x_0 = diffusion.sample(truth.forward, truth.forward_uncon, h64, noise64)

    def check(output: Tensor) -> Gate:
        return Gate(relative_error(output.cpu(), x_0), GOLDEN, "x_0 of the published sampler in float64")

    yield Provider("published", partial(diffusion.sample, published.forward, published.forward_uncon, h, noise), check)
    missing = compiled(options, "published-compiled")
    if missing is None:
        networks = static_compile(published.forward), static_compile(published.forward_uncon)
        yield Provider("published-compiled", partial(diffusion.sample, *networks, h, noise), check)
    else:
        yield missing

    for label, model in our_models(config, weights, device).items():
        plan = model.plan("ddpm")

        def loop(model: Model[Any, Any] = model, plan: StepPlan = plan) -> Tensor:
            return model.sample(model.prepare(h, plan, GUIDANCE), plan, GivenNoise(noise))

        yield Provider("fastdiff", loop, check, backend=label)

    if options.wants("fastdiff-closed-form"):
        mean = diffusion.sample(truth.forward, truth.forward_uncon, h64, torch.zeros_like(noise64))
        covariance = chain_covariance(diffusion, truth)
    for label, model in our_models(config, weights, device).items():
        if not options.wants("fastdiff-closed-form"):
            break
        closed, setup = our_closed_form(model, model.plan("ddpm"), h)
        gate = partial(closed_form_gate, closed, h, mean, covariance, z=noise[0])
        run = partial(closed, h, noise[0])
        yield Provider("fastdiff-closed-form", run, gate, backend=label, setup=setup)


def dreamrec_case(batch: int, **sizes: int) -> Case:
    config = dreamrec_config(**sizes)
    steps, dim = config.schedule.num_train_timesteps, config.hidden_size
    setting = f"condition to x_0, T = {steps}, D = {dim}, mlp1, w = 2, draws given"
    build = partial(providers, config, batch)
    return Case("dreamrec", {"batch": batch}, setting, build, DreamRec.ops, ours=OURS)


CASES = [dreamrec_case(batch) for batch in (1, 32, 256)]


def test_dreamrec(contender: Any) -> None:
    contender()
