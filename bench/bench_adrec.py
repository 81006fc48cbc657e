"""ADRec, T = 32: from histories to x_0, every provider given the same draws.

The published algorithm runs all L slots through the denoiser at every step, whatever the lengths of the histories; ours
computes the clean prefix once and then one token per step. "full" histories fill the window of 50, "beauty" ones have
lengths like Amazon Beauty's, 7 items on average.
"""

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
    histories_to,
    our_models,
    padded,
    relative_error,
)
from bench.published.adrec import PublishedADRec
from bench.weights import random_weights
from fastdiff.config import ADRecConfig
from fastdiff.models.adrec import ADRec
from fastdiff.models.base import Model
from fastdiff.noise import GivenNoise
from fastdiff.plan import StepPlan
from fastdiff.schedule import ScheduleConfig

CHECKED_USERS = 16
"""Users do not depend on each other, so the float64 truth is computed for some of a batch, evenly spread."""


def adrec_config(
    num_train_timesteps: int = 32, hidden_size: int = 128, n_items: int = 12_101, max_seq_len: int = 50
) -> ADRecConfig:
    """The authors' defaults: two blocks each, four heads, lambda = 0.001, the "trunc_lin" schedule."""
    schedule = ScheduleConfig("trunc_lin", num_train_timesteps)
    return ADRecConfig(n_items=n_items, hidden_size=hidden_size, max_seq_len=max_seq_len, schedule=schedule)


def published_adrec(config: ADRecConfig, weights: dict[str, Tensor], device: torch.device) -> PublishedADRec:
    settings = {
        "hidden_size": config.hidden_size,
        "max_len": config.max_seq_len,
        "item_num": config.n_items,
        "diffusion_steps": config.schedule.num_train_timesteps,
        "noise_schedule": config.schedule.family,
        "lambda_uncertainty": config.lambda_uncertainty,
        "rescale_timesteps": config.rescale_timesteps,
    }
    module = PublishedADRec(
        settings,
        heads=config.n_heads,
        encoder_blocks=config.n_encoder_layers,
        decoder_blocks=config.n_decoder_layers,
    )
    load_weights(module, config, weights, device)
    return module


def providers(config: ADRecConfig, batch: int, lengths: str, options: Options) -> Iterator[Provider | Absent]:
    device = options.device
    weights = random_weights(config)
    published = published_adrec(config, weights, device)
    drawn = draw_histories(config, batch, lengths)
    as_loaded = padded(drawn, config)
    noise = draw_noise(config.schedule.num_train_timesteps + 1, batch, config.hidden_size)

    users = torch.arange(0, batch, max(1, batch // CHECKED_USERS))
    x_0 = in_float64(published)(as_loaded[users], noise[:, users].double())

    def check(output: Tensor) -> Gate:
        return Gate(relative_error(output.cpu()[users], x_0), GOLDEN, "x_0 of the published model in float64")

    as_loaded, noise = as_loaded.to(device), noise.to(device)
    yield Provider("published", partial(published, as_loaded, noise), check)
    missing = compiled(options, "published-compiled")
    if missing is None:
        faster = published_adrec(config, weights, device)
        faster.diffu.net.forward = static_compile(faster.diffu.net.forward)
        faster.diffu.ag_encoder.forward = static_compile(faster.diffu.ag_encoder.forward)
        yield Provider("published-compiled", partial(faster, as_loaded, noise), check)
    else:
        yield missing

    histories = histories_to(drawn, device)
    for label, model in our_models(config, weights, device).items():
        plan = model.plan("ddpm")

        def run(model: Model[Any, Any] = model, plan: StepPlan = plan) -> Tensor:
            condition = model.encode(histories, model.item_table)
            return model.sample(model.prepare(condition, plan, 1.0), plan, GivenNoise(noise))

        yield Provider("fastdiff", run, check, backend=label)


def adrec_case(batch: int, lengths: str, **sizes: int) -> Case:
    config = adrec_config(**sizes)
    setting = (
        f"histories to x_0, T = {config.schedule.num_train_timesteps}, L = {config.max_seq_len}, "
        f"D = {config.hidden_size}, {config.n_encoder_layers} + {config.n_decoder_layers} blocks, draws given"
    )
    params: dict[str, int | str] = {"lengths": lengths, "batch": batch}
    return Case("adrec", params, setting, partial(providers, config, batch, lengths), ADRec.ops)


CASES = [adrec_case(batch, lengths) for lengths in ("full", "beauty") for batch in (1, 32, 256)]


def test_adrec(contender: Any) -> None:
    contender()
