"""`evaluate()`: metrics of an engine on held-out items, with the policy that produced them.

Published numbers depend on which rows are candidates, what happens to seen items and, for sampled models, on the noise;
so a result carries its policy in words.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from fastdiff.data import IdType, Instance, LeaveOneOut, check_known, id_type_of
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.metrics import RankingMetrics, check_average

if TYPE_CHECKING:
    from fastdiff.catalog import ItemCatalog
    from fastdiff.config import ModelConfig
    from fastdiff.engine import Engine

BATCH_SIZE = 256
COUPLED_BATCH_SIZE = 128
"""The batches of the authors' own evaluation, for models whose users share a batch's attention (CDDRec)."""


_OWN_ARGUMENTS = {
    "histories": "they are read from the instances",
    "top_k": "it is the largest of top_ks",
    "request_ids": "they are the users' numbers, 0, 1, 2, ...",
    "noise": "it holds one entry per user of one batch; give a seed",
    "user_exclude_items": "it holds one entry per user of one batch; give exclude_items",
    "user_candidate_items": "it holds one entry per user of one batch; give candidate_items",
}
"""Arguments of `generate` that `evaluate` does not take, and why."""


INT64 = range(-(1 << 63), 1 << 63)


def default_batch_size(engine: Engine) -> int:
    """128 for batch-coupled models, as their authors evaluate; else 256."""
    return COUPLED_BATCH_SIZE if engine.config.coupled else BATCH_SIZE


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate()` returns.

    metrics          "HR@5", "NDCG@5", "MRR@20", "coverage@5", ... -> value in 0..1 (see `fastdiff.metrics`)
    standard_errors  "HR@5", ... -> standard error of that share
    policy           sentences: candidates, seen items, noise, batches, what could not be hit
    average          "users" or "batches", of batch_size
    items            different items among the histories and targets: far fewer than the catalogue has, where the data
                     are of another data set than the model
    users, skipped   rows evaluated; users left out for too few items
    seconds          wall time of the whole pass, reading included
    timings          seconds of the engine's stages, summed over the batches
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    policy: list[str]
    users: int
    skipped: int
    seed: int
    batch_size: int
    seconds: float
    timings: dict[str, float] = field(default_factory=dict)
    average: str = "users"
    items: int = 0

    @property
    def histories_per_second(self) -> float:
        return self.users / self.seconds


def evaluate(
    engine: Engine,
    instances: Iterable[Instance],
    ranking: str = "published",
    top_ks: Sequence[int] = (5, 10, 20),
    batch_size: int | None = None,
    seed: int = 0,
    filter_seen: bool | None = None,
    limit: int | None = None,
    show_progress: bool = True,
    average: str = "users",
    **arguments: Any,
) -> EvaluationResult:
    """Rank for every instance and see where its target stands.

    instances   `LeaveOneOut(SequenceFile(...))`, `InstanceFile(...)`, or any iterable of `Instance`; read as a stream
    ranking     "published": candidates and seen items as the authors rank; "clean": real items only
    top_ks      the cut-offs of the metrics
    batch_size  None is 256, and 128 for batch-coupled models (the authors' batches, in file order, the last one short)
    seed        of the noise. A row's noise depends on the seed and the row's number, not on its history: many users
                share an empty history, and must not share a draw
    filter_seen for the clean ranking; None is the model's own setting
    limit       only the first so many instances
    average     "users": the mean over users; "batches": the mean over batches of their means, which depends on
                batch_size (ADRec's authors: 512): the users of a short last batch weigh more
    arguments   further ones of `Engine.generate`: num_inference_steps, scheduler, eta, guidance_scale, num_samples, ...
    Raises `DataError` where there is no instance, and where a history or a target is an item that the catalogue does
    not hold. Targets that are no candidates of the ranking (the model's pad id under "clean", items added to the
    catalogue under "published") count as misses, and the policy says how many there are.
    """
    for name, why in _OWN_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise InvalidArgument(f"evaluate: {name} cannot be given: {why}")
    if isinstance(top_ks, (str, bytes)) or not isinstance(top_ks, Sequence):
        raise InvalidArgument(f"evaluate: top_ks must be a tuple of ints of at least 1 (got {top_ks!r})")
    check_average("evaluate", average)
    if average == "batches" and batch_size is None:
        raise InvalidArgument(
            'evaluate: average="batches" depends on the batch_size, which is not given; give that of the figures to '
            "compare with (ADRec's authors: 512)"
        )
    batch_size = default_batch_size(engine) if batch_size is None else batch_size
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InvalidArgument(f"evaluate: batch_size must be an int of at least 1 (got {batch_size!r})")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InvalidArgument(f"evaluate: limit must be an int of at least 1 (got {limit!r})")
    metrics = RankingMetrics(top_ks, engine.catalog.item_ids)
    timings: dict[str, float] = {}
    already_seen = no_candidates = 0
    items: set[Any] = set()
    start = time.perf_counter()
    source, done = islice(instances, limit), 0
    total = min(len(instances), limit or sys.maxsize) if isinstance(instances, Sized) else limit
    with tqdm(total=total, unit="user", disable=None if show_progress else True) as bar:
        while batch := list(islice(source, batch_size)):
            histories = [instance.history for instance in batch]
            check_known(batch, histories, engine.catalog, engine.config)
            candidates = _are_candidates(batch, engine.catalog, engine.config, ranking)
            output = engine.generate(
                histories,
                top_k=metrics.top_ks[-1],
                seed=seed,
                request_ids=range(done, done + len(batch)),
                ranking=ranking,
                filter_seen=filter_seen,
                **arguments,
            )
            metrics.update(output.item_ids, [instance.target for instance in batch])
            no_candidates += candidates.count(False)
            already_seen += sum(can and row.target in row.history for can, row in zip(candidates, batch, strict=True))
            for stage, seconds in output.timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
            items.update(*histories, (instance.target for instance in batch))
            done += len(batch)
            bar.update(len(batch))
    seconds = time.perf_counter() - start
    skipped = instances.skipped if isinstance(instances, LeaveOneOut) else 0
    if done == 0:
        raise DataError(f"evaluate: there is no instance to rank for ({skipped} users skipped for too few items)")
    policy = _policy(engine, ranking, filter_seen, seed, batch_size, already_seen, no_candidates)
    if average == "batches":
        last = done % batch_size or batch_size
        policy.append(f"average: over batches of {batch_size} users in file order, the last one of {last}")
    return EvaluationResult(
        metrics.compute(average),
        metrics.standard_errors(average),
        policy,
        done,
        skipped,
        seed,
        batch_size,
        seconds,
        timings,
        average,
        len(items),
    )


def _are_candidates(batch: Sequence[Instance], catalog: ItemCatalog, config: ModelConfig, ranking: str) -> list[bool]:
    """Whether each target can be hit at all; a DataError names the line of one that is nothing the catalogue knows.

    Published rankings show every row of the authors' table that has an id, special and removed ones too.
    """
    kind = id_type_of(catalog)
    published = ranking == "published"
    shown: set[Any] = set()
    if published:
        special = torch.tensor([list(catalog.special_rows)], dtype=torch.int64)
        shown = set(catalog.external(special).ravel().tolist()) - {-1, None}
    targets = [row.target if _is_id(row.target, kind) else None for row in batch]
    rows = np.full(len(batch), -1)
    typed = [at for at, target in enumerate(targets) if target is not None]
    rows[typed] = (catalog.known if published else catalog.lookup)([targets[at] for at in typed])
    n_ranked = config.n_rows if published else catalog.n_rows
    for instance, target, row in zip(batch, targets, rows, strict=True):
        if row < 0 and (target is None or (target not in shown and target != config.pad_id)):
            raise DataError(
                f"{instance.where}: the target {instance.target!r} is not in the catalogue, which has "
                f"{catalog.describe_ids()}; leave the user out, or add the item to the catalogue"
            )
    return [0 <= row < n_ranked or target in shown for target, row in zip(targets, rows.tolist(), strict=True)]


def _is_id(target: Any, kind: IdType) -> bool:
    if kind is str:
        return isinstance(target, str)
    return isinstance(target, (int, np.integer)) and not isinstance(target, bool) and int(target) in INT64


def _policy(
    engine: Engine,
    ranking: str,
    filter_seen: bool | None,
    seed: int,
    batch_size: int,
    already_seen: int,
    no_candidates: int,
) -> list[str]:
    config, n_items = engine.config, engine.catalog.n_items
    if ranking == "published":
        special = ", ".join(config.special_rows.values())
        score = config.published_seen_score
        drops_seen = False
        lines = [
            "ranking: published, as the authors rank "
            f"(candidates: all {config.n_rows} rows of the item table, {special} included)",
            "seen items: ranked like all others"
            if score is None
            else f"seen items: scores set to {score:g}, still ranked",
        ]
    else:
        drops_seen = engine.generation_config.filter_seen if filter_seen is None else filter_seen
        lines = [
            f"ranking: clean (candidates: the {n_items} items of the catalogue)",
            "seen items: left out" if drops_seen else "seen items: ranked like all others",
        ]
    if drops_seen and already_seen:
        lines.append(f"targets that are seen items, and so can never be hit: {already_seen}")
    if no_candidates:
        whose = "rows without an id, added items" if ranking == "published" else f"the pad id, {config.pad_id}"
        lines.append(f"targets that are no candidates ({whose}), and so can never be hit: {no_candidates}")
    lines.append(f"noise: seed {seed}, one stream per user (the user's number)")
    if config.coupled:
        whose = "the authors' batches" if batch_size == COUPLED_BATCH_SIZE else f"the authors' are {COUPLED_BATCH_SIZE}"
        lines.append(
            f"batches: {batch_size} users in file order attend to one another, the last batch is short ({whose})"
        )
    return lines
