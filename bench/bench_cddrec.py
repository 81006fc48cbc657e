"""CDDRec, the whole way: from histories to the top 20 of Office Products' 2,419 items, ranked as its authors do.

Users are coupled through the batch as their code couples them (its evaluation runs 128 at a time), and seen items score
0; both sides are given who has seen what.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import Calls, Wrap, eager_and_compiled, in_float64, load_weights
from bench.cases import Absent, Case, Options, Provider
from bench.generate import TOP_K, Truth, our_generate
from bench.inputs import draw_histories, draw_noise, padded
from bench.ours import engine_ops
from bench.published.cddrec import CDDRecModel, published_ranking
from bench.weights import WeightsOf, random_weights
from fastdiff.config import CDDRecConfig
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


def embed(model: CDDRecModel, as_loaded: Tensor, draws: Tensor | None = None) -> Tensor:
    """x_0 `[B, D]`; the published code draws whole [B, L, D] tensors, x_T and the noise of t = 0."""
    if draws is None:
        return model.inference(as_loaded)[:, -1]
    source = cycle(draws)
    return model.inference(as_loaded, lambda _: next(source))[:, -1]


def recommend(model: CDDRecModel, as_loaded: Tensor, seen: Tensor, draws: Tensor | None = None) -> Tensor:
    rows, _ = published_ranking(embed(model, as_loaded, draws), model.item_embeddings.weight, seen, TOP_K)
    return torch.from_numpy(rows)


def providers(
    config: CDDRecConfig, batch: int, options: Options, weights_of: WeightsOf = random_weights
) -> Iterator[Provider | Absent]:
    device = options.device
    weights = weights_of(config)
    published = published_cddrec(config, weights, device)
    as_loaded = padded(draw_histories(config, batch, "uniform"), config)
    draws = draw_noise(2, batch, config.max_seq_len, config.hidden_size)
    seen = torch.zeros(batch, config.n_rows, dtype=torch.bool).scatter_(1, as_loaded, True)
    seen[:, config.pad_id] = False

    exact = in_float64(published)
    x_0 = embed(exact, as_loaded, draws.double())
    table = exact.item_embeddings.weight.detach()
    cosine = F.normalize(x_0, dim=-1) @ F.normalize(table, dim=-1).T
    truth = Truth(x_0, cosine.masked_fill(seen, 0.0))
    as_loaded, draws, seen = as_loaded.to(device), draws.to(device), seen.to(device)

    def as_published(wrap: Wrap) -> Calls:
        module = published_cddrec(config, weights, device)
        module.conditional_encoder.forward = wrap(module.conditional_encoder.forward)
        module.decoder.forward = wrap(module.decoder.forward)
        run = partial(recommend, module, as_loaded, seen)
        return run, partial(run, draws)

    yield from eager_and_compiled("published", as_published, truth.check_rows, options)
    yield from our_generate(config, weights, device, as_loaded, draws[:, :, -1].contiguous(), truth)


def cddrec_case(batch: int, **sizes: int) -> Case:
    config = cddrec_config(**sizes)
    setting = (
        f"histories to the top {TOP_K} of {config.n_items} items, L = {config.max_seq_len}, D = {config.hidden_size}, "
        "coupled batch, own noise"
    )
    return Case("cddrec", {"batch": batch}, setting, partial(providers, config, batch), engine_ops(config))


CASES = [cddrec_case(batch) for batch in (1, 32, 128, 256)]
