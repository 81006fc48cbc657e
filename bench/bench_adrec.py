"""ADRec, T = 32: from histories to x_0, every provider given the same draws.

The published algorithm runs all L slots through the denoiser at every step, whatever the lengths of the histories; ours
computes the clean prefix once, all padding as one key, and then one token per step. fastdiff[torch] does that in eager
PyTorch, so published / fastdiff[torch] is what the algorithm gains; fastdiff[torch] / fastdiff[cpu] is what kernels do.
"full" histories fill the window of 50, "beauty" ones have lengths like Amazon Beauty's, 7 items on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import Calls, Wrap, compiled_only, eager_and_compiled, in_float64, load_weights
from bench.cases import GOLDEN, Absent, Case, Gate, Options, Provider, relative_error
from bench.graphs import graphed_only, loop_in_a_graph
from bench.inputs import draw_histories, draw_noise, histories_to, padded, some_of
from bench.ours import our_models
from bench.published.adrec import PublishedADRec
from bench.weights import WeightsOf, random_weights
from fastdiff.config import ADRecConfig
from fastdiff.models.adrec import ADRec
from fastdiff.models.base import Histories, Model
from fastdiff.noise import GivenNoise, Noise
from fastdiff.ops.backend import BoundOp
from fastdiff.ops.denoise_attention_loop import BlockWeights, CausalPrefix, denoise_attention_step_ref
from fastdiff.schedule import ScheduleConfig

OTHERS = ("published", "published-compiled", "fastdiff-compiled", "fastdiff-graphed")
CHECKED_USERS = 16


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


def sampler(model: Model[Any, Any], histories: Histories, noise: Tensor) -> Callable[[], Tensor]:
    """A call that gives x_0 `[B, D]` by encode, prepare, sample; the plan is made once, as an engine does."""
    plan = model.plan("ddpm")

    def run() -> Tensor:
        condition = model.encode(histories, model.item_table)
        return model.sample(model.prepare(condition, plan, 1.0), plan, GivenNoise(noise))

    return run


def loop_of_compiled_steps(wrap: Wrap) -> BoundOp:
    """denoise_attention_loop with a step and its update under torch.compile: the loop itself would unroll 32 times."""

    @wrap
    def step(
        x_t: Tensor,
        blocks: tuple[BlockWeights, ...],
        prefix: CausalPrefix,
        scale: float,
        time: Tensor,
        coef: Tensor,
        draw: Tensor,
    ) -> Tensor:
        output = denoise_attention_step_ref(x_t, blocks, prefix, 1.0, scale, time)
        return coef[0] * output + coef[1] * x_t + coef[2] * draw

    def loop(
        x_t: Tensor,
        blocks: tuple[BlockWeights, ...],
        prefix: CausalPrefix,
        _: float,
        scale: float,
        time: Tensor,
        coef: Tensor,
        normalize: bool,
        noise: Noise,
    ) -> Tensor:
        assert not normalize
        # made before, since torch.compile does not go through the lock of a cached property
        _ = prefix.by_head, prefix.flat_bias, prefix.flat_query_scale
        for i, row in enumerate(coef.to(x_t.dtype)):
            # the coefficient of the last step's noise is 0, so any draw does
            draw = noise.draw(1 + i) if i + 1 < len(coef) else x_t
            x_t = step(x_t, blocks, prefix, scale, time[i], row, draw)
        return x_t

    return BoundOp("denoise_attention_loop", "torch", loop)


def providers(
    config: ADRecConfig, batch: int, options: Options, lengths: str, weights_of: WeightsOf = random_weights
) -> Iterator[Provider | Absent]:
    device = options.device
    weights = weights_of(config)
    published = published_adrec(config, weights, device)
    drawn = draw_histories(config, batch, lengths)
    as_loaded = padded(drawn, config)
    noise = draw_noise(config.schedule.num_train_timesteps + 1, batch, config.hidden_size)

    users = some_of(batch, CHECKED_USERS)
    x_0 = in_float64(published)(as_loaded[users], noise[:, users].double())
    as_loaded, noise, histories = as_loaded.to(device), noise.to(device), histories_to(drawn, device)

    def check(output: Tensor) -> Gate:
        return Gate(relative_error(output.cpu()[users], x_0), GOLDEN, "x_0 of the published model in float64")

    def as_published(wrap: Wrap) -> Calls:
        module = published_adrec(config, weights, device)
        module.diffu.net.forward = wrap(module.diffu.net.forward)
        module.diffu.ag_encoder.forward = wrap(module.diffu.ag_encoder.forward)
        return partial(module, as_loaded, noise), None

    def cached(wrap: Wrap) -> Calls:
        model = our_models(config, weights, device)["torch"]
        model.bound["denoise_attention_loop"] = loop_of_compiled_steps(wrap)
        return sampler(model, histories, noise), None

    def captured() -> Calls:
        model = our_models(config, weights, device)["torch"]
        model.bound["denoise_attention_loop"] = loop_in_a_graph()
        return sampler(model, histories, noise), None

    yield from eager_and_compiled("published", as_published, check, options)
    yield from compiled_only("fastdiff-compiled", cached, check, options)
    yield from graphed_only(captured, check, options)
    for label, model in our_models(config, weights, device).items():
        yield Provider("fastdiff", sampler(model, histories, noise), check, backend=label)


def adrec_case(batch: int, lengths: str, only_on: str | None = None, **sizes: int) -> Case:
    config = adrec_config(**sizes)
    setting = (
        f"histories to x_0, T = {config.schedule.num_train_timesteps}, L = {config.max_seq_len}, "
        f"D = {config.hidden_size}, {config.n_encoder_layers} + {config.n_decoder_layers} blocks, draws given"
    )
    params: dict[str, int | str] = {"lengths": lengths, "batch": batch}
    build = partial(providers, config, batch, lengths=lengths)
    return Case("adrec", params, setting, build, ADRec.ops, OTHERS, only_on=only_on)


CASES = [
    *(adrec_case(batch, lengths) for lengths in ("full", "beauty") for batch in (1, 32, 256)),
    *(adrec_case(1024, lengths, "cuda") for lengths in ("full", "beauty")),
]
