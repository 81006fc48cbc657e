"""ADRec, T = 32, the whole way: from histories to the top 100 of 10^6 items, each side drawing its own noise.

The rival that counts is "fastdiff-graphed": keys and values cached, all steps one CUDA graph, one product with the
table, and the best selection that we could write in PyTorch (`torch_topk_tiles`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.baselines import Calls, Wrap, eager_and_compiled, in_float64
from bench.bench_adrec import CHECKED_USERS, adrec_config, published_adrec
from bench.cases import Absent, Case, Options, Provider
from bench.generate import Truth, best_rows, our_generate
from bench.graphs import graphed_only, loop_in_a_graph
from bench.inputs import draw_histories, draw_noise, histories_to, padded
from bench.ours import engine_ops, our_models
from bench.retrieval import torch_topk_tiles, users_at_once
from bench.weights import random_weights
from fastdiff.config import ADRecConfig
from fastdiff.noise import GivenNoise

BEST = 100


def providers(config: ADRecConfig, batch: int, options: Options) -> Iterator[Provider | Absent]:
    device = options.device
    weights = random_weights(config)
    published = published_adrec(config, weights, device)
    drawn = draw_histories(config, batch, "full")
    states = padded(drawn, config)
    noise = draw_noise(config.schedule.num_train_timesteps + 1, batch, config.hidden_size)

    some = slice(0, min(batch, CHECKED_USERS))
    exact = in_float64(published)
    x_0 = exact(states[some], noise[:, some].double())
    truth = Truth(x_0, exact.scores(x_0))
    del exact
    states, noise, histories = states.to(device), noise.to(device), histories_to(drawn, device)
    table = published.item_embedding.weight.detach()

    def as_published(wrap: Wrap) -> Calls:
        module = published_adrec(config, weights, device)
        module.diffu.net.forward = wrap(module.diffu.net.forward)
        module.diffu.ag_encoder.forward = wrap(module.diffu.ag_encoder.forward)

        def recommend(noise: Tensor | None = None) -> Tensor:
            return best_rows(lambda: module.scores(module(states, noise)), top_k=BEST)

        return recommend, partial(recommend, noise)

    def captured() -> Calls:
        model = our_models(config, weights, device)["torch"]
        model.bound["denoise_attention_loop"] = loop_in_a_graph()
        plan, at_once = model.plan("ddpm"), users_at_once(batch, len(table), 4, device)

        def recommend(given: Tensor | None = None) -> Tensor:
            condition = model.encode(histories, model.item_table)
            draws = GivenNoise(torch.randn_like(noise) if given is None else given)
            query = model.sample(model.prepare(condition, plan, 1.0), plan, draws)
            return torch.cat([torch_topk_tiles(part, table, BEST)[0] for part in query.split(at_once)])

        return recommend, partial(recommend, noise)

    yield from eager_and_compiled("published", as_published, truth.check_rows, options)
    yield from our_generate(config, weights, device, states, noise, truth, top_k=BEST)
    yield from graphed_only(captured, truth.check_rows, options)


def adrec_generate_case(batch: int, n_items: int = 1_000_000, **sizes: int) -> Case:
    config = adrec_config(n_items=n_items, **sizes)
    setting = (
        f"histories to the top {BEST} of {config.n_items} items, T = {config.schedule.num_train_timesteps}, "
        f"L = {config.max_seq_len}, D = {config.hidden_size}, windows full, own noise"
    )
    others = ("published", "published-compiled", "fastdiff-graphed")
    build = partial(providers, config, batch)
    return Case("adrec_generate", {"batch": batch}, setting, build, engine_ops(config), others, only_on="cuda")


CASES = [adrec_generate_case(batch) for batch in (1, 1024)]
