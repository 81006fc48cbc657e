"""CDDRec at the batch of its authors' evaluation, 128 users coupled as their code couples them: histories to x_0."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from types import SimpleNamespace
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
    histories_to,
    our_models,
    padded,
    relative_error,
)
from bench.published.cddrec import CDDRecModel
from bench.weights import random_weights
from fastdiff.config import CDDRecConfig
from fastdiff.models.base import Model
from fastdiff.models.cddrec import CDDRec
from fastdiff.noise import GivenNoise
from fastdiff.plan import StepPlan
from fastdiff.schedule import ScheduleConfig


def cddrec_config(num_train_timesteps: int = 20, hidden_size: int = 128, n_items: int = 2_419) -> CDDRecConfig:
    """The authors' settings for Office Products: a window of 20, one encoder layer."""
    schedule = ScheduleConfig("linear", num_train_timesteps, beta_start=1e-4, beta_end=0.04, linspace_dtype="float32")
    return CDDRecConfig(n_items=n_items, hidden_size=hidden_size, max_seq_len=20, schedule=schedule)


def published_cddrec(config: CDDRecConfig, weights: dict[str, Tensor], device: torch.device) -> CDDRecModel:
    settings = SimpleNamespace(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        hidden_act=config.hidden_act,
        max_seq_length=config.max_seq_len,
        item_size=config.n_rows,
        T=config.schedule.num_train_timesteps,
        beta_1=config.schedule.beta_start,
        beta_T=config.schedule.beta_end,
    )
    module = CDDRecModel(settings)
    load_weights(module, config, weights, device)
    return module


def providers(config: CDDRecConfig, batch: int, options: Options) -> Iterator[Provider | Absent]:
    device = options.device
    weights = random_weights(config)
    published = published_cddrec(config, weights, device)
    drawn = draw_histories(config, batch, "uniform")
    as_loaded = padded(drawn, config)
    # the published code draws whole [B, L, D] tensors, x_T and the noise of t = 0, and reads one slot of the second
    draws = draw_noise(2, batch, config.max_seq_len, config.hidden_size)

    def infer(model: CDDRecModel, as_loaded: Tensor, draws: Tensor) -> Tensor:
        source = cycle(draws)
        return model.inference(as_loaded, lambda _: next(source))[:, -1]

    x_0 = infer(in_float64(published), as_loaded, draws.double())

    def check(output: Tensor) -> Gate:
        return Gate(relative_error(output.cpu(), x_0), GOLDEN, "x_0 of the published model in float64")

    as_loaded, draws = as_loaded.to(device), draws.to(device)
    yield Provider("published", partial(infer, published, as_loaded, draws), check)
    missing = compiled(options, "published-compiled")
    if missing is None:
        faster = published_cddrec(config, weights, device)
        faster.conditional_encoder.forward = static_compile(faster.conditional_encoder.forward)
        faster.decoder.forward = static_compile(faster.decoder.forward)
        yield Provider("published-compiled", partial(infer, faster, as_loaded, draws), check)
    else:
        yield missing

    histories, noise = histories_to(drawn, device), draws[:, :, -1].contiguous()
    for label, model in our_models(config, weights, device).items():
        plan = model.plan("one_step")

        def run(model: Model[Any, Any] = model, plan: StepPlan = plan) -> Tensor:
            condition = model.encode(histories, model.item_table)
            return model.sample(model.prepare(condition, plan, 1.0), plan, GivenNoise(noise))

        yield Provider("fastdiff", run, check, backend=label)


def cddrec_case(batch: int, **sizes: int) -> Case:
    config = cddrec_config(**sizes)
    setting = f"histories to x_0, L = {config.max_seq_len}, D = {config.hidden_size}, coupled batch, draws given"
    return Case("cddrec", {"batch": batch}, setting, partial(providers, config, batch), CDDRec.ops)


CASES = [cddrec_case(128)]


def test_cddrec(contender: Any) -> None:
    contender()
