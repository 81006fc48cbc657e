"""DreamRec, T = 500: the sampler alone, from the encoded condition to x_0, each side drawing its own noise.

Ours draws Philox numbers inside the loop, by the user and the seed; the published algorithm draws with torch.randn.
What is checked is the loop with its Philox draws, against the published chain in float64 that is given the same draws.
"mlp1" is one linear layer, so the whole chain is also one affine map and one draw: the closed form, equal in law.
Each side starts from what its own encoder returns: h, of which ours has the first layer's share already (one product of
a row and a [D, D] matrix, of the thousand that the published steps do).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import Calls, Wrap, eager_and_compiled, in_float64, load_weights
from bench.cases import GOLDEN, Absent, Case, Gate, Options, Provider, relative_error
from bench.inputs import draw_histories, draw_noise, histories_to, padded
from bench.ours import our_models
from bench.published.dreamrec import Diffusion
from bench.published.dreamrec import DreamRec as PublishedDreamRec
from bench.weights import random_weights
from fastdiff.closed_form import collapse
from fastdiff.config import DreamRecConfig
from fastdiff.models.base import Model
from fastdiff.models.dreamrec import DreamRec
from fastdiff.noise import GivenNoise, Noise, PhiloxNoise
from fastdiff.ops.philox_normals import philox_normals_ref
from fastdiff.schedule import ScheduleConfig

GUIDANCE = 3.0
"""DreamRec's w = 2."""

SEED = 7
PROBE = 2.0**12


def dreamrec_config(
    num_train_timesteps: int = 500, hidden_size: int = 64, n_items: int = 12_101, denoiser: str = "mlp1"
) -> DreamRecConfig:
    """A window of 10, the "exp" schedule in float32: the authors' defaults."""
    schedule = ScheduleConfig("exp", num_train_timesteps, arithmetic="float32")
    return DreamRecConfig(
        n_items=n_items, hidden_size=hidden_size, max_seq_len=10, schedule=schedule, denoiser=denoiser
    )


def published_dreamrec(
    config: DreamRecConfig, weights: dict[str, Tensor], device: torch.device, guidance: float = GUIDANCE
) -> tuple[PublishedDreamRec, Diffusion]:
    module = PublishedDreamRec(config.hidden_size, config.n_items, config.max_seq_len, config.denoiser)
    load_weights(module, config, weights, device)
    diffusion = Diffusion(config.schedule.num_train_timesteps, w=guidance - 1.0, beta_schedule=config.schedule.family)
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
    closed_form: Callable[[Any, Noise], Tensor],
    condition: Tensor,
    mean: Tensor,
    covariance: Tensor,
    output: Tensor,
    z: Tensor,
) -> Gate:
    """Equal in law: the map condition -> mean at z = 0, and the covariance that the map z -> x_0 gives, against the
    float64 chain; and `output`, of the draw `z [R, D]`, is what those two maps say.

    closed_form  (condition [R, ..], noise) -> x_0 [R, D]
    """
    dim = z.shape[1]
    at_zero = closed_form(condition, GivenNoise(torch.zeros_like(z)[None])).cpu()
    # rows of the identity times a large number, so that the rounding of the mean beside them does not count
    probes = PROBE * torch.cat([torch.zeros(1, dim), torch.eye(dim)]).to(z)
    read = closed_form(condition[:1].repeat(dim + 1, 1), GivenNoise(probes[None])).cpu().double()
    factor = (read[1:] - read[0]).T / PROBE
    errors = [
        relative_error(at_zero, mean),
        relative_error(factor @ factor.T, covariance),
        relative_error(output.cpu(), mean + z.cpu().double() @ factor.T),
    ]
    return Gate(max(errors), GOLDEN, "mean and covariance of the published chain in float64")


# --- providers --------------------------------------------------------------------------------------------------------


def philox(model: Model[Any, Any], user: Tensor) -> Callable[[], Noise]:
    """A call's noise, each user's own, made by the backend of the model."""
    dim, normals = model.config.hidden_size, model.bound["philox_normals"]
    return partial(PhiloxNoise, SEED, user, torch.zeros_like(user), dim, model.dtype, normals)


def our_loop(model: Model[Any, Any], condition: Any, noise: Callable[[], Noise]) -> Callable[[], Tensor]:
    """A call that gives x_0 `[B, D]`, all steps, noise drawn inside; the plan is made once, as an engine does."""
    plan = model.plan("ddpm")
    return lambda: model.sample(model.prepare(condition, plan, GUIDANCE), plan, noise())


def our_closed_form(model: Model[Any, Any], condition: Any) -> tuple[Callable[[Any, Noise], Tensor], float]:
    """(condition, noise) -> x_0, and the seconds that the collapse took, once per model and plan."""
    plan = model.plan("ddpm")
    start = time.perf_counter()
    affine = model.affine(model.prepare(condition[:1], plan, GUIDANCE), plan)
    assert affine is not None, "mlp1 is one linear layer"
    form = collapse(plan, affine.w_x, affine.time)
    setup = time.perf_counter() - start

    def run(condition: Any, noise: Noise) -> Tensor:
        affine = model.affine(model.prepare(condition, plan, GUIDANCE), plan)
        assert affine is not None
        x_0: Tensor = model.bound["sample_affine"](form, affine.cond, affine.uncond, affine.guidance_scale, noise)
        return x_0

    return run, setup


def providers(config: DreamRecConfig, batch: int, options: Options) -> Iterator[Provider | Absent]:
    device, steps, dim = options.device, config.schedule.num_train_timesteps, config.hidden_size
    weights = random_weights(config)
    published, diffusion = published_dreamrec(config, weights, device)
    truth = in_float64(published)
    histories = draw_histories(config, batch, "uniform")
    with torch.no_grad():
        h = published.condition(padded(histories, config).to(device), histories.lengths.to(device))
    user = torch.arange(batch)
    noise = philox_normals_ref(SEED, user, torch.zeros_like(user), 0, steps, dim)

    h64 = h.cpu().double()
    x_0 = diffusion.sample(truth.forward, truth.forward_uncon, h64, noise.double())
    noise, user = noise.to(device), user.to(device)

    def check(output: Tensor) -> Gate:
        return Gate(relative_error(output.cpu(), x_0), GOLDEN, "x_0 of the published sampler in float64")

    def as_published(wrap: Wrap) -> Calls:
        sample = partial(diffusion.sample, wrap(published.forward), wrap(published.forward_uncon), h)
        return sample, partial(sample, noise)

    yield from eager_and_compiled("published", as_published, check, options)
    ours = histories_to(histories, device)
    conditions = {
        label: (model, model.encode(ours, model.item_table))
        for label, model in our_models(config, weights, device).items()
    }
    for label, (model, condition) in conditions.items():
        yield Provider("fastdiff", our_loop(model, condition, philox(model, user)), check, backend=label)

    if config.denoiser != "mlp1" or not options.wants("fastdiff-closed-form"):
        return
    mean = diffusion.sample(truth.forward, truth.forward_uncon, h64, torch.zeros_like(noise.cpu()).double())
    covariance, z = chain_covariance(diffusion, truth), draw_noise(batch, dim).to(device)
    for label, (model, condition) in conditions.items():
        closed, setup = our_closed_form(model, condition)
        gate = partial(closed_form_gate, closed, condition, mean, covariance, z=z)
        run = partial(_drawing, closed, condition, philox(model, user))
        given = partial(closed, condition, GivenNoise(z[None]))
        yield Provider("fastdiff-closed-form", run, gate, given, backend=label, setup=setup)


def _drawing(closed: Callable[[Any, Noise], Tensor], condition: Any, noise: Callable[[], Noise]) -> Tensor:
    return closed(condition, noise())


def dreamrec_case(batch: int, denoiser: str = "mlp1", only_on: str | None = None, **sizes: int) -> Case:
    config = dreamrec_config(denoiser=denoiser, **sizes)
    setting = (
        f"condition to x_0, T = {config.schedule.num_train_timesteps}, D = {config.hidden_size}, w = 2, "
        "own noise, drawn inside"
    )
    params: dict[str, int | str] = {"denoiser": denoiser, "batch": batch}
    ours = ("fastdiff", "fastdiff-closed-form") if denoiser == "mlp1" else ("fastdiff",)
    build = partial(providers, config, batch)
    return Case("dreamrec", params, setting, build, DreamRec.ops, ours=ours, only_on=only_on)


CASES = [
    *(dreamrec_case(batch, denoiser) for denoiser in ("mlp1", "mlp2") for batch in (1, 32, 256)),
    *(dreamrec_case(1024, denoiser, "cuda") for denoiser in ("mlp1", "mlp2")),
]
