"""Accuracy against the number of sampling steps, and which sampler a trained model gets by default."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import ModelConfig
from fastdiff.engine import Engine
from fastdiff.evaluate import evaluate
from fastdiff.sampler import Sampler
from fastdiff.train.recipe import Recipe
from fastdiff.train.validation import TOP_KS

NUMBERS_OF_STEPS = (1, 2, 5, 10)
METRICS = ("HR@20", "NDCG@20")

NOTHING = 0.01
"""Fewer steps cost nothing where no metric is lower by more than this share of itself."""


@dataclass(frozen=True)
class Measured:
    """A sampler's `METRICS` on validation users."""

    sampler: Sampler
    metrics: dict[str, float]
    seconds_per_user: float

    def rows(self) -> list[tuple[str, int, str, float]]:
        """(scheduler, steps, name, value): lines of steps.csv."""
        values = {**self.metrics, "seconds_per_user": self.seconds_per_user}
        return [(self.sampler.scheduler, self.sampler.steps, name, value) for name, value in values.items()]


def samplers(config: ModelConfig) -> list[Sampler]:
    """What to compare: 1, 2, 5, 10 and all steps of each sampler that the method has."""
    total = config.schedule.num_train_timesteps
    if config.method == "cddrec":
        return [Sampler("one_step", 1)]
    counts = [*(n for n in NUMBERS_OF_STEPS if n < total), total]
    chosen = [Sampler(scheduler, n) for scheduler in ("ddpm", "ddim") for n in counts]
    if config.method == "dimerec":
        chosen = [Sampler("ddpm", n) for n in counts]
    if config.method == "tarec":
        chosen = [Sampler("one_step", 1), *chosen]
    if getattr(config, "denoiser", None) == "mlp1":
        chosen.append(Sampler("closed_form", total))
    return chosen


def measure_steps(recipe: Recipe, model: Checkpoint, limit: int = 5000) -> list[Measured]:
    """Every sampler on at most `limit` validation users, evenly spread: files are not always in a random order."""
    engine = Engine.from_checkpoint(model, device=recipe.device)
    instances = recipe.data.valid[:: -(-len(recipe.data.valid) // limit)]
    settings = recipe.validation_settings(recipe.stages()[-1])
    measured = []
    for sampler in samplers(engine.config):
        started = time.perf_counter()
        given = {**settings, **sampler.arguments}
        found = evaluate(engine, instances, top_ks=TOP_KS, show_progress=False, **given)
        seconds = (time.perf_counter() - started) / len(instances)
        measured.append(Measured(sampler, {name: found.metrics[name] for name in METRICS}, seconds))
    return measured


def fewest_steps(measured: Sequence[Measured], own: Sampler) -> Measured:
    """The sampler with the fewest calls that costs nothing beside `own`, the paper's. Of several the closed form, whose
    law is that of all steps and which no luck with the validation users made good; else the most accurate."""
    (paper,) = [one for one in measured if one.sampler == own]
    least = {name: (1 - NOTHING) * value for name, value in paper.metrics.items()}
    good = [one for one in measured if all(one.metrics[name] >= least[name] for name in METRICS)]
    calls = min(one.sampler.calls for one in good)
    if calls == own.calls:
        return paper
    few = [one for one in good if one.sampler.calls == calls]
    return max(few, key=lambda one: (one.sampler.scheduler == "closed_form", one.metrics["NDCG@20"]))
