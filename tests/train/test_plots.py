"""The page of plots of a training run, from its logs alone."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdiff.errors import DataError
from fastdiff.train import plots
from fastdiff.train.plots import NoMatplotlib, plot_run, read_log, read_steps
from fastdiff.train.run_folder import LOG_COLUMNS, LOG_FILE, STEPS_COLUMNS, STEPS_FILE, RunFolder

STEPS = [
    ("ddpm", 10, "HR@20", 0.2),
    ("ddpm", 1, "HR@20", 0.1),
    ("ddpm", 1, "seconds_per_user", 1e-5),
    ("one_step", 1, "HR@20", 0.15),
]


def log_rows(stages: dict[str, int], metrics: bool = True) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for stage, epochs in stages.items():
        for epoch in range(1, epochs + 1):
            values = {"loss": 3.0 / epoch, "ce": 2.0 / epoch, "mse": 1.0 / epoch, "learning_rate": 1e-3}
            values |= {"examples_per_second": 100.0}
            if metrics and epoch == epochs:
                values |= {"HR@5": 0.05, "HR@20": 0.2, "NDCG@20": 0.1, "coverage@20": 0.9}
            rows += [(stage, epoch, 10 * epoch, 1.0, name, value) for name, value in values.items()]
    return rows


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure behind the PNG of `plot_run`."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    pages = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda page, *a, **k: (pages.append(page), save(page, *a, **k)))
    path = plot_run(folder)
    assert path == folder / "training.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    return pages[0]


@pytest.mark.parametrize(
    "stages", [{"train": 1}, {"train": 500}, {"pretrain": 60, "warm_up": 2, "all": 300}, {"a": 3, "b": 3}]
)
def test_a_page_holds_what_was_logged(
    tmp_path: Path, stages: dict[str, int], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    run = RunFolder(tmp_path)
    run.write_log(log_rows(stages))
    run.write_steps(STEPS)
    page = drawn(tmp_path, monkeypatch)
    assert not [str(warning.message) for warning in recwarn if "matplotlib" in str(warning.filename)]
    n = len(stages)
    losses, rates, metrics, steps = page.axes[:n], page.axes[n : 2 * n], page.axes[2 * n : 3 * n], page.axes[3 * n :]
    assert [axis.get_title("left") for axis in losses] == list(stages)
    for axis, epochs in zip(losses, stages.values(), strict=True):
        total, ce, mse = axis.lines
        assert list(total.get_xdata()) == list(range(1, epochs + 1))
        assert list(total.get_ydata()) == [3.0 / epoch for epoch in range(1, epochs + 1)]
        assert list(ce.get_ydata()) != list(mse.get_ydata())
        assert all(tick <= epochs for tick in axis.get_xticks())
    assert [axis.lines[0].get_ydata()[0] for axis in rates] == [1e-3] * n
    stars = [line for axis in metrics for line in axis.lines if line.get_marker() == "*"]
    assert sorted(line.get_ydata()[0] for line in stars) == [10.0, 20.0]  # NDCG@20 and HR@20, not HR@5
    assert [axis.get_title("left") for axis in steps] == ["HR@20, validation, per cent", "time per user"]
    for axis in page.axes:  # the panels stand on the page
        box = axis.get_position()
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1


def test_without_validation_and_steps_there_is_less_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(tmp_path).write_log(log_rows({"train": 3}, metrics=False))
    assert len(drawn(tmp_path, monkeypatch).axes) == 2


def test_the_best_is_the_first_of_equals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.1, 0.3, 0.3, 0.2]
    rows = [("train", at, at, 1.0, name, v) for at, v in enumerate(values, 1) for name in ("loss", "HR@20")]
    RunFolder(tmp_path).write_log(rows)
    (star,) = [line for line in drawn(tmp_path, monkeypatch).axes[2].lines if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (2, 30.0)


def test_logs_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_log(log_rows({"pretrain": 2, "all": 1}))
    run.write_steps(STEPS)
    first, second = read_log(tmp_path / LOG_FILE)
    assert (first.name, first.epochs, second.name, second.epochs) == ("pretrain", 2, "all", 1)
    assert list(first.losses) == ["loss", "ce", "mse"]
    assert (first.curves["HR@20"].x, first.curves["HR@20"].y) == ([2], [0.2])
    steps = read_steps(tmp_path / STEPS_FILE)
    assert (steps["ddpm"]["HR@20"].x, steps["ddpm"]["HR@20"].y) == ([1, 10], [0.1, 0.2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",".join(LOG_COLUMNS) + "\n", r"log\.csv: no epoch has been logged yet"),
        ("a,b\n1,2\n", r"log\.csv:1: the columns are \['a', 'b'\]; stage,epoch,step,seconds,name,value is accepted"),
        (",".join(LOG_COLUMNS) + "\ns,1,1,1.0,loss\n", r"log\.csv:2: a row needs 6 cells"),
        (",".join(LOG_COLUMNS) + "\ns,1,1,1.0,loss,high\n", r"log\.csv:2: 'high' is not a number"),
    ],
)
def test_a_log_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / LOG_FILE).write_text(text)
    with pytest.raises(DataError, match=message):
        plot_run(tmp_path)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match=r"log\.csv: there is no such file; give the folder of a training run"):
        plot_run(tmp_path)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(tmp_path).write_log(log_rows({"train": 1}))
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NoMatplotlib, match=r"matplotlib is not installed; `pip install 'fastdiff\[plot\]'` adds it"):
        plot_run(tmp_path)


def test_the_columns_are_those_of_the_run(tmp_path: Path) -> None:
    """An older steps.csv with other columns is named, not misread."""
    with (tmp_path / STEPS_FILE).open("w", newline="") as file:
        csv.writer(file).writerows([STEPS_COLUMNS[::-1], (0.1, "HR@20", 1, "ddpm")])
    with pytest.raises(DataError, match=r"steps\.csv:1: the columns are"):
        read_steps(tmp_path / STEPS_FILE)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert plots._main([str(tmp_path)]) == 2
    assert "there is no such file" in capsys.readouterr().err
    RunFolder(tmp_path).write_log(log_rows({"train": 1}))
    assert plots._main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "training.png")
