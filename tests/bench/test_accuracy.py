"""The accuracy of trained models: cells, runs that are resumed, rows, and the document that says what the rows say."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine
from bench.accuracy import __main__ as command
from bench.accuracy import cells, logs, report, run
from bench.accuracy.cells import ABLATIONS, BATCH_MEANS, CELLS, DATA, REPORTED, TITLES, VARIANTS, Cell, Variant
from bench.accuracy.rows import Row, append_rows, cell_of, digest, key_of, read_rows
from bench.weights import random_weights
from fastdiff.checkpoint import Checkpoint
from fastdiff.config import default_generation_config
from fastdiff.evaluate import evaluate
from fastdiff.loading import from_pretrained
from fastdiff.metrics import RankingMetrics
from fastdiff.train import run as training
from fastdiff.train.data import read
from fastdiff.train.recipe import Stage
from tests.builders import small_config
from tests.train.tiny import Tiny, walks

TINY = Cell("tiny", "walks", "short", 1)
DRAWN = Cell("drawn", "walks", "short", 1)


class Drawn(Tiny):
    """Trained like the other, but what it makes is a DreamRec model of drawn weights, which the engine runs."""

    method = "drawn"

    def model(self, stage: Stage) -> Any:
        config = small_config("dreamrec", n_items=self.data.n_items)
        return Checkpoint(config, default_generation_config(config), random_weights(config), None)

    def validation_settings(self, stage: Stage) -> dict[str, Any]:
        return {"num_inference_steps": 1}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`bench(...)` is the command over TINY and DRAWN, with everything under tmp_path."""
    (tmp_path / "data" / "walks").mkdir(parents=True)
    lines = [f"{user.user} {' '.join(map(str, user.items))}\n" for user in walks()]
    (tmp_path / "data" / "walks" / "sequences.txt").write_text("".join(lines))
    recipes = {"tiny": Tiny, "drawn": Drawn}
    monkeypatch.setattr(training, "recipe_class", recipes.__getitem__)
    monkeypatch.setattr(command, "CELLS", [TINY, DRAWN])
    monkeypatch.setitem(DATA, "walks", "Walks")
    monkeypatch.setitem(BATCH_MEANS, "walks", 16)
    for method in recipes:
        monkeypatch.setitem(VARIANTS, method, {"short": Variant("two epochs", {"epochs": 2})})
        monkeypatch.setitem(TITLES, method, method.title())
    places = {"rows": tmp_path / "rows.jsonl", "document": tmp_path / "docs" / "accuracy.md", "data": tmp_path / "data"}

    def call(*arguments: str) -> int:
        given = [text for name, path in places.items() for text in (f"--{name}", str(path))]
        return command.main([*arguments, *given])

    return call


# --- cells ------------------------------------------------------------------------------------------------------------


def test_the_cells_are_sound() -> None:
    assert len(set(CELLS)) == len(CELLS)
    for cell in CELLS:
        assert cell.variant in VARIANTS[cell.method]
        assert cell.data in DATA
        assert cell.method in TITLES
    kinds = {(cell.method, cell.variant, cell.data) for cell in CELLS}
    assert {(one.method, one.variant, one.data) for one in REPORTED} <= kinds
    assert {(method, side) for _, method, *sides in ABLATIONS for side in sides} <= {kind[:2] for kind in kinds}


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.seed == 2025], ids=lambda cell: cell.id)
def test_every_cells_settings_are_its_recipes(cell: Cell) -> None:
    settings = run.plain(run.settings_of(cell))
    assert {name: settings[name] for name in cell.settings} == dict(cell.settings)


def test_variants_of_a_method_differ() -> None:
    kinds = {(cell.method, cell.data, cell.variant): digest(run.plain(run.settings_of(cell))) for cell in CELLS}
    assert len({(method, data, found) for (method, data, _), found in kinds.items()}) == len(kinds)


def test_patterns_name_cells_by_their_first_parts() -> None:
    cell = Cell("adrec", "adrec-ml-100k", "recipe", 2025)
    for pattern in ("adrec", "adrec/ml-100k", "adrec/adrec-ml-100k/recipe", "adrec/ml-100k/recipe/2025", "*/ml-100k"):
        assert cell.matches(pattern), pattern
    for pattern in ("sasrec", "adrec/100k", "adrec/beauty", "adrec/ml-100k/recipe/2026", "adrec/ml-100k/recipe/2025/x"):
        assert not cell.matches(pattern), pattern
    assert cells.Cell(*cell.__dict__.values()).id == "adrec/adrec-ml-100k/recipe/2025"


def test_a_digest_is_of_all_settings() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


# --- running ----------------------------------------------------------------------------------------------------------


def test_cells_are_run_once_and_documented(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    assert bench("--list") == 0
    assert capsys.readouterr().out.count("not yet run") == 2
    assert bench(*runs) == 0
    tiny, drawn = read_rows(tmp_path / "rows.jsonl")
    assert (cell_of(tiny), cell_of(drawn)) == (TINY, DRAWN)
    assert tiny["settings"]["epochs"] == 2
    assert tiny["epochs"] == {"table": 2, "map": 2}
    assert tiny["facts"] == {"users": 40, "items": 30, "interactions": 320}
    assert [(one["ranking"], one["batch_means"]) for one in tiny["evaluations"]] == [
        ("published", None),
        ("clean", None),
        ("published", 16),
    ]

    data = read(tmp_path / "data" / "walks" / "sequences.txt")
    folder = run.folder_of(DRAWN, tmp_path / "runs")
    engine = from_pretrained(folder / "model")
    *users, batches = drawn["evaluations"]
    kinds = {(one["ranking"], one["scheduler"], one["num_steps"]): one["metrics"] for one in users}
    own = [(ranking, None, None) for ranking in ("published", "clean")]
    steps = [("published", name, n) for name in ("ddpm", "ddim") for n in (1, 2, 5, 10, 12)]
    assert list(kinds) == [*own, *steps, ("published", "closed_form", 12)]
    given = {"scheduler": "ddim", "num_inference_steps": 5, "show_progress": False}
    assert kinds["published", "ddim", 5] == evaluate(engine, data.test, **given).metrics
    paper = {"scheduler": "ddpm", "num_inference_steps": 12}
    clean = evaluate(engine, data.test, "clean", filter_seen=True, show_progress=False, **paper).metrics
    assert kinds["clean", None, None] == clean != kinds["published", None, None]
    means = evaluate(engine, data.test, batch_size=16, average="batches", show_progress=False, **paper).metrics
    assert (batches["batch_means"], batches["metrics"]) == (16, means)

    with logs.path_of(TINY, tmp_path / "rows.jsonl").open() as file:
        epochs = list(csv.DictReader(file))
    assert [(epoch["stage"], epoch["epoch"]) for epoch in epochs] == [
        (s, str(e)) for s in ("table", "map") for e in (1, 2)
    ]
    assert float(epochs[-1]["HR@20"]) == pytest.approx(tiny["valid"]["HR@20"], rel=1e-5)
    assert float(epochs[0]["loss"]) > 0

    text = (tmp_path / "docs" / "accuracy.md").read_text()
    assert "`walks`: 40 users, 30 items, 320 interactions." in text
    assert f"{100 * tiny['evaluations'][0]['metrics']['HR@20']:.2f}" in text
    capsys.readouterr()
    assert bench("--list") == 0
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()] == [["done", "two", "epochs"]] * 2

    monkeypatch.setattr(run, "run_cell", None)
    monkeypatch.setattr(command, "run_cell", None)  # would raise: nothing is left to run
    assert bench(*runs) == 0
    capsys.readouterr()
    monkeypatch.setitem(BATCH_MEANS, "walks", 9)
    assert bench("--list") == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["incomplete"] * 2
    monkeypatch.setitem(BATCH_MEANS, "walks", 16)
    monkeypatch.setitem(VARIANTS, "tiny", {"short": Variant("", {"epochs": 3})})
    assert bench("--list") == 0
    assert "done with other settings" in capsys.readouterr().out


def test_clean_queries_leave_out_what_was_seen(bench: Callable[..., int], tmp_path: Path) -> None:
    assert bench("--runs", str(tmp_path / "runs"), "--only", "tiny") == 0
    (row,) = read_rows(tmp_path / "rows.jsonl")
    data = read(tmp_path / "data" / "walks" / "sequences.txt")
    recipe = Tiny(run.settings_of(TINY), data)
    weights = run.load_file(run.folder_of(TINY, tmp_path / "runs") / "weights.safetensors")
    recipe.load_state_dict(weights)
    model = recipe.eval().model(recipe.stages()[-1])
    kinds = ((False, "users"), (True, "users"), (False, "batches"))
    for evaluation, (drops, average) in zip(row["evaluations"], kinds, strict=True):
        metrics, lists, targets = RankingMetrics((5, 10, 20)), [], []
        for instance in data.test:
            history = [data.numbers[item] for item in instance.history]
            scores = (model.encode([history]) @ model.item_emb.T)[0].detach()
            if drops:
                scores[history] = -torch.inf
            lists.append(scores.argsort(descending=True)[:20].tolist())
            targets.append(data.numbers[instance.target])
        for at in range(0, len(lists), 16):
            metrics.update(lists[at : at + 16], targets[at : at + 16])
        assert len(lists) % 16  # or the two averages would be one
        expected = metrics.compute(average)
        assert {name: evaluation["metrics"][name] for name in expected} == pytest.approx(expected)


def test_an_interrupted_cell_goes_on(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time is up before a cell; in its training; a crash comes between two evaluations: nothing is done twice."""
    runs = ["--runs", str(tmp_path / "runs"), "--only", "drawn"]
    assert bench(*runs, "--minutes", "0") == 130
    assert "time given is up before drawn/walks/short/1" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()

    monkeypatch.setattr(command, "LEAST_MINUTES", 0.0)
    assert bench(*runs, "--minutes", "1e-4") == 130  # the training saves its state and stops
    assert not (tmp_path / "rows.jsonl").exists()
    assert "not yet run" in (tmp_path / "docs" / "accuracy.md").read_text()
    assert bench("--list", *runs) == 0
    assert "begun" in capsys.readouterr().out

    real, calls = run.evaluate, []

    def crashing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(run, "evaluate", crashing)
    with pytest.raises(KeyboardInterrupt):
        bench(*runs)
    monkeypatch.setattr(training, "train", None)  # would raise: the training is complete
    assert bench(*runs) == 0
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert len(row["evaluations"]) == len(set(map(key_of, row["evaluations"]))) == 14
    assert len(calls) == 14 + 1


def test_what_is_wrong_is_said(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench("--only", "adrec") == 2
    assert "no cell is adrec; --list shows them, such as tiny/walks/short/1" in capsys.readouterr().err
    monkeypatch.setattr(command, "ROOT", tmp_path / "nowhere" / "repository")
    monkeypatch.delenv("FASTDIFF_MATERIAL", raising=False)
    assert command.main(["--runs", str(tmp_path / "runs")]) == 2
    assert "--data: there is no folder" in capsys.readouterr().err


# --- rows and the document --------------------------------------------------------------------------------------------


def a_row(seed: int, hr: float, variant: str = "ce", settings: str = "abc", date: str = "2026-01-01") -> Row:
    metrics = dict.fromkeys(report.METRICS, hr)
    evaluations = [
        {
            "ranking": ranking,
            "scheduler": None,
            "num_steps": None,
            "metrics": metrics,
            "users": 9,
            "seconds_per_user": 1,
        }
        for ranking in ("published", "clean")
    ]
    return {
        **{"method": "sasrec", "data": "amazon-office", "variant": variant, "seed": seed, "settings_digest": settings},
        **{"epochs": {"train": 30}, "seconds": 600.0, "evaluations": evaluations, "date": date},
        "settings": {"hidden_size": 48},
        "facts": {"users": 4905, "items": 2420, "interactions": 53258},
        "machine": machine.facts(torch.device("cpu")),
    }


OFFICE = [Cell("sasrec", "amazon-office", variant, seed) for variant in ("ce", "bce") for seed in (1, 2, 3)]


def line_of(text: str, *parts: str) -> list[str]:
    """The cells of the only line of a table that has cells with just these texts."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (line,) = [line for line in lines if set(parts) <= set(line)]
    return line


def test_means_and_spreads_over_seeds() -> None:
    rows = [a_row(1, 0.10), a_row(2, 0.12), a_row(3, 0.14), a_row(1, 0.09, "bce")]
    text = report.render(rows, OFFICE)
    full = line_of(text, VARIANTS["sasrec"]["ce"].what)
    assert full[2:5] == ["48", "3", "12.00 ± 2.00"]
    assert full[-2:] == ["30", "10 min"]
    assert "means of 512: HR@20" not in text  # ADRec's files alone
    assert line_of(text, VARIANTS["sasrec"]["bce"].what)[3:5] == ["1 of 3", "9.00"]
    ablation = line_of(text, "cross-entropy over the catalogue instead of one negative")
    assert ablation[3:] == ["1", "9.00", "10.00", "9.00", "10.00"]  # the seed that both have


def test_batch_means_where_they_are_what_is_reported() -> None:
    row = {**a_row(1, 0.10), "data": "adrec-sports"}
    row["evaluations"].append(
        {**row["evaluations"][0], "batch_means": 512, "metrics": dict.fromkeys(report.METRICS, 0.11)}
    )
    text = report.render([row], [Cell("sasrec", "adrec-sports", "ce", seed) for seed in (1, 2)])
    head = line_of(text, "means of 512: HR@20")
    line = line_of(text, VARIANTS["sasrec"]["ce"].what)
    assert len(line) == len(head)
    assert [line[head.index(name)] for name in ("HR@20", "clean HR@20", "means of 512: HR@20")] == [
        "10.00",
        "10.00",
        "11.00",
    ]
    blank = line_of(report.render([], [Cell("sasrec", "adrec-sports", "ce", 1)]), "not yet run")
    assert len(blank) == len(head)


def test_figures_of_different_settings_are_not_averaged() -> None:
    rows = [a_row(1, 0.10), a_row(2, 0.20, settings="xyz", date="2026-01-02"), a_row(3, 0.12)]
    assert line_of(report.render(rows, OFFICE), VARIANTS["sasrec"]["ce"].what)[3:5] == [
        "1 of 3",
        "20.00",
    ]


def test_what_was_not_run_and_what_others_report() -> None:
    text = report.render([], CELLS)
    adrec = line_of(text, "ADRec", "0 of 3", "22.4 / 8.55 (1)")
    assert adrec[4] == "not yet run"
    assert "1. Reported: the authors' public code, trained on this file; the same weights averaged over users" in text
    assert text.count("Not yet run.") == 5  # accuracy against steps, of each method
    assert "cannot be rebuilt from these files" in text


def test_rows_are_appended_and_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_rows(path, [a_row(1, 0.1), a_row(2, 0.2)])
    append_rows(path, [a_row(1, 0.3)])
    assert [row["evaluations"][0]["metrics"]["HR@20"] for row in read_rows(path)] == [0.3, 0.2]
    assert len(path.read_text().splitlines()) == 3
    path.write_text('{"method": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not a row of this bench"):
        read_rows(path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not a JSON object"):
        read_rows(path)


def test_every_row_has_its_training_log() -> None:
    for row in read_rows(command.ROWS):
        with logs.path_of(cell_of(row), command.ROWS).open(newline="") as file:
            lines = list(csv.DictReader(file))
        stages = [line["stage"] for line in lines]
        assert {stage: stages.count(stage) for stage in row["epochs"]} == row["epochs"]
        assert float(lines[-1]["seconds"]) == pytest.approx(row["seconds"], abs=0.06)
    written = {logs.path_of(cell_of(row), command.ROWS) for row in read_rows(command.ROWS)}
    assert set((command.ROWS.parent / logs.FOLDER).iterdir()) == written


def test_the_document_says_what_the_rows_say() -> None:
    """python -m bench.accuracy writes it again."""
    rows = read_rows(command.ROWS)
    assert command.DOCUMENT.read_text(encoding="utf-8") == report.render(rows)
    for method, data, variant in {(row["method"], row["data"], row["variant"]) for row in rows}:
        if name := report.plot_name(method, data, variant, rows):
            assert (command.DOCUMENT.parent / report.PLOTS / name).is_file(), name
