"""`python -m bench`: what it accepts, what it appends, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import machine, ops, roofline
from bench.cases import Provider
from bench.rows import read_rows
from tests.bench.toys import CEILINGS, RIGHT, case_of, exact


@pytest.fixture(autouse=True)
def _nothing_is_appended_to_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)


def test_the_command_measures_appends_and_fails_on_WRONG(  # noqa: N802
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Provider("fastdiff", lambda: torch.ones(3), exact, backend="torch")
    wrong = Provider("published-compiled", lambda: torch.zeros(3), exact)
    monkeypatch.setattr(roofline, "ceilings", lambda _: CEILINGS)
    monkeypatch.setattr(command, "all_cases", lambda device: [case_of(RIGHT, right, wrong)])
    output = tmp_path / "rows.jsonl"
    common = ["--seconds", "0.001", "--output", str(output)]
    assert command.main([*common, "--provider", "published", "fastdiff"]) == 0
    assert command.main(common) == 1
    text = capsys.readouterr().out
    assert "3 rows appended" in text
    assert "1 of them WRONG: published-compiled" in text
    assert [row["provider"] for row in read_rows(output)] == ["published", "fastdiff"] * 2 + ["published-compiled"]


def test_a_run_ends_with_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Provider("fastdiff", lambda: torch.ones(3), exact, backend="torch")
    monkeypatch.setattr(roofline, "ceilings", lambda _: CEILINGS)
    monkeypatch.setattr(command, "all_cases", lambda device: [case_of(RIGHT, right)])
    assert command.main(["--seconds", "0.001"]) == 0
    assert len(read_rows(tmp_path / "cpu.jsonl")) == 2
    assert "fastdiff[torch]" in (tmp_path / "cpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "adrek"], "unknown name 'adrek'; known: adrec, cddrec"),
        (["--provider", "fais"], "did you mean 'faiss'?"),
        (["--provider", "faiss", "--case", "adrec"], "none of these cases has faiss"),
        (["--batch", "7"], "no case has batch 7; known: 1, 32"),
        (["--case", "cddrec", "--batch", "1024"], "no case is left"),
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
    assert "faiss-tuned" in text


def test_interpreted_kernels_are_not_timed_unasked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for main in (lambda: command.main(["--case", "score_topk"]), lambda: ops.main(["row_linear"])):
        with pytest.raises(SystemExit):
            main()
        assert "kernels are interpreted here, which says nothing of their time" in capsys.readouterr().err
    assert machine.facts(torch.device("cpu"))["interpreted"]
    assert "Triton interpreted" in machine.identity(machine.facts(torch.device("cpu")))
