"""DreamRec, T = 500, the whole way: from histories to the top 20 of 12,101 items, each side drawing its own noise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.baselines import Calls, Wrap, eager_and_compiled, in_float64
from bench.bench_dreamrec import GUIDANCE, dreamrec_config, published_dreamrec
from bench.cases import Absent, Case, Options, Provider
from bench.generate import TOP_K, Truth, best_rows, our_generate
from bench.inputs import draw_histories, draw_noise, padded
from bench.ours import engine_ops
from bench.weights import WeightsOf, random_weights
from fastdiff.config import DreamRecConfig, default_generation_config

OURS = ("fastdiff", "fastdiff-closed-form")


def providers(
    config: DreamRecConfig,
    batch: int,
    options: Options,
    weights_of: WeightsOf = random_weights,
    guidance: float = GUIDANCE,
) -> Iterator[Provider | Absent]:
    device, steps = options.device, config.schedule.num_train_timesteps
    weights = weights_of(config)
    published, diffusion = published_dreamrec(config, weights, device, guidance)
    exact = in_float64(published)
    drawn = draw_histories(config, batch, "uniform")
    states, lengths = padded(drawn, config), drawn.lengths
    noise = draw_noise(steps, batch, config.hidden_size)

    table = exact.item_embeddings.weight.detach()
    h = exact.condition(states, lengths)
    x_0 = diffusion.sample(exact.forward, exact.forward_uncon, h, noise.double())
    truth = Truth(x_0, x_0 @ table.T)
    mean = diffusion.sample(exact.forward, exact.forward_uncon, h, torch.zeros_like(noise).double())
    states, lengths, noise = states.to(device), lengths.to(device), noise.to(device)

    def as_published(wrap: Wrap) -> Calls:
        module, _ = published_dreamrec(config, weights, device, guidance)
        module.forward, module.forward_uncon = wrap(module.forward), wrap(module.forward_uncon)
        recommend = partial(best_rows, module.predict, states, lengths, diffusion)
        return recommend, partial(recommend, noise)

    yield from eager_and_compiled("published", as_published, truth.check_rows, options)
    ours = partial(our_generate, config, weights, device, states)
    guided = default_generation_config(config, guidance)
    yield from ours(noise, truth, generation_config=guided)
    # its covariance is checked where the sampler is measured alone; with a draw of zeros it must return the mean
    at_mean = Truth(mean, mean @ table.T, "mean of the published chain, and its scores,")
    nothing = torch.zeros_like(noise[0])
    yield from ours(nothing, at_mean, "fastdiff-closed-form", guided, scheduler="closed_form")


def dreamrec_generate_case(batch: int, **sizes: int) -> Case:
    config = dreamrec_config(**sizes)
    setting = (
        f"histories to the top {TOP_K} of {config.n_items} items, T = {config.schedule.num_train_timesteps}, "
        f"D = {config.hidden_size}, mlp1, own noise"
    )
    build = partial(providers, config, batch)
    return Case("dreamrec_generate", {"batch": batch}, setting, build, engine_ops(config), ours=OURS)


CASES = [dreamrec_generate_case(batch) for batch in (1, 32, 256)]
