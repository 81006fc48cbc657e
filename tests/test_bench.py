"""The bench: it refuses to time what is wrong, keeps what it measured, and compares only what stands in one run."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import machine, report
from bench.bench_adrec import adrec_case
from bench.bench_cddrec import cddrec_case
from bench.bench_dreamrec import chain_covariance, dreamrec_case, dreamrec_config, published_dreamrec
from bench.bench_dreamrec_generate import dreamrec_generate_case
from bench.bench_score_topk import score_topk_case
from bench.bench_tarec import tarec_case
from bench.cases import (
    Absent,
    Case,
    Gate,
    Options,
    Provider,
    all_cases,
    draw_histories,
    draw_lengths,
    padded,
    ranking_error,
    relative_error,
)
from bench.harness import Row, Session, append_rows, measure, read_rows, seconds
from bench.timing import Budget, Clock, interleaved
from bench.weights import random_weights
from fastdiff.config import ADRecConfig
from fastdiff.schedule import ScheduleConfig

QUICK = Budget(seconds=0.002, min_samples=2, max_samples=3)


class Listener:
    """Collects what a session says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str) -> None:
        self.lines.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def session(listener: Listener) -> Session:
    options = Options()
    return Session(options, QUICK, machine.facts(options.device), {"gflops": 100.0, "gbps": 10.0}, listener)


def case_of(*providers: Provider | Absent) -> Case:
    return Case("toy", {"batch": 2}, "a toy", lambda _: list(providers), ())


def exact(output: Tensor) -> Gate:
    return Gate(relative_error(output, torch.ones(3)), 1e-6, "ones")


RIGHT = Provider("published", lambda: torch.ones(3), exact)


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [torch.tensor([1.0, 1.0, 1.1]), torch.full((3,), float("nan")), torch.ones(4)], ids=["off", "nan", "shape"]
)
def test_a_wrong_provider_prints_WRONG_and_gets_no_time(  # noqa: N802 - WRONG is the word that is printed
    value: Tensor, session: Session, listener: Listener
) -> None:
    calls = []
    wrong = Provider("fastdiff", lambda: calls.append(1) or value, exact, backend="torch")
    rows = measure(case_of(RIGHT, wrong), session)

    assert [row["status"] for row in rows] == ["ok", "WRONG"]
    assert len(calls) == 1, "a wrong provider is run for its check and never again"
    assert not [name for name in rows[1] if name.endswith("_s")]
    (line,) = [line for line in listener.lines if "fastdiff[torch]" in line]
    assert "WRONG" in line
    assert " s" not in line.split("WRONG")[1]
    table = report.headline_table(rows)
    assert "WRONG" in table
    assert "WRONG" in report.markdown(rows, {})


def test_the_checked_call_is_the_one_with_given_draws(session: Session) -> None:
    random = Provider("fastdiff", lambda: torch.randn(3), exact, gated=lambda: torch.ones(3), backend="torch")
    (row,) = measure(case_of(random), session)
    assert row["status"] == "ok"
    assert row["median_s"] > 0


def test_an_absent_provider_says_why_once(session: Session, listener: Listener) -> None:
    case = case_of(RIGHT, Absent("faiss", "it is not installed"))
    rows = measure(case, session) + measure(case, session)
    assert [row["provider"] for row in rows] == ["published"] * 2
    assert listener.text.count("faiss is absent: it is not installed") == 1


def test_flops_of_a_kernel_are_those_of_the_torch_backend(session: Session) -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 16)

    def check(_: Any) -> Gate:
        return Gate(0.0, 0.0, "nothing")

    rows = measure(
        case_of(
            Provider("fastdiff", lambda: a @ b, check, backend="torch"),
            Provider("fastdiff", lambda: None, check, backend="cpu"),
        ),
        session,
    )
    assert [row["flops"] for row in rows] == [2 * 4 * 8 * 16] * 2


def test_ranking_error() -> None:
    scores = torch.tensor([[4.0, 3.0, 3.0, 1.0]], dtype=torch.float64)
    assert ranking_error(torch.tensor([[0, 2]]), scores) == 0.0, "a tie may go either way"
    assert ranking_error(torch.tensor([[0, 3]]), scores) == 0.5
    assert ranking_error(torch.tensor([[2, 2]]), scores) == float("inf"), "no item twice"
    assert ranking_error(torch.tensor([[0, -1]]), scores) == float("inf")


def test_the_probed_covariance_is_that_of_draws() -> None:
    config = dreamrec_config(num_train_timesteps=12, hidden_size=4, n_items=5)
    model, diffusion = published_dreamrec(config, random_weights(config), torch.device("cpu"))
    with torch.no_grad():
        covariance = chain_covariance(diffusion, model.double())
        x_0 = diffusion.sample(model.forward, model.forward_uncon, torch.zeros(40_000, 4, dtype=torch.float64))
    assert relative_error(torch.cov(x_0.T), covariance) < 0.05  # some five standard errors of 40,000 draws


# --- the cases --------------------------------------------------------------------------------------------------------

TINY = {
    "adrec": partial(adrec_case, lengths="beauty", num_train_timesteps=4, hidden_size=16, n_items=30, max_seq_len=9),
    "cddrec": partial(cddrec_case, hidden_size=16, n_items=30),
    "dreamrec": partial(dreamrec_case, num_train_timesteps=6, hidden_size=8, n_items=30),
    "dreamrec_generate": partial(dreamrec_generate_case, num_train_timesteps=6, hidden_size=8, n_items=30),
    "score_topk": partial(score_topk_case, 200, 7, dim=8),
    "tarec": partial(tarec_case, num_train_timesteps=9, hidden_size=8, n_items=30),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_tiny_case_end_to_end(name: str, batch: int, session: Session, tmp_path: Path) -> None:
    case = TINY[name](batch=batch)
    rows = measure(case, session)
    labels = {report.label(row) for row in rows}

    assert labels | session.absent == set(case.labels(session.options)), "a case knows its providers without building"
    assert {row["status"] for row in rows} == {"ok"}
    assert all(0 < row["p10_s"] <= row["median_s"] <= row["p90_s"] for row in rows)
    append_rows(rows, tmp_path / "cpu.jsonl")
    append_rows(rows[:1], tmp_path / "cpu.jsonl")
    kept = read_rows(tmp_path / "cpu.jsonl")
    assert kept == json.loads(json.dumps([*rows, rows[0]]))


def test_every_subject_has_a_tiny_case() -> None:
    assert {case.name for case in all_cases()} == set(TINY)
    ids = [case.id for case in all_cases()]
    assert len(set(ids)) == len(ids)


def test_drawn_histories() -> None:
    config = ADRecConfig(n_items=40, hidden_size=4, max_seq_len=50, schedule=ScheduleConfig("trunc_lin", 32))
    lengths = draw_lengths(20_000, "beauty", 50, torch.Generator().manual_seed(0))
    assert int(lengths.min()) == 3
    assert abs(float(lengths.float().mean()) - 7.0) < 0.2
    histories = draw_histories(config, 30, "beauty")
    as_loaded = padded(histories, config)
    assert as_loaded.shape == (30, 50)
    assert torch.equal((as_loaded != config.pad_id).sum(1), histories.lengths)
    for row, items, length in zip(as_loaded, histories.items, histories.lengths.tolist(), strict=True):
        assert torch.equal(row[50 - length :], items[:length])


# --- timing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimate", "samples", "calls"),
    [(3e-6, 300, 67), (1e-2, 100, 1), (0.5, 7, 1), (2.0, 4, 1), (60.0, 3, 1)],
    ids=["micro", "milli", "min", "bounded", "few"],
)
def test_budget(estimate: float, samples: int, calls: int) -> None:
    assert Budget().plan(estimate) == (samples, calls)


def test_contenders_take_turns() -> None:
    order: list[str] = []

    class FakeClock(Clock):
        def __init__(self) -> None:
            self.ticks = itertools.count(1)

        def sample(self, call: Any, calls: int) -> float:
            call()
            return float(next(self.ticks))

    calls = {"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}
    budget = Budget(seconds=1.0, min_samples=3, max_samples=6)
    timings = interleaved(calls, {"slow": 0.5, "fast": 0.1}, budget, FakeClock())
    assert order == ["slow", "fast", "fast", "fast", "fast", "slow", "slow", "fast", "fast"]
    assert len(timings["slow"].samples) == 3
    assert len(timings["fast"].samples) == 6
    assert timings["slow"].p10 <= timings["slow"].median <= timings["slow"].p90


def test_seconds() -> None:
    assert [seconds(value) for value in (2.0, 0.0123, 4.56e-6, 7e-8)] == ["2 s", "12.3 ms", "4.56 µs", "70 ns"]


# --- the report -------------------------------------------------------------------------------------------------------


MACHINE = machine.facts(torch.device("cpu"))


def a_row(provider: str, median: float, backend: str = "eager", run: str = "1", others: float = 0.0) -> Row:
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
        "ceilings": {"gflops": 100.0, "gbps": 10.0},
        "others": others,
        "date": f"2026-01-0{run}T00:00:00+00:00",
        "run": run,
        "commit": "abc",
    }


ROWS = [
    a_row("published", 12.0),
    a_row("published-compiled", 6.0),
    a_row("fastdiff", 1.0, "torch"),
    a_row("fastdiff", 0.25, "cpu"),
]


def test_the_headline_is_against_the_best_other_and_the_gains_are_apart() -> None:
    (line,) = report.headline_table(ROWS).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "adrec lengths full, batch 32",
        "fastdiff[cpu]",
        "250 ms",
        "published-compiled",
        "6 s",
        "24x",
        "48x",
        "12x",
        "4x",
    ]


def test_ratios_stay_within_one_run() -> None:
    alone = [a_row("fastdiff", 1e-3, "torch", run="2")]
    assert report.headline_table([*ROWS, *alone]) == report.headline_table(ROWS), "a run without others is not compared"
    again = [a_row("published", 8.0, run="3"), a_row("fastdiff", 2.0, "torch", run="3")]
    (line,) = report.headline_table([*ROWS, *alone, *again]).splitlines()[2:]
    assert "4x" in line
    assert "published-compiled" not in line


def test_noisy_rows_are_marked() -> None:
    noisy = [a_row("published", 12.0, others=1.5), a_row("fastdiff", 1.0, "torch", others=1.5)]
    assert report.NOISY in report.headline_table(noisy)
    assert report.NOISY not in report.headline_table(ROWS)


def test_the_report_from_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    append_rows([*ROWS, a_row("fastdiff", 1.0, "torch", run="2")], tmp_path / "cpu.jsonl")
    assert report.main(["--rows", str(tmp_path / "cpu.jsonl"), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert machine.describe(MACHINE) in text
    assert "![adrec](cpu-adrec.png)" in text
    assert "T = 32" in text
    assert "4 GFLOP/s" in text
    assert (tmp_path / "cpu-adrec.png").stat().st_size > 1000
    assert "5 rows" in capsys.readouterr().out


def test_the_report_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert report.draw_plots(ROWS, tmp_path, "cpu") == {}
    assert "pip install matplotlib" in capsys.readouterr().out


def test_a_file_that_holds_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "cpu.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        read_rows(path)
    path.write_text('{"case": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a row of this bench"):
        read_rows(path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_measures_appends_and_fails_on_WRONG(  # noqa: N802
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Provider("fastdiff", lambda: torch.ones(3), exact, backend="torch")
    wrong = Provider("published-compiled", lambda: torch.zeros(3), exact)
    monkeypatch.setattr(machine, "ceilings", lambda _: {"gflops": 100.0, "gbps": 10.0})
    monkeypatch.setattr(command, "all_cases", lambda: [case_of(RIGHT, right, wrong)])
    output = tmp_path / "rows.jsonl"
    common = ["--seconds", "0.001", "--output", str(output)]
    assert command.main([*common, "--provider", "published", "fastdiff"]) == 0
    assert command.main(common) == 1
    text = capsys.readouterr().out
    assert "3 rows appended" in text
    assert "1 of them WRONG: published-compiled" in text
    assert [row["provider"] for row in read_rows(output)] == ["published", "fastdiff"] * 2 + ["published-compiled"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "adrek"], "unknown name 'adrek'; known: adrec, cddrec"),
        (["--provider", "fais"], "did you mean 'faiss'?"),
        (["--provider", "faiss", "--case", "adrec"], "none of these cases has faiss"),
        (["--batch", "7"], "no case has batch 7; known: 1, 32"),
        (["--case", "cddrec", "--batch", "1"], "no case is left"),
        (["--device", "tpu"], "must be cpu or cuda (got 'tpu')"),
        (["--seconds", "0"], "must be more than 0"),
    ],
    ids=["case", "provider", "pair", "batch", "nothing", "device", "seconds"],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_list_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert "adrec/lengths=full/batch=32" in text
    assert "score_topk/items=1000000/k=100/batch=256  (only with --full)" in text
    assert "faiss-tuned" in text


# --- the README's table -----------------------------------------------------------------------------------------------


def test_the_table_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, readme = tmp_path / "cpu.jsonl", tmp_path / "README.md"
    append_rows(ROWS, rows)
    readme.write_text("a\n<!-- bench:headline -->\nold\n<!-- /bench:headline -->\nb\n")
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
    assert machine.describe(MACHINE) in first
    readme.write_text("no marks")
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert "holds 0 pairs of marks" in capsys.readouterr().err
