"""DreamRec over a whole test set: YooChoose's 55,245 histories to the top 20 of 9,514 items, T = 1,000, one figure.

Ours runs the chain in closed form, a draw per user. The published algorithm runs its 1,000 steps (minutes: --full). The
data set is read where it is (FASTDIFF_MATERIAL, or a folder `shared` beside the repository, with data/dreamrec-yc in
it); elsewhere histories are drawn with its lengths and popularity, and the row says which ("data").
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baselines import in_float64
from bench.bench_dreamrec import GUIDANCE, dreamrec_config, published_dreamrec
from bench.cases import Absent, Case, Citation, Options, Provider
from bench.generate import TOP_K, Truth, best_rows, collapse_seconds
from bench.inputs import draw_noise
from bench.machine import ROOT
from bench.ours import engine_ops, our_engines
from bench.weights import random_weights
from fastdiff.config import DreamRecConfig, default_generation_config
from fastdiff.data import InstanceFile
from fastdiff.engine import Engine
from fastdiff.output import GenerateOutput

USERS, ITEMS, STEPS = 55_245, 9_514, 1_000
LENGTHS = (0.2325, 0.2326, 0.2325, 0.1269, 0.0708, 0.0399, 0.0236, 0.0146, 0.0088, 0.0058, 0.0120)
"""How often histories of 0 .. 10 items stand in the test set."""

CHECKED_USERS = 64
BATCH = 4096
PUBLISHED_BATCH = 256
CITED = Citation("TA-Rec's Table 3: DreamRec's inference on YooChoose, one RTX 3090", 1394.0)
"""Mao et al., NeurIPS 2025, arXiv 2510.17245: 23 min 14 s."""


def test_file() -> Path | None:
    path = Path(os.environ.get("FASTDIFF_MATERIAL", ROOT.parent / "shared")) / "data" / "dreamrec-yc" / "test.npz"
    return path if path.is_file() else None


@lru_cache(maxsize=1)
def histories(users: int, items: int) -> tuple[Tensor, Tensor]:
    """(states [users, 10] right-padded with `items`, lengths [users])."""
    path = test_file()
    if path is not None:
        file = InstanceFile(path)
        return torch.from_numpy(file.history)[:users], torch.from_numpy(file.history_len)[:users]
    generator = torch.Generator().manual_seed(8)
    lengths = torch.multinomial(torch.tensor(LENGTHS), users, replacement=True, generator=generator)
    popularity = (40.0 + torch.arange(items)) ** -1.7  # the 10 first have 16 % of all clicks, the 1,000 first 92 %
    window = len(LENGTHS) - 1
    drawn = torch.multinomial(popularity, users * window, replacement=True, generator=generator).view(users, window)
    states = torch.where(torch.arange(window) < lengths[:, None], drawn, items)
    return states, lengths.clamp(min=1)  # as in the file, where an empty history is one pad


def recommend(engine: Engine, states: Tensor, noise: Tensor | None = None, **arguments: Any) -> list[GenerateOutput]:
    """All users, batch by batch; `noise` is the closed form's one draw."""
    arguments |= {"top_k": TOP_K, "scheduler": "closed_form", "ranking": "published"}
    if noise is None:
        return list(engine.generate_batches(states, BATCH, seed=0, **arguments))
    parts = zip(states.split(BATCH), noise.split(BATCH), strict=True)
    return [engine.generate(part, noise=draw, **arguments) for part, draw in parts]


def providers(config: DreamRecConfig, users: int, options: Options) -> Iterator[Provider | Absent]:
    device = options.device
    weights = random_weights(config)
    published, diffusion = published_dreamrec(config, weights, device)
    exact = in_float64(published)
    states, lengths = histories(users, config.n_items)

    some = slice(0, min(users, CHECKED_USERS))
    h = exact.condition(states[some], lengths[some])
    table = exact.item_embeddings.weight.detach()
    states, lengths = states.to(device), lengths.to(device)

    if not options.full:
        yield Absent("published", "it takes minutes; --full includes it")
    elif options.wants("published"):
        draws = draw_noise(config.schedule.num_train_timesteps, len(h), config.hidden_size)
        x_0 = diffusion.sample(exact.forward, exact.forward_uncon, h, draws.double())

        def predict(part: slice, noise: Tensor | None = None) -> Tensor:
            return best_rows(published.predict, states[part], lengths[part], diffusion, noise)

        parts = [slice(start, start + PUBLISHED_BATCH) for start in range(0, users, PUBLISHED_BATCH)]
        run, given = partial(lambda: [predict(part) for part in parts]), partial(predict, some, draws.to(device))
        yield Provider("published", run, Truth(x_0, x_0 @ table.T).check_rows, given, once=True)

    zeros = torch.zeros(config.schedule.num_train_timesteps, *h.shape, dtype=h.dtype)
    mean = diffusion.sample(exact.forward, exact.forward_uncon, h, zeros)
    truth = Truth(mean, mean @ table.T, "mean of the published chain, and its scores,")
    nothing = torch.zeros(users, config.hidden_size, device=device)
    guided = default_generation_config(config, GUIDANCE)
    for label, engine in our_engines(config, weights, device, guided).items():
        setup = collapse_seconds(engine, states[:1])
        run = partial(recommend, engine, states)
        given = partial(recommend, engine, states, nothing, output_embeddings=True)
        yield Provider(
            "fastdiff-closed-form",
            run,
            lambda outputs: truth.check_output(outputs[0]),
            given,
            backend=label,
            setup=setup,
        )


def yoochoose_case(users: int = USERS, num_train_timesteps: int = STEPS, n_items: int = ITEMS, **sizes: int) -> Case:
    config = dreamrec_config(num_train_timesteps, n_items=n_items, **sizes)
    setting = (
        f"all test histories to the top {TOP_K} of {config.n_items} items, T = {num_train_timesteps}, "
        f"D = {config.hidden_size}, mlp1, own noise"
    )
    params: dict[str, int | str] = {"data": "YooChoose" if test_file() else "like YooChoose", "batch": users}
    build, ours = partial(providers, config, users), ("fastdiff-closed-form",)
    return Case("yoochoose", params, setting, build, engine_ops(config), ("published",), ours, citation=CITED)


CASES = [yoochoose_case()]
