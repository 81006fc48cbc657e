"""kernels/tuning.py: which configuration a launch takes; no GPU is needed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.backend import why_not
from tests.conftest import ROOT

if why_not("triton", "cuda") is not None:
    pytest.skip(str(why_not("triton", "cuda")), allow_module_level=True)

from fastdiff.kernels import runtime, tuning
from fastdiff.kernels.tuning import Config, Problem, bucket, choose, fastest, forced

GPU = torch.device("cuda", 0)
LARGE, SMALL, TALL = Config({"BLOCK": 128}, shared=200), Config({"BLOCK": 32}, shared=50), Config({"BLOCK": 64})
KEY = (64, "float32")


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU of 100 bytes, nothing chosen yet, and the folder where its records would lie."""
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "configs")
    for kept in ("_chosen", "_records", "_forced"):
        monkeypatch.setattr(tuning, kept, {})
    gpu = SimpleNamespace(name="Some GPU-100 (SXM)", shared_memory_per_block_optin=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    return tmp_path / "configs" / "Some_GPU_100_SXM_.json"


def candidates(size: int, dtype: str) -> list[Config]:
    assert (size, dtype) == KEY
    return [LARGE, SMALL, TALL]


def test_a_gpu_without_records_takes_the_first_that_fits(records: Path) -> None:
    assert choose("op", KEY, candidates, GPU) is SMALL


def test_a_recorded_winner_is_taken(records: Path) -> None:
    tuning.write(records, "Some GPU", {("op", KEY): (TALL, 2e-6), ("op", (1, "float32")): (SMALL, 1e-6)})
    assert choose("op", KEY, candidates, GPU) is TALL
    assert choose("another", KEY, candidates, GPU) is SMALL


def test_a_winner_that_is_no_candidate_any_more_is_passed_over(records: Path) -> None:
    gone = Config({"BLOCK": 64}, num_warps=16)
    tuning.write(records, "Some GPU", {("op", KEY): (gone, 1e-6)})
    assert choose("op", KEY, candidates, GPU) is SMALL


def test_new_winners_replace_those_of_their_problem_and_keep_others(records: Path) -> None:
    tuning.write(records, "Some GPU", {("op", KEY): (SMALL, 1e-6), ("op", (9, "x")): (SMALL, 1e-6)})
    assert choose("op", KEY, candidates, GPU) is SMALL
    register = Config({"BLOCK": 64}, maxnreg=128)
    tuning.write(records, "Some GPU", {("op", KEY): (register, 5e-7)})
    assert choose("op", KEY, lambda *_: [LARGE, register], GPU) is register
    entries = json.loads(records.read_text())["winners"]
    assert [(entry["key"], entry["microseconds"]) for entry in entries] == [([9, "x"], 1.0), ([64, "float32"], 0.5)]
    assert json.loads(records.read_text())["gpu"] == "Some GPU"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"winners": [{"op": "x"}]}', '{"winners": [{"op": 1, "key": 2}]}'])
def test_a_broken_file_is_named(records: Path, text: str) -> None:
    records.parent.mkdir()
    records.write_text(text)
    with pytest.raises(InvalidArgument, match=r"Some_GPU_100_SXM_\.json: holds no records .*remove it"):
        choose("op", KEY, candidates, GPU)
    with pytest.raises(InvalidArgument, match="holds no records"):
        tuning.write(records, "Some GPU", {})


def test_a_gpu_that_is_too_small_is_refused(records: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"op: no configuration fits .* at least 200 bytes .*\(got 100\)"):
        choose("op", KEY, lambda *_: [LARGE], GPU)


def test_the_interpreter_takes_the_first(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    assert choose("op", KEY, candidates, torch.device("cpu")) is LARGE


def test_buckets_and_launches() -> None:
    assert [bucket(n) for n in (0, 1, 5, 64, 65)] == [1, 1, 8, 64, 128]
    assert (bucket(3, least=16), bucket(5000, most=1024)) == (16, 1024)
    assert Config({"BLOCK": 8}, 2, 1).launch() == {"BLOCK": 8, "num_warps": 2, "num_stages": 1}
    assert Config({}, 2, 1, 128).options() == {"num_warps": 2, "num_stages": 1, "maxnreg": 128}


# --- measuring --------------------------------------------------------------------------------------------------------


def outputs(values: dict[int, Any]) -> Callable[[], Tensor]:
    """A launcher whose output depends on its configuration."""

    def run() -> Tensor:
        value = values[choose("op", KEY, candidates, GPU).constants["BLOCK"]]
        if isinstance(value, Exception):
            raise value
        return torch.full((3,), value)

    return run


def test_the_fastest_right_candidate_wins(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = outputs({128: 1.0, 32: 2.0, 64: 1.001})
    problem = Problem("op", KEY, [LARGE, SMALL, TALL], run)
    times = iter([3e-6, 2e-6])
    assert fastest(problem, lambda _: next(times)) == (TALL, 2e-6)
    said = capsys.readouterr().out
    assert "BLOCK=32 num_warps=4 num_stages=3: WRONG by 1 of" in said
    assert "BLOCK=64 num_warps=4 num_stages=3: 2.0 us" in said


def test_a_candidate_that_fails_is_left_out(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = outputs({128: 1.0, 32: RuntimeError("out of resource\nmore"), 64: 1.0})
    problem = Problem("op", KEY, [LARGE, SMALL, TALL], run)
    times = iter([3e-6, 4e-6])
    assert fastest(problem, lambda _: next(times)) == (LARGE, 3e-6)
    assert "RuntimeError: out of resource\n" in capsys.readouterr().out


def test_a_run_keeps_each_winner_and_goes_on_after_a_failure(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = outputs({128: 1.0, 32: 1.0, 64: 1.0}), outputs({128: ValueError("no such tile\nmore")})
    given = [("op", (1, "a"), right), ("op", (2, "a"), wrong), ("op", (3, "a"), right)]
    problems = [Problem(op, key, [LARGE, TALL], run) for op, key, run in given]
    seen: list[int] = []

    def seconds(run: Callable[[], Tensor]) -> float:
        seen.append(len(json.loads(records.read_text())["winners"]) if records.exists() else 0)
        return 1e-6 * (10 - len(seen))

    monkeypatch.setattr(
        tuning.importlib, "import_module", lambda _: SimpleNamespace(tuning_problems=lambda _: problems)
    )
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU-100 (SXM)")
    op = tuning.tunable()[0]

    assert tuning.main(["--op", op]) == 1
    assert seen == [0, 0, 1, 1], "a winner is on file before the next problem is measured"
    said = capsys.readouterr().out
    assert "ValueError: no such tile\n" in said
    assert "2 winners added; failed: op (2, 'a')" in said
    assert tuning.recorded(records) == {("op", (1, "a")): TALL, ("op", (3, "a")): TALL}

    problems[1] = Problem("op", (2, "a"), [LARGE], right)
    assert tuning.main(["--op", op]) == 0
    assert "op (1, 'a'): on record; --again measures it again" in capsys.readouterr().out
    assert len(seen) == 5, "only what is missing is measured"
    assert tuning.main(["--op", op, "--again"]) == 0
    assert len(seen) == 10


def test_forced_holds_for_its_op_alone(records: Path) -> None:
    with forced("op", LARGE):
        assert choose("op", KEY, candidates, GPU) is LARGE
        assert choose("another", KEY, candidates, GPU) is SMALL
    assert choose("op", KEY, candidates, GPU) is SMALL


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_measuring_is_refused_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tuning"])
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(SystemExit):
        tuning.main([])
    assert "torch sees no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize("name", tuning.tunable())
def test_problems_are_those_that_a_launcher_asks_for(name: str) -> None:
    """Interpreted, in a process of its own: each call chooses by the key of its problem, among its candidates."""
    code = f"""
import torch
from fastdiff.kernels import {name} as module, tuning
real, asked = tuning.choose, {{}}
def choose(op, key, candidates, device):
    asked[op, key] = list(candidates(*key))
    return real(op, key, candidates, device)
for kernels in list(__import__("sys").modules.values()):
    if getattr(kernels, "choose", None) is real and kernels is not tuning:
        kernels.choose = choose
smallest = {{}}
for problem in module.tuning_problems(torch.device("cpu")):
    rest = problem.op, problem.key[1:]  # one size of each kind: an interpreted program costs milliseconds
    if problem.key[0] < smallest.get(rest, 33):
        smallest[rest] = problem.key[0]
        asked.clear()
        problem.run()
        assert asked[problem.op, problem.key] == list(problem.candidates), (problem.op, problem.key, asked)
assert smallest
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
