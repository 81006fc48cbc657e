"""How good a recipe's model is at a point of its training, by the engine that will run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.catalog import ItemCatalog
from fastdiff.checkpoint import Checkpoint
from fastdiff.data import Instance
from fastdiff.engine import Engine
from fastdiff.evaluate import evaluate
from fastdiff.metrics import RankingMetrics
from fastdiff.ops.user_lists import UserLists
from fastdiff.train.data import TrainingData
from fastdiff.train.recipe import QueryModel, Recipe, Stage

TOP_KS = (5, 10, 20)
BATCH = 512


def measure(
    recipe: Recipe,
    stage: Stage,
    instances: Sequence[Instance],
    seed: int = 0,
    model: Checkpoint | QueryModel | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """ "HR@20", "NDCG@20", ... of the recipe's present weights; further arguments go to `fastdiff.evaluate.evaluate`.

    model  what to measure instead of the stage's own: the same weights with another sampler
    The network is left as it was, and so are the global random generators.
    """
    training = recipe.training
    recipe.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda(recipe.device)):
            if model is None:
                model = recipe.model(stage)
            if isinstance(model, QueryModel):
                return measure_queries(model, recipe.data, instances)
            engine = Engine.from_checkpoint(model, device=recipe.device)
            given = {**recipe.validation_settings(stage), **arguments}
            result = evaluate(engine, instances, top_ks=TOP_KS, seed=seed, show_progress=False, **given)
            return result.metrics
    finally:
        recipe.train(training)


def measure_queries(
    model: QueryModel,
    data: TrainingData,
    instances: Sequence[Instance],
    filter_seen: bool = False,
    average: str = "users",
    batch_size: int = BATCH,
) -> dict[str, float]:
    """The same for a model that maps histories to queries. All items are candidates, seen ones unless filtered.

    average  "users", or "batches" of batch_size, as in `fastdiff.evaluate.evaluate`
    """
    catalog = ItemCatalog(model.item_emb)
    metrics = RankingMetrics(TOP_KS, range(data.n_items))
    for start in range(0, len(instances), batch_size):
        batch = instances[start : start + batch_size]
        histories = [[data.numbers[item] for item in instance.history] for instance in batch]
        query: Tensor = model.encode(histories)
        seen = UserLists.from_lists(histories).to(query.device) if filter_seen else None
        top = catalog.topk(query.float(), TOP_KS[-1], user_exclude=seen)
        metrics.update(top.rows.cpu(), [data.numbers[instance.target] for instance in batch])
    return metrics.compute(average)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
