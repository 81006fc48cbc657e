"""The trainer: one seed gives one result, kills at any moment change nothing, errors keep what was done."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.errors import DataError, InvalidArgument
from fastdiff.train import run as runs
from fastdiff.train import trainer as trainers
from fastdiff.train.run import train
from fastdiff.train.run_folder import RunFolder
from fastdiff.train.trainer import Interrupted, Trainer, TrainingFailed
from tests.train.tiny import Tiny, TinySettings, tiny_data


class Killed(BaseException):
    """What a kill looks like from inside: nothing is caught, nothing is saved."""


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runs.recipe_class
    monkeypatch.setattr(runs, "recipe_class", lambda name: Tiny if name == "tiny" else real(name))


def _train(folder: Path, settings: TinySettings | None = None, **options: Any) -> dict[str, Any]:
    options = {"show_progress": False, "say": lambda line: None, **options}
    return train("tiny", tiny_data(), folder, settings or TinySettings(), **options)


def _weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)["recipe"]


def _log(folder: Path) -> list[tuple[str, ...]]:
    """The log without its times."""
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    timed = {"examples_per_second"}
    return [(r["stage"], r["epoch"], r["step"], r["name"], r["value"]) for r in rows if r["name"] not in timed]


def _assert_same_run(one: Path, two: Path) -> None:
    a, b = _weights(one), _weights(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert _log(one) == _log(two)


def test_one_seed_gives_one_result(tmp_path: Path) -> None:
    results = [_train(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    _assert_same_run(tmp_path / "a", tmp_path / "b")
    assert results[0]["test"] == results[1]["test"]
    assert not torch.equal(_weights(tmp_path / "a")["map.weight"], _weights(tmp_path / "c")["map.weight"])


def test_it_learns(tmp_path: Path) -> None:
    result = _train(tmp_path / "run", TinySettings(epochs=20))
    assert result["test"]["HR@5"] > 0.6  # 2 of 30 items can follow
    assert result["epochs"] == {"table": 20, "map": 20}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "recipe_class", lambda name: Tiny)
        torch.set_num_threads(1)
        _train(folder)
    return folder


@pytest.mark.parametrize("calls", [0, 1, 7, 13, 14, 45, 57])
@pytest.mark.parametrize("save_seconds", [0.0, 1e9])
def test_a_kill_at_any_batch_changes_nothing(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, save_seconds: float
) -> None:
    """Also where the kill comes again and again; with a state after every batch, and with one per epoch."""
    monkeypatch.setattr(trainers, "SAVE_SECONDS", save_seconds)
    losses, left = Tiny.losses, [calls]

    def killed_after(self: Tiny, *arguments: Any) -> dict[str, Tensor]:
        if left[0] == 0:
            torch.rand(100)  # what a kill interrupts may have drawn
            raise Killed
        left[0] -= 1
        return losses(self, *arguments)

    monkeypatch.setattr(Tiny, "losses", killed_after)
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        _train(folder)
    left[0] = 5 if save_seconds == 0 else 18
    with pytest.raises(Killed):
        _train(folder, resume=True)
    left[0] = -1
    _train(folder, resume=True)
    _assert_same_run(folder, unbroken)


def test_a_kill_while_the_state_is_written_leaves_the_one_before(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, saved = tmp_path / "run", []

    def torn(value: Any, file: Any) -> None:
        saved.append(1)
        if len(saved) == 4:
            file.write(b"half a state")
            raise Killed
        original(value, file)

    original = torch.save
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(Killed):
        _train(folder)
    _train(folder, resume=True)
    _assert_same_run(folder, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    losses, count = Tiny.losses, [0]

    def signalled(self: Tiny, *arguments: Any) -> dict[str, Tensor]:
        count[0] += 1
        if count[0] == 20:
            os.kill(os.getpid(), number)
        return losses(self, *arguments)

    monkeypatch.setattr(Tiny, "losses", signalled)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="--resume"):
        _train(tmp_path / "run")
    assert signal.getsignal(number) == before
    assert count[0] == 20  # the batch under way was finished, and no other begun
    _train(tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", unbroken)


def test_time_that_is_up_stops_with_the_state_saved(unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="time"):
        _train(tmp_path / "run", minutes=0.0)
    _train(tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_run_may_be_resumed_and_stays_as_it_is(unbroken: Path) -> None:
    before = json.loads((unbroken / "result.json").read_text())
    assert _train(unbroken, resume=True) == before


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    _train(tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


def test_only_what_a_stage_trains_changes_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    recipe = Tiny(TinySettings(epochs=6), tiny_data())
    folder = RunFolder(tmp_path)
    trainer = Trainer(recipe, folder, seed=3, show_progress=False, say=lambda line: None)
    seen: list[dict[str, Tensor]] = []
    begin = Tiny.enter

    def entering(stage: Any) -> None:
        begin(recipe, stage)
        seen.append({name: weight.clone() for name, weight in recipe.state_dict().items()})

    recipe.enter = entering  # type: ignore[method-assign]
    trainer.run()
    start, middle, end = *seen, recipe.state_dict()
    assert torch.equal(start["map.weight"], middle["map.weight"])
    assert not torch.equal(start["items.weight"], middle["items.weight"])
    assert torch.equal(middle["items.weight"], end["items.weight"])
    assert torch.equal(end["reference.weight"], middle["map.weight"])

    values = [float(row[5]) for row in trainer.log if row[0] == "map" and row[4] == "HR@5"]
    from fastdiff.train.validation import measure

    assert measure(recipe, trainer.stages[-1], recipe.data.valid)["HR@5"] == max(values)


def test_patience_ends_a_stage(tmp_path: Path) -> None:
    settings = TinySettings(epochs=50, learning_rate=0.0, patience=3)
    result = _train(tmp_path / "run", settings)
    assert result["epochs"] == {"table": 50, "map": 4}  # the first validation is the best; three more are not better


def test_any_of_the_metrics_watched_makes_a_validation_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the last better one are kept, and patience counts from it."""
    found = [(0.1, 0.5), (0.2, 0.4), (0.1, 0.6), (0.2, 0.6), (0.1, 0.5), (0.9, 0.9)]
    values, weights = iter(found), []

    def measured(recipe: Tiny, *arguments: Any) -> dict[str, float]:
        weights.append(recipe.items.weight.detach().clone())
        return dict(zip(("HR@5", "NDCG@5"), next(values), strict=True))

    monkeypatch.setattr(trainers, "measure", measured)
    recipe = Tiny(TinySettings(epochs=20, patience=2), tiny_data())
    first = replace(recipe.stages()[0], patience=2, watch=("HR@5", "NDCG@5"))
    recipe.stages = lambda: [first]  # type: ignore[method-assign]
    trainer = Trainer(recipe, RunFolder(tmp_path), seed=3, show_progress=False, say=lambda line: None)
    trainer.run()
    assert len(weights) == 5  # better: 1, 2, 3
    assert torch.equal(recipe.items.weight, weights[2])


def test_the_learning_rate_falls_along_the_cosine(tmp_path: Path) -> None:
    _train(tmp_path / "run")
    rates = [float(row[4]) for row in _log(tmp_path / "run") if row[0] == "table" and row[3] == "learning_rate"]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for rate in rates:
        assert rate == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_the_gradient_is_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    real = torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, bound: float) -> None:
        parameters = list(parameters)
        real(parameters, bound)
        norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    _train(tmp_path / "run", TinySettings(clip_norm=0.05))
    assert norms
    assert max(norms) <= 0.05 * 1.001


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_state(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"stage table, epoch 2, batch 3 \(ce = nan\).*learning rate \(now"):
        _train(tmp_path / "run", TinySettings(poison_after=_batches() + 2))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"]["epoch"] == 1
    assert all(torch.isfinite(weight).all() for weight in state["recipe"].values())


def _batches() -> int:
    return -(-len(Tiny(TinySettings(), tiny_data()).pairs) // TinySettings.batch_size)


def test_folders_are_never_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidArgument, match="holds no training run"):
        _train(tmp_path / "other")
    _train(tmp_path / "run")
    with pytest.raises(InvalidArgument, match="--resume"):
        _train(tmp_path / "run")
    with pytest.raises(InvalidArgument, match=r"settings\.epochs was 3, now 4"):
        _train(tmp_path / "run", replace(TinySettings(), epochs=4), resume=True)
    with pytest.raises(InvalidArgument, match="seed was 2025, now 1"):
        _train(tmp_path / "run", seed=1, resume=True)
    (tmp_path / "run" / "state.pt").write_bytes(b"rust")
    with pytest.raises(DataError, match=r"state\.pt: damaged or cut short"):
        _train(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half"}, "precision must be one of"),
        ({"settings": object()}, "settings must be TinySettings"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    settings = options.pop("settings", None)
    with pytest.raises(InvalidArgument, match=message):
        _train(tmp_path / "run", settings, **options)
    assert not (tmp_path / "run").exists()


def test_unknown_methods_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="unknown method 'gru4rec'; known methods: adrec"):
        train("gru4rec", tiny_data(), tmp_path / "run")
