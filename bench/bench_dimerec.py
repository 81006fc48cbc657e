"""DimeRec, T = 50, the whole way: from histories to the top 20 of 12,101 items, each side drawing its own noise.

The published algorithm has everything inside its loop, the extraction of the interests too. The paper's T, D and K are
not known; T = 50 steps of one linear layer on the sphere, K = 4 learned interests, are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.baselines import Calls, Wrap, eager_and_compiled, in_float64, load_weights
from bench.cases import Absent, Case, Options, Provider
from bench.generate import TOP_K, Truth, our_generate
from bench.inputs import draw_histories, draw_noise, padded
from bench.ours import engine_ops
from bench.published.dimerec import DimeRec as PublishedDimeRec
from bench.weights import WeightsOf, random_weights
from fastdiff.config import DimeRecConfig
from fastdiff.schedule import ScheduleConfig


def dimerec_config(num_train_timesteps: int = 50, hidden_size: int = 64, n_items: int = 12_101) -> DimeRecConfig:
    schedule = ScheduleConfig("linear", num_train_timesteps, beta_start=1e-4, beta_end=0.02)
    return DimeRecConfig(n_items=n_items, hidden_size=hidden_size, max_seq_len=10, schedule=schedule)


def published_dimerec(config: DimeRecConfig, weights: dict[str, Tensor], device: torch.device) -> PublishedDimeRec:
    module = PublishedDimeRec(config)
    load_weights(module, config, weights, device)
    return module


def recommend(module: PublishedDimeRec, states: Tensor, lengths: Tensor, noise: Tensor | None = None) -> Tensor:
    """Rows of the table: `predict` scores the real items, which start at row 1."""
    return torch.topk(module.predict(states, lengths, noise), TOP_K, dim=1).indices + 1


def providers(
    config: DimeRecConfig, batch: int, options: Options, weights_of: WeightsOf = random_weights
) -> Iterator[Provider | Absent]:
    device = options.device
    weights = weights_of(config)
    published = published_dimerec(config, weights, device)
    drawn = draw_histories(config, batch, "uniform")
    states, lengths = padded(drawn, config), drawn.lengths
    noise = draw_noise(config.schedule.num_train_timesteps + 1, batch, config.hidden_size)

    exact = in_float64(published)
    x_0 = exact.sample(states, lengths, noise.double())
    scores = x_0 @ exact.item_embeddings.weight.detach().T
    scores[:, config.pad_id] = -torch.inf
    truth = Truth(x_0, scores)
    states, lengths, noise = states.to(device), lengths.to(device), noise.to(device)

    def as_published(wrap: Wrap) -> Calls:
        module = published_dimerec(config, weights, device)
        module.interests, module.denoise = wrap(module.interests), wrap(module.denoise)
        run = partial(recommend, module, states, lengths)
        return run, partial(run, noise)

    yield from eager_and_compiled("published", as_published, truth.check_rows, options)
    yield from our_generate(config, weights, device, states, noise, truth, ranking="clean", filter_seen=False)


def dimerec_case(batch: int, **sizes: int) -> Case:
    config = dimerec_config(**sizes)
    setting = (
        f"histories to the top {TOP_K} of {config.n_items} items, T = {config.schedule.num_train_timesteps}, "
        f"D = {config.hidden_size}, K = {config.n_interests} interests, own noise"
    )
    return Case("dimerec", {"batch": batch}, setting, partial(providers, config, batch), engine_ops(config))


CASES = [dimerec_case(batch) for batch in (1, 32, 256)]
