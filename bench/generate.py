"""The whole way, from histories to the ids of the top K: what the `bench_*` files of whole models share.

Both sides get histories as one padded integer tensor and return the K best rows, each by its own noise; what is checked
is the same call with its draws given. Ours goes through `Engine.generate`, with its checks of the input, and draws
Philox noise; others draw with torch.randn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import GOLDEN, Gate, Provider, ranking_error, relative_error
from bench.ours import our_engines
from fastdiff.config import GenerationConfig, ModelConfig
from fastdiff.engine import Engine
from fastdiff.output import GenerateOutput

TOP_K = 20


class Truth:
    """The embeddings of the published model in float64, and the scores `[B, rows]` that it ranks by."""

    def __init__(self, x_0: Tensor, scores: Tensor, what: str = "x_0 and the scores of the published model") -> None:
        self.x_0, self.scores, self.against = x_0, scores, f"{what} in float64"

    def check_rows(self, rows: Tensor) -> Gate:
        """Of a provider that returns rows `[B, K]` only, for the first users where the truth is known of those only."""
        return Gate(ranking_error(rows[: len(self.scores)].cpu(), self.scores), GOLDEN, self.against)

    def check_output(self, output: GenerateOutput) -> Gate:
        """Of ours: embeddings and ids, for the first users where the truth is known of those only."""
        assert output.embeddings is not None
        rows: Any = output.item_ids
        count = len(self.x_0)
        errors = [
            relative_error(output.embeddings[:count].cpu(), self.x_0),
            ranking_error(rows[:count].cpu(), self.scores),
        ]
        return Gate(max(errors), GOLDEN, self.against)


def best_rows(scores: Callable[..., Tensor], *inputs: Any, top_k: int = TOP_K, **keywords: Any) -> Tensor:
    """Rows of the `top_k` highest of the scores `[B, rows]` that a function gives."""
    return torch.topk(scores(*inputs, **keywords), top_k, dim=1).indices


def our_generate(
    config: ModelConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    states: Tensor,
    noise: Tensor,
    truth: Truth,
    name: str = "fastdiff",
    generation_config: GenerationConfig | None = None,
    ranking: str = "published",
    top_k: int = TOP_K,
    **arguments: Any,
) -> Iterator[Provider]:
    """`Engine.generate`, once per way to run it. With `noise` it must give `truth`; it is timed with its own draws."""
    for label, engine in our_engines(config, weights, device, generation_config).items():
        run = partial(engine.generate, states, top_k=top_k, ranking=ranking, **arguments)
        setup = None
        if arguments.get("scheduler") == "closed_form":
            setup = collapse_seconds(engine, states[:1])
        given = partial(run, noise=noise, output_embeddings=True)
        yield Provider(name, partial(run, seed=0), truth.check_output, given, backend=label, setup=setup)


def collapse_seconds(engine: Engine, states: Tensor) -> float:
    """How long the first call in closed form takes, which collapses the chain: once per model and plan."""
    start = time.perf_counter()
    engine.generate(states, scheduler="closed_form")
    return time.perf_counter() - start
