"""TA-Rec, one step, the whole way: from histories to the top 20 of 12,101 items, each side drawing its own noise."""

from __future__ import annotations

from collections.abc import Iterator
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
    padded,
    ranking_error,
)
from bench.generate import generate_gate, our_engines
from bench.published.tarec import TARec as PublishedTARec
from bench.weights import random_weights
from fastdiff.config import TARecConfig, default_generation_config
from fastdiff.engine import Engine
from fastdiff.models.tarec import TARec
from fastdiff.ops.score_topk import score_topk
from fastdiff.schedule import ScheduleConfig

TOP_K = 20
AGAINST = "x_0 and the scores of the published model in float64"


def tarec_config(num_train_timesteps: int = 1000, hidden_size: int = 64, n_items: int = 12_101) -> TARecConfig:
    schedule = ScheduleConfig("linear", num_train_timesteps, arithmetic="float32")
    return TARecConfig(n_items=n_items, hidden_size=hidden_size, max_seq_len=10, schedule=schedule)


def published_tarec(config: TARecConfig, weights: dict[str, Tensor], device: torch.device) -> PublishedTARec:
    module = PublishedTARec(config.hidden_size, config.n_items, config.max_seq_len, config.denoiser)
    load_weights(module, config, weights, device)
    return module


def providers(config: TARecConfig, batch: int, options: Options) -> Iterator[Provider | Absent]:
    device, timestep = options.device, config.schedule.num_train_timesteps - 1
    weights = random_weights(config)
    published = published_tarec(config, weights, device)
    truth = in_float64(published)
    drawn = draw_histories(config, batch, "uniform")
    states, lengths = padded(drawn, config), drawn.lengths
    x_t = draw_noise(batch, config.hidden_size)
    x_0 = truth.one_step(truth.condition(states, lengths), timestep, noise=x_t.double())
    table = published.item_embeddings.weight.detach()

    states, lengths, x_t = states.to(device), lengths.to(device), x_t.to(device)

    def recommend(model: PublishedTARec, noise: Tensor | None = None) -> Tensor:
        return torch.topk(model.recommend(states, lengths, timestep, noise=noise), TOP_K, dim=1).indices

    def check(rows: Tensor) -> Gate:
        return Gate(ranking_error(rows.cpu(), x_0 @ table.cpu().double().T), GOLDEN, AGAINST)

    yield Provider("published", partial(recommend, published), check, partial(recommend, published, x_t))
    missing = compiled(options, "published-compiled")
    if missing is None:
        faster = published_tarec(config, weights, device)
        faster.condition = static_compile(faster.condition)
        faster.forward = static_compile(faster.forward)
        yield Provider("published-compiled", partial(recommend, faster), check, partial(recommend, faster, x_t))
    else:
        yield missing

    for label, engine in our_engines(config, default_generation_config(config), weights, device).items():

        def run(engine: Engine = engine, **noise: Any) -> Any:
            return engine.generate(states, top_k=TOP_K, ranking="published", **noise)

        yield Provider(
            "fastdiff",
            partial(run, seed=0),
            lambda output: generate_gate(output, x_0, table, AGAINST),
            partial(run, noise=x_t, output_embeddings=True),
            backend=label,
        )


def tarec_case(batch: int, **sizes: int) -> Case:
    config = tarec_config(**sizes)
    setting = (
        f"histories to the top {TOP_K} of {config.n_items} items, one step, D = {config.hidden_size}, mlp1, own noise"
    )
    return Case("tarec", {"batch": batch}, setting, partial(providers, config, batch), (*TARec.ops, score_topk))


CASES = [tarec_case(batch) for batch in (1, 32, 256)]


def test_tarec(contender: Any) -> None:
    contender()
