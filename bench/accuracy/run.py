"""Running a cell: train in a folder of its own, evaluate on the test users, return its row.

Whatever ends a run, the next one goes on where it was: the trainer keeps its state, and each evaluation is written down
when it is done. The folder's name holds a digest of the settings, so other settings are another run.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench import machine
from bench.accuracy.cells import BATCH_MEANS, Cell
from bench.accuracy.rows import Row, digest, key_of
from fastdiff.checkpoint import MODEL_FOLDER
from fastdiff.config import default_generation_config
from fastdiff.engine import Engine
from fastdiff.evaluate import evaluate
from fastdiff.loading import from_pretrained
from fastdiff.sampler import Sampler
from fastdiff.train import run as training
from fastdiff.train.data import TrainingData, read
from fastdiff.train.recipe import QueryModel, Recipe, Settings
from fastdiff.train.run_folder import RESULT_FILE
from fastdiff.train.settings_file import load_settings, presets
from fastdiff.train.steps import samplers
from fastdiff.train.validation import TOP_KS, measure_queries

EVALUATIONS_FILE = "test.jsonl"
Evaluation = dict[str, Any]


def settings_of(cell: Cell) -> Settings:
    """The settings that ship for the data set, else the defaults, with the variant's own on top."""
    preset = cell.data if cell.data in presets(cell.method) else None
    return load_settings(cell.method, training.recipe_class(cell.method).Settings, preset, values=cell.settings)


def plain(settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return values


def folder_of(cell: Cell, runs: Path) -> Path:
    return runs / cell.method / cell.data / cell.variant / f"{cell.seed}-{digest(plain(settings_of(cell)))}"


def run_cell(
    cell: Cell,
    folder: Path,
    data: TrainingData,
    minutes: float | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Row:
    """The row of a cell. Raises the trainer's `Interrupted` where `minutes` did not suffice for the training."""
    settings = settings_of(cell)
    result = _trained(cell, settings, folder, data, minutes, device, say)
    found = data.statistics
    assert found is not None
    return {
        "method": cell.method,
        "data": cell.data,
        "variant": cell.variant,
        "seed": cell.seed,
        "settings": plain(settings),
        "settings_digest": digest(plain(settings)),
        "data_digest": training.data_digest(data),
        "facts": {"users": found.users, "items": found.items, "interactions": found.interactions},
        "epochs": result["epochs"],
        "seconds": result["seconds"],
        "parameters": result["parameters"],
        "valid": result["valid"],
        "sampler": result.get("sampler"),
        "evaluations": list(_evaluations(cell, settings, folder, data, device, say)),
        "machine": machine.facts(torch.device(device)),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _trained(
    cell: Cell,
    settings: Settings,
    folder: Path,
    data: TrainingData,
    minutes: float | None,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    if (folder / RESULT_FILE).exists():
        result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return result
    return training.train(
        cell.method,
        data,
        folder,
        settings,
        cell.seed,
        device=device,
        resume=folder.exists(),
        minutes=minutes,
        show_progress=False,
        say=say,
    )


# --- on the test users ------------------------------------------------------------------------------------------------


def _evaluations(
    cell: Cell, settings: Settings, folder: Path, data: TrainingData, device: str, say: Callable[[str], None]
) -> Iterator[Evaluation]:
    path = folder / EVALUATIONS_FILE
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    yield from done
    have = set(map(key_of, done))
    for evaluation in _measure(cell, settings, folder, data, device, have):
        with path.open("a") as file:
            file.write(json.dumps(evaluation) + "\n")
        metrics = evaluation["metrics"]
        batch = evaluation.get("batch_means")
        named = evaluation["scheduler"] or (f"means of {batch}" if batch else "own sampler")
        say(
            f"{cell.id}  {evaluation['ranking']:<9} {named:<11} {evaluation['num_steps'] or '':>5}  "
            f"HR@20 {100 * metrics['HR@20']:5.2f}  NDCG@20 {100 * metrics['NDCG@20']:5.2f}"
        )
        yield evaluation


def _measure(
    cell: Cell, settings: Settings, folder: Path, data: TrainingData, device: str, have: set[tuple[Any, ...]]
) -> Iterator[Evaluation]:
    """Published and clean ranking with the paper's sampler; the other samplers, and batch means, when published."""
    if (folder / MODEL_FOLDER).exists():
        engine = from_pretrained(folder / MODEL_FOLDER, device=device)
        found, others = partial(_of_engine, engine, data), samplers(engine.config)
    else:
        recipe = training.recipe_class(cell.method)(settings, data)
        recipe.load_state_dict(load_file(folder / "weights.safetensors"))
        found, others = partial(_of_queries, recipe.to(device).eval(), data), []
    kinds: list[tuple[str, Sampler | None, int | None]] = [("published", None, None), ("clean", None, None)]
    kinds += [("published", sampler, None) for sampler in others]
    if cell.data in BATCH_MEANS:
        kinds.append(("published", None, BATCH_MEANS[cell.data]))
    for ranking, sampler, batch in kinds:
        kind = {
            "ranking": ranking,
            "scheduler": sampler and sampler.scheduler,
            "num_steps": sampler and sampler.steps,
            "batch_means": batch,
        }
        if key_of(kind) in have:
            continue
        averaged = {} if batch is None else {"average": "batches", "batch_size": batch}
        metrics, seconds = found(ranking, sampler, averaged)
        yield {**kind, "metrics": metrics, "users": len(data.test), "seconds_per_user": seconds / len(data.test)}


def _of_engine(
    engine: Engine, data: TrainingData, ranking: str, sampler: Sampler | None, averaged: dict[str, Any]
) -> tuple[dict[str, float], float]:
    """Metrics and seconds on the test users; no sampler is the paper's."""
    sampler = sampler or Sampler.of(default_generation_config(engine.config), engine.config)
    arguments = {**sampler.arguments, **averaged, **({"filter_seen": True} if ranking == "clean" else {})}
    result = evaluate(engine, data.test, ranking, TOP_KS, show_progress=False, **arguments)
    return result.metrics, result.seconds


@torch.no_grad()
def _of_queries(
    recipe: Recipe, data: TrainingData, ranking: str, sampler: None, averaged: dict[str, Any]
) -> tuple[dict[str, float], float]:
    """For a model that maps histories to queries: all items, or all but those seen ("clean")."""
    model = recipe.model(recipe.stages()[-1])
    assert isinstance(model, QueryModel)
    started = time.perf_counter()
    metrics = measure_queries(model, data, data.test, filter_seen=ranking == "clean", **averaged)
    return metrics, time.perf_counter() - started


def data_of(cell: Cell, folder: Path) -> TrainingData:
    """Leave-one-out data of `folder/<name>/sequences.txt`."""
    return read(folder / cell.data / "sequences.txt")
