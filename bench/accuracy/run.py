"""Running a cell: train in a folder of its own, evaluate on the test users, return its row.

Whatever ends a run, the next one goes on where it was: the trainer keeps its state, and each evaluation is written down
when it is done. The folder's name holds a digest of the settings, so other settings are another run.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench import machine
from bench.accuracy.cells import BATCH_MEANS, Cell
from bench.accuracy.rows import Row, digest
from fastdiff.checkpoint import MODEL_FOLDER
from fastdiff.config import default_generation_config
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
    have = {_key(one) for one in done}
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


def _key(evaluation: Evaluation) -> tuple[Any, ...]:
    return evaluation["ranking"], evaluation["scheduler"], evaluation["num_steps"], evaluation.get("batch_means")


def _measure(
    cell: Cell, settings: Settings, folder: Path, data: TrainingData, device: str, have: set[tuple[Any, ...]]
) -> Iterator[Evaluation]:
    """Published and clean ranking with the paper's sampler; the other samplers, and batch means, when published."""
    batch_means = BATCH_MEANS.get(cell.data)
    if not (folder / MODEL_FOLDER).exists():
        recipe = training.recipe_class(cell.method)(settings, data)
        recipe.load_state_dict(load_file(folder / "weights.safetensors"))
        wanted: list[tuple[str, int | None]] = [("published", None), ("clean", None)]
        wanted += [("published", batch_means)] if batch_means else []
        for ranking, batch in wanted:
            if (ranking, None, None, batch) not in have:
                yield _measure_queries(recipe.to(device).eval(), data, ranking, batch)
        return
    engine = from_pretrained(folder / MODEL_FOLDER, device=device)
    paper = Sampler.of(default_generation_config(engine.config), engine.config)
    kinds: list[tuple[str, Sampler | None, int | None]] = [("published", None, None), ("clean", None, None)]
    kinds += [("published", sampler, None) for sampler in samplers(engine.config)]
    kinds += [("published", None, batch_means)] if batch_means else []
    for ranking, sampler, batch in kinds:
        scheduler, steps = (sampler.scheduler, sampler.steps) if sampler else (None, None)
        if (ranking, scheduler, steps, batch) in have:
            continue
        arguments: dict[str, Any] = {**(sampler or paper).arguments}
        if ranking == "clean":
            arguments["filter_seen"] = True
        arguments |= _averaged(batch)
        result = evaluate(engine, data.test, ranking, TOP_KS, show_progress=False, **arguments)
        yield {
            "ranking": ranking,
            "scheduler": scheduler,
            "num_steps": steps,
            "batch_means": batch,
            "metrics": result.metrics,
            "users": result.users,
            "seconds_per_user": result.seconds / result.users,
        }


def _averaged(batch_means: int | None) -> dict[str, Any]:
    return {} if batch_means is None else {"average": "batches", "batch_size": batch_means}


@torch.no_grad()
def _measure_queries(recipe: Recipe, data: TrainingData, ranking: str, batch_means: int | None) -> Evaluation:
    """For a model that maps histories to queries: all items, or all but those seen ("clean")."""
    model = recipe.model(recipe.stages()[-1])
    assert isinstance(model, QueryModel)
    started = datetime.datetime.now()
    metrics = measure_queries(model, data, data.test, filter_seen=ranking == "clean", **_averaged(batch_means))
    seconds = (datetime.datetime.now() - started).total_seconds()
    return {
        "ranking": ranking,
        "scheduler": None,
        "num_steps": None,
        "batch_means": batch_means,
        "metrics": metrics,
        "users": len(data.test),
        "seconds_per_user": seconds / len(data.test),
    }


def data_of(cell: Cell, folder: Path) -> TrainingData:
    """Leave-one-out data of `folder/<name>/sequences.txt`."""
    return read(folder / cell.data / "sequences.txt")
