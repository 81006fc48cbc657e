"""`python -m bench.gpu`: its jobs, played by small processes; a kill loses one, and the next call goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, machine
from bench.cases import all_cases
from bench.gpu import FAILED_TEST, Job
from bench.machine import ROOT
from fastdiff.ops import ALL
from tests.devices import places


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda device: {"gpu": "Some GPU"})
    monkeypatch.setattr(machine, "describe", lambda facts: "a machine")
    monkeypatch.setattr(machine, "nvidia_smi", lambda fields: dict.fromkeys(fields, "1"))
    monkeypatch.setattr(gpu, "why_not", lambda *_: None)
    monkeypatch.setattr(gpu.library, "why_not", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def play(monkeypatch: pytest.MonkeyPatch, *jobs: Job) -> None:
    monkeypatch.setattr(gpu, "jobs", lambda output: list(jobs))


def say(part: str, name: str, code: str, seconds: int = 30, **more: Any) -> Job:
    return Job(part, name, seconds, ["-c", code], **more)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "jobs.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("with_a_gpu")
def test_jobs_run_once_and_leave_rows_logs_and_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    good = say("build", "good", f"open({str(count)!r}, 'a').write('x'); print('built')")
    bad = say("tests", "bad", "print('FAILED tests/a.py::test_b[triton-1] - AssertionError: no'); raise SystemExit(1)")
    play(monkeypatch, good, bad, say("tune", "none", "", absent="no tool"))
    output = tmp_path / "out"
    assert gpu.main(["--output", str(output)]) == 1
    rows = rows_of(output)
    assert [(row["job"], row["status"]) for row in rows] == [
        ("build/good", "ok"),
        ("tests/bad", "failed"),
        ("tune/none", "absent"),
    ]
    assert rows[1]["failed_tests"] == ["tests/a.py::test_b[triton-1]"]
    assert rows[0]["machine"] == {"gpu": "Some GPU"}
    assert rows[0]["gpu_before"]["sm_mhz"] == "1"
    assert "built" in (output / "log.txt").read_text()
    suite = ET.parse(output / "summary.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    assert gpu.main(["--output", str(output)]) == 0, "nothing is left to do"
    assert count.read_text() == "x"
    assert gpu.main(["--output", str(output), "--part", "build", "--again"]) == 0
    assert count.read_text() == "xx"


@pytest.mark.usefixtures("with_a_gpu")
def test_what_needs_a_job_that_failed_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = say("sanitizer", "works", "raise SystemExit(1)")
    play(monkeypatch, tool, say("sanitizer", "all", "", needs=tool.id), say("tests", "b", "", needs="build/ops"))
    for command in ([], ["--again", "--job", "sanitizer/all", "tests/b"]):
        gpu.main(["--output", str(tmp_path), *command])
        rows = {row["job"]: row for row in rows_of(tmp_path)}
        assert {job: row["status"] for job, row in rows.items()} == {
            "sanitizer/works": "failed",
            "sanitizer/all": "absent",
            "tests/b": "ok",
        }
        assert rows["sanitizer/all"]["why"] == "sanitizer/works: failed"


@pytest.mark.usefixtures("with_a_gpu")
def test_a_job_ends_at_its_limit_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.02)"
    hanging = say("tests", "hangs", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", 1)
    play(monkeypatch, hanging, say("tune", "after", "print('ran')"))
    assert gpu.main(["--output", str(tmp_path / "out")]) == 1
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["too long", "ok"]
    size = len(beat.read_text())
    time.sleep(0.2)
    assert len(beat.read_text()) == size


@pytest.mark.usefixtures("with_a_gpu")
def test_what_the_end_of_a_call_cuts_off_runs_again_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    code = f"import pathlib, time; m = pathlib.Path({str(marker)!r}); n = m.exists(); m.touch(); n or time.sleep(30)"
    play(monkeypatch, say("tests", "slow", code, 60), say("tune", "after", "print('ran')"))
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    assert gpu.main(["--output", str(tmp_path), "--minutes", "0.02"]) == 0
    assert [(row["job"], row["status"]) for row in rows_of(tmp_path)] == [("tests/slow", "cut off")]
    assert gpu.main(["--output", str(tmp_path), "--minutes", "1"]) == 0
    assert [row["status"] for row in rows_of(tmp_path)[1:]] == ["ok", "ok"]


@pytest.mark.usefixtures("with_a_gpu")
def test_another_machine_builds_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, say("build", "ops", "print('built')"))
    for reason, runs in ((None, 1), ("not built", 2)):
        monkeypatch.setattr(gpu.library, "why_not", lambda reason=reason: reason)
        gpu.main(["--output", str(tmp_path)])
        assert len(rows_of(tmp_path)) == runs


def test_without_a_gpu_it_says_so_and_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path / "out")])
    assert "torch sees no CUDA device here" in capsys.readouterr().err
    assert gpu.main(["--output", str(tmp_path / "out"), "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^tests/first +at most \d+ s$", listed, re.M)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path), "--job", "ops/none"])
    assert "--job: unknown ops/none" in capsys.readouterr().err


def test_every_part_has_jobs_and_every_case_that_is_named_exists(tmp_path: Path) -> None:
    jobs = gpu.jobs(tmp_path)
    assert {job.part for job in jobs} == set(gpu.PARTS)
    assert len({job.id for job in jobs}) == len(jobs)
    assert {f"ops/{op.name}-float32" for op in ALL} <= {job.id for job in jobs}
    known = {name for case in all_cases(torch.device("cuda")) for name in (case.id, case.name)}
    for job in jobs:
        if job.part == "bench":
            at = job.arguments.index("--case") + 1
            assert set(job.arguments[at : job.arguments.index("--output")]) <= known
        for argument in job.arguments:
            path = argument.removeprefix("--ignore=")
            assert not path.startswith("tests/") or (ROOT / path).exists(), path


def test_failed_tests_are_found_as_they_end_and_at_the_end() -> None:
    said = """
[gw3] [ 12%] FAILED tests/ops/test_a.py::test_x[triton-a b]
[gw3] [ 12%] PASSED tests/ops/test_a.py::test_z
tests/ops/test_a.py::test_y[1] FAILED          [ 10%]
FAILED tests/ops/test_a.py::test_w[triton] - AssertionError: 1 > 0
"""
    names = {"".join(found) for found in FAILED_TEST.findall(said)}
    assert names == {f"tests/ops/test_a.py::{name}" for name in ("test_x[triton-a b]", "test_y[1]", "test_w[triton]")}


@pytest.mark.skipif("triton" not in places(*ALL), reason="it needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", gpu.SANITIZED)
def test_what_is_sanitized_is_a_few_tests(name: str) -> None:
    path, which = gpu.SANITIZED[name]
    command = [sys.executable, "-m", "pytest", "--collect-only", path, "-k", which.replace("and cuda", "")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert 1 <= found.count("::") <= 40, found
