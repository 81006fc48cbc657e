"""`train()`: one recipe on one data set, from nothing or from where a run stopped, to a model with its figures."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from fastdiff.arguments import check_device
from fastdiff.checkpoint import MODEL_FOLDER, Checkpoint, write_folder
from fastdiff.errors import InvalidArgument
from fastdiff.sampler import Sampler
from fastdiff.train.data import TrainingData
from fastdiff.train.plots import PLOT_FILE, NoMatplotlib, plot_run
from fastdiff.train.recipe import QueryModel, Recipe, Settings, Stage
from fastdiff.train.run_folder import ALL_STEPS, RESULT_FILE, SETTINGS, RunFolder
from fastdiff.train.steps import Measured, fewest_steps, measure_steps
from fastdiff.train.trainer import Interrupted, Trainer, check_stages, higher_than
from fastdiff.train.validation import TOP_KS, measure

METHODS = ("adrec", "tarec", "dreamrec", "cddrec", "dimerec", "sasrec")
PRECISIONS = ("float32", "bfloat16")


def recipe_class(method: str) -> type[Recipe]:
    """The recipe of a method, from the file of its name."""
    if method not in METHODS:
        raise InvalidArgument(f"train: unknown method {method!r}; known methods: {', '.join(METHODS)}")
    module = importlib.import_module(f"fastdiff.train.{method}")
    (kind,) = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Recipe) and getattr(value, "method", None) == method
    }
    return kind


def train(
    method: str,
    data: TrainingData,
    folder: str | Path,
    settings: Settings | None = None,
    seed: int = 2025,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    resume: bool = False,
    minutes: float | None = None,
    all_steps: bool = False,
    show_progress: bool = True,
    say: Callable[[str], None] = tqdm.write,
) -> dict[str, Any]:
    """Train and write `folder` (see `run_folder`); returns what its result.json holds.

    settings   of the method's recipe; None: its defaults
    seed       one seed, one result (on one machine, with one number of threads, on a CPU)
    device     "cpu", "cuda", "cuda:N"
    precision  "float32"; "bfloat16" runs the losses under autocast, weights and optimizer stay float32
    resume     go on with the run in `folder`, which must be of the same method, settings, data and seed
               (`RunFolder.record` has them)
    minutes    stop after so long with `Interrupted`; the state is saved
    all_steps  the model's default sampler is the paper's; False: the one of fewest steps that costs nothing on the
               validation users (`fastdiff.train.steps`), which is what result.json's figures are of
    """
    kind = recipe_class(method)
    settings = kind.Settings() if settings is None else settings
    if not isinstance(settings, kind.Settings):
        raise InvalidArgument(
            f"train: settings must be {kind.Settings.__name__}, those of {method} (got {type(settings).__name__})"
        )
    if precision not in PRECISIONS:
        raise InvalidArgument(f"train: precision must be one of {', '.join(PRECISIONS)} (got {precision!r})")
    place = check_device(device, torch.device("cpu"))
    run = RunFolder(folder)
    record = {
        "method": method,
        "seed": seed,
        "precision": precision,
        "device": place.type,
        ALL_STEPS: all_steps,
        "data": data_digest(data),
        **{SETTINGS + name: value for name, value in json.loads(json.dumps(dataclasses.asdict(settings))).items()},
    }
    with torch.random.fork_rng(devices=[]):  # before anything is written: a recipe may refuse the data
        torch.manual_seed(seed)
        recipe = kind(settings, data).to(place)
    check_stages(recipe.stages())
    if resume and not run.exists():
        say(f"there is no run in {folder} to go on with: a new one begins")
    state = run.open(record, None if data.source is None else dataclasses.asdict(data.source), resume)
    trainer = Trainer(recipe, run, seed, precision, minutes, show_progress, say)
    if state is not None and state["progress"]["done"]:
        say(f"the training in {folder} is complete; its result is measured again")
    trainer.run(state)
    _note_on_stages(trainer)
    try:
        return _finish(recipe, trainer, run, seed, all_steps)
    except KeyboardInterrupt as stopped:
        raise Interrupted(
            f"train: interrupted after the last epoch; {folder} holds the weights: --resume measures them and writes "
            "the model"
        ) from stopped


def _finish(recipe: Recipe, trainer: Trainer, run: RunFolder, seed: int, all_steps: bool) -> dict[str, Any]:
    stage = trainer.stages[-1]
    recipe.eval()
    with torch.no_grad():
        model = recipe.model(stage)
    sampler: dict[str, Any] = {}
    if isinstance(model, Checkpoint):
        measured = measure_steps(recipe, model)
        run.write_steps([row for one in measured for row in one.rows()])
        model, sampler = _with_sampler(model, measured, all_steps)
    result: dict[str, Any] = {
        "method": recipe.method,
        "seed": seed,
        "epochs": _last_epochs(trainer),
        "seconds": round(trainer.log[-1][3], 1) if trainer.log else 0.0,
        "parameters": sum(parameter.numel() for parameter in recipe.parameters()),
        "valid": measure(recipe, stage, recipe.data.valid, model=model),
        "test": measure(recipe, stage, recipe.data.test, model=model),
        **sampler,
    }
    if isinstance(model, QueryModel):
        weights = {name: weight.detach().cpu().contiguous() for name, weight in recipe.state_dict().items()}
        save_file(weights, run.path / "weights.safetensors")
    else:
        write_folder(run.path / MODEL_FOLDER, model)
    run.write_json(RESULT_FILE, result)
    chance = TOP_KS[-1] / recipe.data.n_items
    if result["valid"][f"HR@{TOP_KS[-1]}"] < 2 * chance:
        trainer.say(
            f"HR@{TOP_KS[-1]} is about that of random items ({100 * chance:.2f} %): nothing was learned; other "
            "settings may do (--show-settings, --preset)"
        )
    try:
        plot_run(run.path)
    except NoMatplotlib as missing:
        trainer.say(f"no {PLOT_FILE}: {missing}")
    return result


def _with_sampler(
    model: Checkpoint, measured: Sequence[Measured], all_steps: bool
) -> tuple[Checkpoint, dict[str, Any]]:
    """The model with its default sampler, and what result.json says about it."""
    paper = Sampler.of(model.generation_config, model.config)
    chosen = next(one for one in measured if one.sampler == paper) if all_steps else fewest_steps(measured, paper)
    generation = chosen.sampler.generation_config(model.generation_config, model.config)
    by_sampler = {one.sampler: one.metrics for one in measured}
    told = {
        name: {**vars(sampler), "valid": by_sampler[sampler]}
        for name, sampler in (("sampler", chosen.sampler), ("paper_sampler", paper))
    }
    return replace(model, generation_config=generation), told


def _note_on_stages(trainer: Trainer) -> None:
    """What comes out is the last stage's; where the validation users liked an earlier one better, say so."""
    *earlier, last = trainer.stages
    name = last.watch[-1]
    here = _kept(trainer, last)
    found = [
        (metrics[name], stage, epoch) for stage in earlier for epoch, metrics in [_kept(trainer, stage)] if metrics
    ]
    if not here[1] or not found:
        return
    value, stage, epoch = max(found, key=lambda one: one[0])
    if value > here[1][name]:
        trainer.say(
            f"note: on the validation users stage {stage.name} had {name} {100 * value:.2f} % after epoch {epoch}, "
            f"stage {last.name}, whose weights the model has, {100 * here[1][name]:.2f} %"
        )


def _kept(trainer: Trainer, stage: Stage) -> tuple[int, dict[str, float]]:
    """The epoch whose weights a stage ended with, and its metrics: the last one with a watched metric higher than ever.
    (0, {}) where nothing was validated."""
    epochs: dict[int, dict[str, float]] = {}
    for its, epoch, _, _, name, value in trainer.log:
        if its == stage.name:
            epochs.setdefault(epoch, {})[name] = value
    kept: tuple[int, dict[str, float]] = (0, {})
    best: dict[str, float] = {}
    for epoch, metrics in epochs.items():
        if higher := higher_than(best, metrics, stage):
            best |= higher
            kept = (epoch, metrics)
    return kept


def _last_epochs(trainer: Trainer) -> dict[str, int]:
    last: dict[str, int] = {}
    for stage, epoch, *_ in trainer.log:
        last[stage] = epoch
    return last


def data_digest(data: TrainingData) -> str:
    """A short hash of everything that is learned from or measured on."""
    total = hashlib.sha256(repr(list(data.item_ids)).encode())
    for sequence in data.sequences:
        total.update(sequence.tobytes() + b";")
    for instances in (data.valid, data.test):
        total.update(repr([(row.history, row.target) for row in instances]).encode())
    return total.hexdigest()[:16]
