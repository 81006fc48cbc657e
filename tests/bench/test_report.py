"""The report: what is compared stands in one run and on one machine, and promises the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, plots, report, tables
from bench.readme import backend_matrix
from bench.roofline import achieved
from bench.rows import Row, append_rows, read_rows
from fastdiff import ops
from fastdiff.ops.backend import BACKENDS
from tests.bench.toys import CEILINGS

MACHINE = machine.facts(torch.device("cpu"))


def a_row(
    provider: str, median: float, backend: str = "eager", run: str = "1", others: float = 0.0, **more: Any
) -> Row:
    return {
        "case": "adrec",
        "params": {"lengths": "full", "batch": 32},
        "setting": "T = 32",
        "provider": provider,
        "backend": backend,
        "status": "ok",
        "error": 1e-7,
        "tolerance": 5e-6,
        "against": "float64",
        "median_s": median,
        "p10_s": median * 0.9,
        "p90_s": median * 1.1,
        "samples": 7,
        "flops": 1e9,
        "bytes": None,
        "setup_s": None,
        "machine": MACHINE,
        "ceilings": CEILINGS,
        "others": others,
        "date": f"2026-01-0{run}T00:00:00+00:00",
        "run": run,
        "commit": "abc",
        **more,
    }


ROWS = [
    a_row("published", 12.0),
    a_row("published-compiled", 6.0),
    a_row("fastdiff", 1.0, "torch"),
    a_row("fastdiff", 0.25, "cpu"),
]


def cells(table: str) -> list[list[str]]:
    """The lines of a table below its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_headline_is_against_the_best_other() -> None:
    (line,) = cells(tables.headline_table(ROWS))
    assert line[:3] == ["adrec lengths full, batch 32", "fastdiff[cpu]", "250 ms"]
    assert line[4:7] == ["published-compiled", "6 s", "24x"]


def test_the_gains_of_algorithm_and_kernel_are_apart() -> None:
    compiled = a_row("fastdiff-compiled", 0.5)
    (group,) = tables.comparisons([*ROWS, compiled]).values()
    (line,) = cells(tables.gains_of(group))
    assert line[1:] == ["published 12 s", "fastdiff[torch] 1 s", "fastdiff[cpu] 250 ms", "12x", "4x", "2x"]
    (line,) = cells(tables.headline_table([*ROWS, compiled]))
    assert line[4:7] == ["fastdiff-compiled", "500 ms", "2x"], "under torch.compile ours is a rival like others"


def test_a_smaller_promise_is_compared_apart() -> None:
    rows = [*ROWS, a_row("torch-topk-bf16", 0.1, approximate=True)]
    (line,) = cells(tables.headline_table(rows))
    assert line[4:] == ["published-compiled", "6 s", "24x", "torch-topk-bf16", "0.4x"]


def test_what_stands_aside_is_shown_and_not_compared() -> None:
    aside = a_row("fastdiff-no-lists", 0.2, "cpu", aside=True)
    assert tables.headline_table([*ROWS, aside]) == tables.headline_table(ROWS)
    text = report.markdown([*ROWS, aside], {})
    assert "fastdiff-no-lists[cpu]" in text
    assert "fastdiff[cpu]: 1.25x the time of the same call without lists." in text


def test_memory_is_shown_and_its_times_are_no_headline() -> None:
    rows = [a_row("faiss", 1.0, peak_bytes=4e8, samples=1), a_row("fastdiff", 3.0, "cpu", peak_bytes=5e7, samples=1)]
    assert cells(tables.headline_table(rows)) == []
    text = report.markdown(rows, {})
    assert "400 MB" in text
    assert "50 MB" in text


def test_what_others_report_is_cited_and_not_compared() -> None:
    cited = {"source": "Table 3 of a paper", "seconds": 1394.0}
    rows = [a_row("fastdiff-closed-form", 0.5, "cpu", citation=cited)]
    (line,) = cells(tables.headline_table(rows))
    assert line[4:7] == ["-", "-", "-"]
    assert "1,394 s, 2,788 times as long as fastdiff-closed-form[cpu] here (Table 3 of a paper)" in report.markdown(
        rows, {}
    )


def test_the_roof_is_that_of_the_arithmetic_and_of_the_size_of_the_table() -> None:
    row = a_row("fastdiff", 0.1, "cpu", bytes=None)
    assert achieved(row).share == pytest.approx(0.1)  # 1e9 operations in 0.1 s of 100 GFLOP/s
    assert achieved({**row, "arithmetic": "bfloat16"}).share == pytest.approx(0.05)
    assert achieved({**row, "arithmetic": "float32 or bfloat16"}).share == pytest.approx(0.05)
    small, large = achieved({**row, "bytes": 1 << 20}), achieved({**row, "bytes": 1 << 30})
    assert (small.bound, large.bound) == ("compute", "memory")
    assert small.gbps == pytest.approx((1 << 20) / 1e8)
    assert large.share == pytest.approx((1 << 30) / 0.1 / 1e10)
    assert achieved({**row, "flops": None}).share is None
    old = {**row, "ceilings": {"gflops": 100.0, "gbps": 10.0}, "bytes": 1 << 20}
    assert achieved(old).share == pytest.approx(0.1), "rows of earlier versions have one read rate"


def test_machines_are_not_mixed_and_the_newest_comes_first() -> None:
    other = {**MACHINE, "cpu": "Another"}
    rows = [
        a_row("published", 100.0, run="2", machine=other),
        a_row("fastdiff", 1.0, "cpu", run="2", machine=other),
        *ROWS,
    ]
    first, second = tables.comparisons(rows)
    assert first.startswith("Another")
    assert len(tables.comparisons(rows)[second][0].rows) == len(ROWS)
    text = report.markdown(rows, {})
    assert text.index("## Another") < text.index(f"## Earlier: {machine.identity(MACHINE)}")
    newer = [{**row, "machine": {**MACHINE, "torch": "9.9"}} for row in ROWS]
    assert len(tables.comparisons([*ROWS, *newer])) == 1, "another version is the same machine"


def test_ratios_stay_within_one_run() -> None:
    alone = [a_row("fastdiff", 1e-3, "torch", run="2")]
    assert tables.headline_table([*ROWS, *alone]) == tables.headline_table(ROWS), "a run without others is not compared"
    again = [a_row("published", 8.0, run="3"), a_row("fastdiff", 2.0, "torch", run="3")]
    (line,) = tables.headline_table([*ROWS, *alone, *again]).splitlines()[2:]
    assert "4x" in line
    assert "published-compiled" not in line


def test_noisy_rows_are_marked() -> None:
    noisy = [a_row("published", 12.0, others=1.5), a_row("fastdiff", 1.0, "torch", others=1.5)]
    assert tables.NOISY in tables.headline_table(noisy)
    assert tables.NOISY not in tables.headline_table(ROWS)


def test_the_report_from_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    single = [{**row, "params": {"lengths": "full", "batch": 1}} for row in ROWS]
    append_rows([*ROWS, *single, a_row("fastdiff", 1.0, "torch", run="2")], tmp_path / "cpu.jsonl")
    assert report.main(["--rows", str(tmp_path / "cpu.jsonl"), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert f"## {machine.identity(MACHINE)}" in text
    assert f"torch {MACHINE['torch']}" in text
    assert "![adrec](cpu-adrec.png)" in text
    assert "T = 32" in text
    assert "| 4 " in text, "GFLOP/s of the best"
    for name in ("ratios", "roofline", "gains"):
        assert (tmp_path / f"cpu-{name}.png").stat().st_size > 1000
    assert (tmp_path / "cpu-adrec.png").stat().st_size > 1000
    assert "9 rows" in capsys.readouterr().out


def test_the_report_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert plots.draw_plots(ROWS, tmp_path, "cpu") == {}
    assert "pip install matplotlib" in capsys.readouterr().out


def test_a_file_that_holds_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "cpu.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        read_rows(path)
    path.write_text('{"case": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a row of this bench"):
        read_rows(path)


# --- the README's tables ----------------------------------------------------------------------------------------------


def test_the_table_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, readme = tmp_path / "cpu.jsonl", tmp_path / "README.md"
    append_rows(ROWS, rows)
    marked = "".join(f"<!-- bench:{mark} -->\nold\n<!-- /bench:{mark} -->\n" for mark in ("headline", "backends"))
    readme.write_text(f"a\n{marked}b\n")
    arguments = ["--rows", str(rows), "--output", str(tmp_path / "out"), "--readme", str(readme)]
    assert report.main(arguments) == 0
    first = readme.read_text()
    assert report.main(arguments) == 0
    assert readme.read_text() == first, "filling twice changes nothing"
    assert first.startswith("a\n")
    assert first.endswith("b\n")
    assert "old" not in first
    assert "| 24 " in first
    assert "T = 32" in first
    assert backend_matrix() in first
    assert machine.describe(MACHINE) in first
    readme.write_text("no marks")
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert "holds 0 pairs of marks" in capsys.readouterr().err


def test_the_readme_says_which_op_runs_on_which_backend() -> None:
    text = (machine.ROOT / "README.md").read_text(encoding="utf-8")
    assert backend_matrix() in text, "run python -m bench.readme README.md"
    for op in ops.ALL:
        (line,) = [line for line in backend_matrix().splitlines() if line.startswith(f"| `{op.name}`")]
        said = [cell.strip() for cell in line.split("|")[2:-1]]
        assert said == ["yes", *("yes" if name in op.implementations else "not yet" for name in BACKENDS[1:])]
