"""`fastdiff train`: what it says, refuses, writes; a process that is killed and resumed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff import cli
from fastdiff.train import run as runs
from fastdiff.train import trainer
from fastdiff.train.data import leave_one_out
from fastdiff.train.recipe import Stage
from fastdiff.train.trainer import Interrupted
from fastdiff.train.validation import measure
from tests.train.tiny import Tiny, walks

SMALL = ["--set", "hidden_size=16", "--set", "epochs=2", "--no-progress", "--threads", "1"]


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    path = tmp_path / "walks.txt"
    path.write_text("".join(f"{user.user} {' '.join(map(str, user.items))}\n" for user in walks()))
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "recipe_class", lambda name: Tiny)


def test_settings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "sasrec", "--show-settings", "--set", "epochs=7"]) == 0
    out = capsys.readouterr().out
    assert "epochs = 7" in out
    assert "hidden_size = " in out


@pytest.mark.usefixtures("tiny")
def test_what_a_run_says_and_writes(sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "one"
    command = ["train", "tiny", str(sequences), "--output", str(folder), "--no-progress"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "40 users" in err
    assert "epoch     3/3  loss" in err
    result = json.loads((folder / "result.json").read_text())
    assert f"{100 * result['test']['HR@20']:.2f}" in out
    with (folder / "log.csv").open() as file:
        names = {row["name"] for row in csv.DictReader(file)}
    assert (folder / "training.png").stat().st_size > 10_000
    assert {"loss", "ce", "drift", "learning_rate", "examples_per_second", "HR@20", "NDCG@20"} <= names

    assert cli.main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert json.loads((folder / "result.json").read_text()) == result


@pytest.mark.usefixtures("tiny")
def test_a_run_out_of_time_says_how_to_go_on(
    sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "tiny", str(sequences), "--output", str(tmp_path / "run"), "--no-progress"]
    assert cli.main([*command, "--minutes", "0"]) == 130
    assert "--resume goes on with it" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()
    assert cli.main([*command, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gru4rec", "x", "--output", "y"], "unknown method 'gru4rec'; known methods: adrec, tarec"),
        (["sasrec", "nothing.txt", "--output", "y"], "nothing.txt: there is no such file"),
        (["sasrec", "x", "--output", "y", "--set", "epoch=3"], "unknown settings epoch"),
        (["sasrec", "x", "--output", "y", "--preset", "mars"], "no settings named 'mars'"),
        (["sasrec", "x", "--output", "y", "--threads", "0"], "--threads: must be at least 1 (got 0)"),
        (["sasrec", "x", "--output", "y", "--settings", "z"], "z: cannot be opened (No such file or directory)"),
        (
            ["--resume", "--output", "y"],
            "--resume: there is no run in y to go on with; give the folder of one, or METHOD",
        ),
        (["--resume", "--output", "fastdiff"], "fastdiff exists and holds no training run; give the folder of the run"),
    ],
)
def test_what_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("y").exists()


def test_the_output_is_refused_before_the_data_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["train", "sasrec", "no-such-file.txt", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "exists and holds no training run" in error
    assert "no-such-file" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sasrec", "walks.txt"], "--output is needed"),
        (["sasrec", "--output", "no-such-run"], "DATA is needed"),
        (["--output", "no-such-run"], "METHOD is needed: adrec, tarec, dreamrec"),
    ],
)
def test_what_is_needed(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", *options])
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_run_remembers_what_it_was_begun_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"u{user.user} {' '.join(f'i{item}' for item in user.items)}\n" for user in walks()]
    (tmp_path / "walks.txt").write_text("".join([*lines, "short i1 i2\n"]))
    monkeypatch.chdir(tmp_path)
    begun = ["tiny", "walks.txt", "--text-ids", "--min-items", "3", "--set", "epochs=2", "--seed", "7", "--all-steps"]
    quiet = ["--no-progress", "--threads", "1"]
    assert cli.main(["train", *begun, *quiet, "--output", "unbroken"]) == 0
    assert cli.main(["train", *begun, *quiet, "--output", "run", "--minutes", "0"]) == 130
    monkeypatch.chdir(tmp_path / "run")
    resume = ["train", "--resume", "--output", str(tmp_path / "run"), *quiet]
    capsys.readouterr()
    assert cli.main([*resume, "tiny", "--set", "epochs=3", "--seed", "8"]) == 2
    assert "was made otherwise: seed was 7, now 8; settings.epochs was 2, now 3; leave" in capsys.readouterr().err
    assert cli.main([*resume, "sasrec"]) == 2
    assert "method was" in capsys.readouterr().err
    assert cli.main(resume) == 0
    err = capsys.readouterr().err
    assert f"run           tiny, seed 7, in {tmp_path / 'run'}" in err
    assert "settings      those that the run was begun with" in err
    one, two = (torch.load(tmp_path / run / "state.pt", weights_only=True)["recipe"] for run in ("run", "unbroken"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    records = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("run", "unbroken")]
    assert records[0] == records[1]


@pytest.mark.usefixtures("tiny")
def test_a_run_on_data_from_no_file_asks_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        runs.train("tiny", leave_one_out(walks()), tmp_path / "run", minutes=0, show_progress=False)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", "--output", str(tmp_path / "run")])
    assert "run does not say where its data were read" in capsys.readouterr().err


def test_the_result_is_a_model_folder(sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    command = ["train", "dreamrec", str(sequences), "--output", str(folder), *SMALL, "--set", "num_train_timesteps=20"]
    assert cli.main(command) == 0
    capsys.readouterr()
    engine = fastdiff.from_pretrained(folder / "model")
    assert engine.generate([[3, 4, 5]], top_k=3, seed=1).item_ids.shape == (1, 3)
    with (folder / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["scheduler"] for row in rows} >= {"ddpm", "ddim"}
    assert {row["name"] for row in rows} == {"HR@20", "NDCG@20", "seconds_per_user"}

    assert cli.main(["evaluate", str(folder / "model"), str(sequences), "--json", "--no-progress"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["HR@20"] == json.loads((folder / "result.json").read_text())["test"]["HR@20"]


def test_a_killed_process_is_resumed_to_the_same_weights(
    sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(folder: Path) -> list[str]:
        return ["train", "sasrec", str(sequences), "--output", str(folder), *SMALL, "--set", "epochs=40"]

    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "fastdiff", *command(folder)], stderr=subprocess.DEVNULL)
    while not (folder / "state.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert cli.main([*command(folder), "--resume"]) == 0
    assert cli.main(command(tmp_path / "unbroken")) == 0
    capsys.readouterr()
    one, two = (torch.load(run / "state.pt", weights_only=True)["recipe"] for run in (folder, tmp_path / "unbroken"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("tiny")
def test_bfloat16_runs_the_losses_under_autocast(
    sequences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    losses = Tiny.losses

    def watched(self: Tiny, *arguments: object) -> object:
        seen.append(torch.is_autocast_enabled("cpu"))
        return losses(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Tiny, "losses", watched)
    command = ["train", "tiny", str(sequences), "--output", str(tmp_path / "run"), "--no-progress"]
    assert cli.main([*command, "--precision", "bfloat16"]) == 0
    assert all(seen)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert all(weight.dtype == torch.float32 for weight in state["recipe"].values())


@pytest.mark.usefixtures("tiny")
def test_what_a_run_cannot_do_is_said(sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    command = ["train", "tiny", str(sequences), "--output", str(folder), "--no-progress", "--resume"]
    assert cli.main([*command, "--set", "epochs=0"]) == 2
    assert "no stage has an epoch to run (stages: table, map)" in capsys.readouterr().err
    assert cli.main([*command, "--set", "batch_size=0"]) == 2
    assert "batch_size of stage table must be at least 1 (got 0)" in capsys.readouterr().err
    assert not folder.exists()
    assert cli.main([*command, "--set", "epochs=1", "--set", "learning_rate=0"]) == 0
    err = capsys.readouterr().err
    assert f"there is no run in {folder} to go on with: a new one begins" in err
    assert "about that of random items (66.67 %)" in err
    assert cli.main(["evaluate", str(folder), str(sequences)]) == 2
    assert f"{folder} is a run of `fastdiff train`; it has no model (yet)" in capsys.readouterr().err
    (folder / "model").mkdir()
    assert cli.main(["evaluate", str(folder), str(sequences)]) == 2
    assert f"give its model, {folder / 'model'}" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_run_is_not_resumed_with_other_data(
    sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "tiny", str(sequences), "--output", str(tmp_path / "run"), "--no-progress"]
    assert cli.main([*command, "--minutes", "0"]) == 130
    sequences.write_text(sequences.read_text() + "99 1 2 3 4\n")
    assert cli.main([*command, "--resume"]) == 2
    told = "the data are others (users, items, their order or the split); give those that it began with, read from "
    assert f"{told}{sequences}; or give another folder" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_data_that_have_moved_are_asked_for_once(
    sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, moved = str(tmp_path / "run"), tmp_path / "moved.txt"
    command = ["train", "tiny", str(sequences), "--output", folder, "--no-progress"]
    assert cli.main([*command, "--minutes", "0"]) == 130
    sequences.rename(moved)
    bare = ["train", "--resume", "--output", folder, "--no-progress"]
    assert cli.main(bare) == 2
    assert f"say where to: fastdiff train tiny DATA --resume --output {folder}" in capsys.readouterr().err
    assert cli.main(["train", "tiny", str(moved), *bare[1:], "--minutes", "0"]) == 130
    assert cli.main(bare) == 0
    capsys.readouterr()
    assert cli.main(bare) == 0
    assert "is complete; its result is measured again" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_an_interruption_after_the_last_epoch_says_how_to_go_on(
    sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as during:
        during.setattr(runs, "plot_run", interrupted)
        assert cli.main(["train", "tiny", str(sequences), "--output", str(folder), "--no-progress"]) == 130
    assert f"interrupted after the last epoch; {folder} holds the weights: --resume" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--output", str(folder), "--no-progress"]) == 0
    assert (folder / "training.png").exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("first", "told"), [(0.9, True), (0.1, False)])
def test_a_stage_that_validated_better_than_the_last_one_is_named(
    sequences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    first: float,
    told: bool,
) -> None:
    def measured(recipe: Tiny, stage: Stage, *arguments: object, **options: object) -> dict[str, float]:
        value = first if stage.name == "table" else 0.5
        return {**measure(recipe, stage, *arguments, **options), "HR@5": value}  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "measure", measured)
    command = ["train", "tiny", str(sequences), "--output", str(tmp_path / "run"), "--no-progress"]
    assert cli.main(command) == 0
    note = "stage table had HR@5 90.00 % after epoch 1, stage map, whose weights the model has, 50.00 %"
    assert (note in capsys.readouterr().err) is told


def test_the_epoch_that_a_stage_keeps_is_the_last_with_any_watched_metric_higher() -> None:
    stage = Stage("full", 3, 1, 0.1, watch=("HR@20", "NDCG@20"))
    validated = {1: (0.1, 0.3), 2: (0.2, 0.2), 3: (0.1, 0.1)}
    log = [
        (stage_name, epoch, 0, 0.0, name, value)
        for stage_name in ("other", "full")
        for epoch, values in validated.items()
        for name, value in zip(stage.watch, values, strict=True)
        if stage_name == "full" or epoch == 1
    ]
    assert runs._kept(SimpleNamespace(log=log), stage) == (2, {"HR@20": 0.2, "NDCG@20": 0.2})  # type: ignore[arg-type]
    assert runs._kept(SimpleNamespace(log=[]), stage) == (0, {})  # type: ignore[arg-type]


@pytest.mark.usefixtures("tiny")
def test_what_is_done_at_the_end_may_be_asked_for_anew(
    sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert cli.main(["train", "tiny", str(sequences), "--output", str(folder), "--no-progress"]) == 0
    resume = ["train", "--resume", "--output", str(folder), "--no-progress"]
    assert cli.main([*resume, "--all-steps"]) == 0
    assert json.loads((folder / "run.json").read_text())["all_steps"] is True
    capsys.readouterr()
    assert cli.main(["train", str(sequences), *resume[1:]]) == 2
    assert f"give both, METHOD first: fastdiff train tiny {sequences} --resume" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_damaged_state_is_named(sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    command = ["train", "tiny", str(sequences), "--output", str(folder), "--no-progress"]
    assert cli.main([*command, "--minutes", "0"]) == 130
    whole = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(whole[: len(whole) // 2])
    assert cli.main([*command, "--resume"]) == 2
    assert "state.pt: damaged or cut short; delete this file to begin" in capsys.readouterr().err
    (folder / "state.pt").unlink()
    assert cli.main([*command, "--resume"]) == 0
