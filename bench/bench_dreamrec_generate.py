"""DreamRec, T = 500, the whole way: from histories to the top 20 of 12,101 items, each side drawing its own noise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import compiled, in_float64, static_compile
from bench.bench_dreamrec import GUIDANCE, OURS, dreamrec_config, published_dreamrec
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
from bench.weights import random_weights
from fastdiff.config import DreamRecConfig, default_generation_config
from fastdiff.engine import Engine
from fastdiff.models.dreamrec import DreamRec
from fastdiff.ops.score_topk import score_topk

TOP_K = 20
AGAINST = "x_0 and the scores of the published model in float64"


def providers(config: DreamRecConfig, batch: int, options: Options) -> Iterator[Provider | Absent]:
    device, steps = options.device, config.schedule.num_train_timesteps
    weights = random_weights(config)
    published, diffusion = published_dreamrec(config, weights, device)
    truth = in_float64(published)
    drawn = draw_histories(config, batch, "uniform")
    states, lengths = padded(drawn, config), drawn.lengths
    noise = draw_noise(steps, batch, config.hidden_size)
    h = truth.condition(states, lengths)
    x_0 = diffusion.sample(truth.forward, truth.forward_uncon, h, noise.double())
    mean = diffusion.sample(truth.forward, truth.forward_uncon, h, torch.zeros_like(noise).double())
    table = published.item_embeddings.weight.detach()

    states, lengths, noise = states.to(device), lengths.to(device), noise.to(device)

    def recommend(model: Any, draws: Tensor | None = None) -> Tensor:
        return torch.topk(model.predict(states, lengths, diffusion, draws), TOP_K, dim=1).indices

    def check(rows: Tensor) -> Gate:
        return Gate(ranking_error(rows.cpu(), x_0 @ table.cpu().double().T), GOLDEN, AGAINST)

    yield Provider("published", partial(recommend, published), check, partial(recommend, published, noise))
    missing = compiled(options, "published-compiled")
    if missing is None:
        faster, _ = published_dreamrec(config, weights, device)
        faster.forward = static_compile(faster.forward)
        faster.forward_uncon = static_compile(faster.forward_uncon)
        yield Provider("published-compiled", partial(recommend, faster), check, partial(recommend, faster, noise))
    else:
        yield missing

    for label, engine in our_engines(config, default_generation_config(config, GUIDANCE), weights, device).items():

        def run(engine: Engine = engine, **arguments: Any) -> Any:
            return engine.generate(states, top_k=TOP_K, ranking="published", **arguments)

        yield Provider(
            "fastdiff",
            partial(run, seed=0),
            lambda output: generate_gate(output, x_0, table, AGAINST),
            partial(run, noise=noise, output_embeddings=True),
            backend=label,
        )
        closed = partial(run, scheduler="closed_form")
        # its covariance is checked where the sampler is measured alone; with a draw of zeros it must return the mean
        yield Provider(
            "fastdiff-closed-form",
            partial(closed, seed=0),
            lambda output: generate_gate(
                output, mean, table, "mean of the published chain, and its scores, in float64"
            ),
            partial(closed, noise=torch.zeros_like(noise[0]), output_embeddings=True),
            backend=label,
        )


def dreamrec_generate_case(batch: int, **sizes: int) -> Case:
    config = dreamrec_config(**sizes)
    steps = config.schedule.num_train_timesteps
    setting = (
        f"histories to the top {TOP_K} of {config.n_items} items, T = {steps}, D = {config.hidden_size}, own noise"
    )
    build, ops = partial(providers, config, batch), (*DreamRec.ops, score_topk)
    return Case("dreamrec_generate", {"batch": batch}, setting, build, ops, ours=OURS)


CASES = [dreamrec_generate_case(batch) for batch in (1, 32, 256)]


def test_dreamrec_generate(contender: Any) -> None:
    contender()
