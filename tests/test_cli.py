"""The command line: what it prints where, what it refuses, and output files that survive interruption."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import fastdiff
from fastdiff.cli import main
from fastdiff.engine import Engine
from fastdiff.ops import ALL
from fastdiff.ops.cpu import library
from tests.builders import small_engine
from tests.conftest import ROOT

HISTORIES = {
    "ann": [3, 7, 20],
    "bob": [5],
    "ca_ro": [1, 2, 3, 4, 5],
    "dé": [9, 9],
    "5": [10],
    "6": [3, 7, 20],
    "7": [8],
}
BATCH = 3


class Run:
    """Runs a command in this process: `run("generate", ...)` -> (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: Any) -> tuple[int, str, str]:
        self._capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def refused(self, *argv: Any) -> str:
        """The one line that a command refuses with."""
        code, out, err = self(*argv)
        assert (code, out) == (2, "")
        assert err.startswith("fastdiff: ")
        assert err.count("\n") == 1
        return err.removeprefix("fastdiff: ").rstrip("\n")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tarec"
    small_engine("tarec").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def named_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "named"
    small_engine("adrec", item_ids=[f"item-{i}" for i in range(50)]).save_pretrained(folder)
    return folder


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    path = tmp_path / "users.txt"
    path.write_text("".join(f"{user} {' '.join(map(str, items))}\n" for user, items in HISTORIES.items()))
    return path


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- generate: what it prints -----------------------------------------------------------------------------------------


def test_generate_prints_what_the_engine_returns(run: Run, model: Path, sequences: Path) -> None:
    code, out, err = run("generate", model, "--sequences", sequences, "--top-k", 4, "--seed", 7)
    assert code == 0
    expected = fastdiff.from_pretrained(model).generate(list(HISTORIES.values()), top_k=4, seed=7)
    rows = rows_of(out)
    assert [row["user"] for row in rows] == list(HISTORIES)
    assert [row["item_ids"] for row in rows] == expected.item_ids.tolist()
    assert torch.equal(torch.tensor([row["scores"] for row in rows]), expected.scores)  # not a bit is lost
    assert re.fullmatch(r"fastdiff: 7 users in .* s \(\d+ per second\), seed 7\n", err)


def test_a_drawn_seed_is_said_and_reproduces(run: Run, model: Path, sequences: Path) -> None:
    _, first, err = run("generate", model, "--sequences", sequences)
    seed = err.rsplit("seed ", 1)[1].strip()
    assert run("generate", model, "--sequences", sequences, "--seed", seed)[1] == first
    assert run("generate", model, "--sequences", sequences)[1] != first


def test_histories_on_the_command_line(run: Run, model: Path) -> None:
    _, out, _ = run("generate", model, "--history", "3 7 20", "--history", "", "--seed", 1, "--top-k", 3)
    expected = fastdiff.from_pretrained(model).generate([[3, 7, 20], []], top_k=3, seed=1)
    assert [(row["user"], row["item_ids"]) for row in rows_of(out)] == list(
        zip(["1", "2"], expected.item_ids.tolist(), strict=True)
    )


def test_text_ids(run: Run, named_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "log.inter"
    data.write_text("user_id:token\titem_id:token\nu1\titem-3\nu1\titem-4\nu2\titem-7\n")
    code, out, err = run("generate", named_model, "--sequences", data, "--seed", 1, "--top-k", 49)
    rows = rows_of(out)
    assert code == 0
    assert [row["user"] for row in rows] == ["u1", "u2"]
    assert set(rows[0]["item_ids"]) == {f"item-{i}" for i in range(50)} - {"item-3", "item-4"}  # shorter than top_k
    assert len(rows[0]["scores"]) == 48
    assert err.startswith("fastdiff: log.inter has no timestamp column")
    published = run("generate", named_model, "--history", "", "--ranking", "published", "--top-k", 51, "--seed", 1)[1]
    assert "[PAD]" in rows_of(published)[0]["item_ids"]


def test_ranking_options(run: Run, model: Path, tmp_path: Path) -> None:
    def recommended(*options: Any) -> set[int]:
        return set(
            rows_of(run("generate", model, "--history", "3 7", "--top-k", 50, "--seed", 1, *options)[1])[0]["item_ids"]
        )

    everything = set(range(50))
    assert recommended() == everything - {3, 7}
    assert recommended("--no-filter-seen") == everything
    assert recommended("--filter-seen", "--exclude-items", "0,1, 2") == everything - {0, 1, 2, 3, 7}
    assert recommended("--candidate-items", "3,4,5") == {4, 5}
    (tmp_path / "ids.txt").write_text("8 9\n10\n")
    assert recommended("--candidate-items", tmp_path / "ids.txt", "--exclude-items", "9") == {8, 10}
    assert recommended("--exclude-items", ",".join(["1"] * 5000)) == everything - {1, 3, 7}  # longer than a file's name


def test_sampling_options_reach_the_engine(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = Engine.generate

    def spy(self: Engine, histories: Any, **arguments: Any) -> Any:
        seen.update(arguments)
        return real(self, histories, **arguments)

    monkeypatch.setattr(Engine, "generate", spy)
    options = {
        "num_inference_steps": 3,
        "scheduler": "ddim",
        "eta": 0.5,
        "guidance_scale": 2.0,
        "num_samples": 2,
        "aggregation": "mean",
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("generate", model, "--history", "3", *words)[0] == 0
    assert {name: seen[name] for name in options} == options


def test_coupled_models_say_so(run: Run, tmp_path: Path) -> None:
    small_engine("cddrec", batch_coupling="published").save_pretrained(tmp_path / "cddrec")
    _, _, err = run("generate", tmp_path / "cddrec", "--history", "3")
    assert "the users of a batch attend to one another in this model: the order and --batch-size 128 matter" in err


def test_a_closed_pipe_ends_quietly(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.target = (tmp_path / "stdout").open("wb")

        def write(self, _: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return self.target.fileno()

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert main(["generate", str(model), "--history", "3"]) == 0


def test_the_command_as_a_program(model: Path) -> None:
    """stdout holds JSON alone, also where stderr is no terminal."""
    argv = [sys.executable, "-m", "fastdiff", "generate", str(model), "--history", "3 7", "--seed", "1", "--top-k", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert len(rows_of(done.stdout)) == 1
    assert done.stderr.startswith("fastdiff: 1 user in ")
    wrong = subprocess.run([*argv, "--top-k", "0"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "fastdiff: generate: top_k must be an int of at least 1 (got 0)\n"


# --- generate: the output file ----------------------------------------------------------------------------------------


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the batch after the first `batches`."""
    real, calls = Engine.generate, []

    def generate(self: Engine, histories: Any, **arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return real(self, histories, **arguments)

    monkeypatch.setattr(Engine, "generate", generate)


@pytest.fixture
def command(model: Path, sequences: Path) -> list[Any]:
    return ["generate", model, "--sequences", sequences, "--batch-size", BATCH, "--top-k", 4, "--output"]


def test_a_file_is_whole_or_not_there(run: Run, command: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, stdout, err = run(*command, out, "--seed", 7)
    assert (code, stdout) == (0, "")
    assert err.endswith(f"seed 7; written to {out}\n")
    assert out.read_text() == run(*command[:-1], "--seed", 7)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "users.txt"]


@pytest.mark.parametrize("seed", [[], ["--seed", "7"]])
def test_ctrl_c_and_the_advice_that_it_gives(
    run: Run, command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: list[str]
) -> None:
    out, part = tmp_path / "out file.jsonl", tmp_path / "out file.jsonl.part"
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        code, stdout, err = run(*command, out, *seed, "--overwrite")
    assert (code, stdout) == (130, "")
    assert f"fastdiff: interrupted: 3 of 7 users are kept in {part}; continue with: fastdiff generate" in err
    assert not out.exists()
    assert len(rows_of(part.read_text())) == BATCH
    advice = shlex.split(err.split("continue with: fastdiff ", 1)[1])
    assert advice[-1] == "--resume"
    assert "--overwrite" not in advice
    code, _, err = run(*advice)
    assert code == 0
    assert err.startswith("fastdiff: 3 of 7 users are done, continuing\nfastdiff: 4 users in ")
    drawn = re.search(r"seed (\d+)", err)
    assert drawn is not None
    assert out.read_text() == run(*command[:-1], "--seed", drawn[1])[1]


def test_ctrl_c_on_stdout(run: Run, command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(1, monkeypatch)
    code, stdout, err = run(*command[:-1])
    assert code == 130
    assert len(rows_of(stdout)) == BATCH
    assert err == "fastdiff: interrupted after 3 of 7 users; with --output FILE a run can be continued\n"


def test_ctrl_c_anywhere_else(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(0, monkeypatch)
    code, stdout, err = run("evaluate", model, model.parent / "none.npz")
    assert code == 2  # before any batch: the missing file is what counts
    np.savez(model.parent / "one.npz", history=[[1]], history_len=[1], target=[2])
    code, stdout, err = run("evaluate", model, model.parent / "one.npz")
    assert (code, stdout, err) == (130, "", "fastdiff: interrupted\n")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[list[str], Path, bytes, bytes]:
    """A command, its output file, the bytes of an unbroken run, and the record of an interrupted one."""
    folder = tmp_path_factory.mktemp("unfinished")
    data, out = folder / "users.txt", folder / "out.jsonl"
    data.write_text("".join(f"{user} {' '.join(map(str, items))}\n" for user, items in HISTORIES.items()))
    command = [
        "generate",
        str(model),
        "--sequences",
        str(data),
        "--batch-size",
        str(BATCH),
        "--seed",
        "7",
        "--output",
        str(out),
    ]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(0, patch)
        assert main(command) == 130
    record = (folder / "out.jsonl.part.json").read_bytes()
    assert main([*command, "--overwrite"]) == 0
    return command, out, out.read_bytes(), record


@given(st.data())
def test_a_run_killed_at_any_byte_is_continued_to_the_same_file(
    unfinished: tuple[list[str], Path, bytes, bytes], data: st.DataObject
) -> None:
    command, out, whole, record = unfinished
    ends = [0, *(match.end() for match in re.finditer(b"\n", whole))]
    cut = data.draw(st.one_of(st.sampled_from(ends), st.integers(0, len(whole))), label="cut")
    tail = data.draw(st.sampled_from([b"", b"\0" * 9, b"{}\n", b'{"user": "someone else"}\n', b"\xff\n"]), label="tail")
    part = out.with_name("out.jsonl.part")
    out.unlink(missing_ok=True)
    part.write_bytes(whole[:cut] + tail)
    part.with_name("out.jsonl.part.json").write_bytes(record)
    assert main([*command, "--resume"]) == 0
    assert out.read_bytes() == whole
    assert not part.exists()
    assert not part.with_name("out.jsonl.part.json").exists()


def test_a_killed_run_redoes_less_than_a_batch(
    unfinished: tuple[list[str], Path, bytes, bytes], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out, whole, record = unfinished
    lines = whole.splitlines(keepends=True)
    for kept in range(len(lines) + 1):
        out.unlink(missing_ok=True)
        out.with_name("out.jsonl.part").write_bytes(b"".join(lines[:kept]))
        out.with_name("out.jsonl.part.json").write_bytes(record)
        _, _, err = run(*command, "--resume")
        assert err.startswith(f"fastdiff: {kept - kept % BATCH} of 7 users are done, continuing\n")
        assert out.read_bytes() == whole


def test_resume_begins_where_there_is_nothing(run: Run, command: list[Any], tmp_path: Path) -> None:
    code, _, err = run(*command, tmp_path / "out.jsonl", "--seed", 7, "--resume")
    assert code == 0
    assert err.startswith("fastdiff: no unfinished run here, beginning one\nfastdiff: 7 users in")


def test_resume_where_only_the_record_was_written(unfinished: tuple[list[str], Path, bytes, bytes], run: Run) -> None:
    command, out, whole, record = unfinished
    out.unlink(missing_ok=True)
    out.with_name("out.jsonl.part.json").write_bytes(record)
    assert run(*command, "--resume")[0] == 0
    assert out.read_bytes() == whole


def test_what_is_there_is_not_destroyed(
    run: Run, command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert run.refused(*command, out) == f"--output: {out} exists; give another name, or --overwrite to replace it"
    assert run.refused(*command, out, "--resume") == (
        f"--resume: {out} is complete, there is nothing to continue; give another name, or --overwrite to replace it"
    )
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert run(*command, out, "--overwrite")[0] == 130
    assert out.read_text() == "precious"  # until the new file is whole
    out.unlink()
    assert run.refused(*command, out) == (
        f"--output: {out}.part holds an unfinished run; give --resume to continue it, or --overwrite to begin again"
    )
    assert run(*command, out, "--overwrite", "--seed", 8)[0] == 0
    assert len(rows_of(out.read_text())) == 7


def test_a_run_is_not_continued_as_another(
    unfinished: tuple[list[str], Path, bytes, bytes], run: Run, tmp_path: Path, model: Path
) -> None:
    command, out, whole, record = unfinished
    out.unlink(missing_ok=True)
    part = out.with_name("out.jsonl.part")
    part.write_bytes(whole)
    part.with_name("out.jsonl.part.json").write_bytes(record)
    assert run.refused(*command, "--resume", "--seed", 8, "--top-k", 3, "--exclude-items", ",".join(["1"] * 50)) == (
        f"--resume: {part} was made otherwise: seed was 7, now 8; top_k was None, now 3; "
        f"exclude_items was None, now [{'1, ' * 18}1,...; give the same, or --overwrite to begin again"
    )
    other = tmp_path / "users.txt"
    other.write_text("ann 3\n")
    assert "input (contents) was" in run.refused(*command, "--resume", "--sequences", other)
    small_engine("tarec", seed=1).save_pretrained(tmp_path / "other")
    changed = [str(tmp_path / "other") if word == str(model) else word for word in command]
    assert "model (contents) was" in run.refused(*changed, "--resume")
    assert "dtype was 'float32', now 'float64'" in run.refused(*command, "--resume", "--dtype", "float64")
    copied = tmp_path / "copy.txt"
    shutil.copy(command[command.index("--sequences") + 1], copied)
    assert run(*command, "--resume", "--sequences", copied)[0] == 0  # the same input under another name
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, r"--resume: .*out.jsonl.part.json is missing, so what out.jsonl.part was made from is not known"),
        ("{", r"out.jsonl.part.json: not the JSON that a run leaves \("),
        ("[1]", r"out.jsonl.part.json: not the record that a run leaves \(got \[1\]\)"),
        ("{}", r"not the record that a run leaves \(got \{\}\)"),
    ],
)
def test_damaged_records(run: Run, command: list[Any], tmp_path: Path, record: str | None, message: str) -> None:
    (tmp_path / "out.jsonl.part").write_text("")
    if record is not None:
        (tmp_path / "out.jsonl.part.json").write_text(record)
    refusal = run.refused(*command, tmp_path / "out.jsonl", "--resume")
    assert re.search(message, refusal)
    assert refusal.endswith("give --overwrite to begin again")


def test_places_where_no_file_can_be(run: Run, command: list[Any], tmp_path: Path) -> None:
    assert run.refused(*command, tmp_path) == f"--output: {tmp_path} is a folder; give the name of a file"
    assert (
        run.refused(*command, tmp_path / "no" / "out")
        == f"--output: there is no folder {tmp_path / 'no'}; make it first"
    )


def test_a_full_disk_is_one_line(run: Run, command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff.cli.output.PartFile.write", full)
    assert run.refused(*command, tmp_path / "out.jsonl") == "files: No space left on device"


def test_ids_with_blanks_stand_in_quotes(run: Run, tmp_path: Path) -> None:
    names = ["Reef, part 1", "Bob's", *(f"item-{i}" for i in range(48))]
    small_engine("adrec", item_ids=names).save_pretrained(tmp_path / "model")
    code, out, _ = run("generate", tmp_path / "model", "--history", "'Reef, part 1' item-3", "--top-k", 50)
    assert (code, set(names) - set(rows_of(out)[0]["item_ids"])) == (0, {"Reef, part 1", "item-3"})
    code, out, _ = run("generate", tmp_path / "model", "--history", "Bob's item-3", "--top-k", 50)
    assert (code, set(names) - set(rows_of(out)[0]["item_ids"])) == (0, {"Bob's", "item-3"})
    refused = run.refused("generate", tmp_path / "model", "--history", "Reef, part 1")
    assert "item id 'Reef,' is not in the catalogue" in refused
    assert refused.endswith("""one with blanks in it stands in quotes: --history '"an id" other')""")
    (tmp_path / "users.txt").write_text("ann Reef, part 1\n")
    refused = run.refused("generate", tmp_path / "model", "--sequences", tmp_path / "users.txt")
    assert "a RecBole .inter file, separated by tabs, may hold ids with blanks" in refused


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--history", "3 x"], "--history 1: item id 'x' is not an integer of 64 bits"),
        (
            ["--history", "3", "--history", "99"],
            "--history 2: item id 99 is not in the catalogue, which has ids 0..49; leave",
        ),
        (["--history", "3", "--batch-size", "0"], "--batch-size: must be at least 1 (got 0)"),
        (["--history", "3", "--top-k", "0"], "generate: top_k must be an int of at least 1 (got 0)"),
        (
            ["--history", "3", "--scheduler", "euler"],
            "generate: scheduler must be one of ddpm, ddim, one_step, closed_form",
        ),
        (["--history", "3", "--aggregation", "min"], "generate: aggregation must be one of max, mean"),
        (
            ["--history", "3", "--dtype", "int8"],
            "--dtype: must be one of float32, float64, bfloat16, float16 (got 'int8')",
        ),
        (["--history", "3", "--device", "abacus"], "device: 'abacus'"),
        (["--history", "3", "--backend", "abacus"], "backend: unknown name 'abacus'; known backends: auto, torch"),
        (
            ["--history", "3", "--ranking", "published", "--filter-seen"],
            "generate: ranking='published' excludes filter_seen",
        ),
        (["--history", "3", "--exclude-items", "99"], "generate: exclude_items holds item id 99"),
        (["--history", "3", "--exclude-items", "a.txt"], "--exclude-items: item id 'a.txt' is not an integer"),
        (["--sequences", "nowhere.txt"], "nowhere.txt: there is no such file"),
    ],
)
def test_wrong_values_are_refused_in_one_line(run: Run, model: Path, options: list[str], message: str) -> None:
    assert run.refused("generate", model, *options).startswith(message)


def test_a_bad_last_line_is_found_before_any_work(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "users.txt"
    path.write_text("a 3\n\nb 99\n")
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: pytest.fail("it should not come to this"))
    assert run.refused("generate", model, "--sequences", path).startswith(
        f"{path}:3: item id 99 is not in the catalogue, which has ids 0..49; leave the item out"
    )
    path.write_text("a 3\nb\n")
    assert run.refused("generate", model, "--sequences", path).startswith(f"{path}:2: a user without items")


def test_scores_that_are_not_finite(run: Run, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    real = Engine.generate

    def broken(self: Engine, *arguments: Any, **named: Any) -> Any:
        output = real(self, *arguments, **named)
        output.scores.fill_(float("nan"))
        return output

    monkeypatch.setattr(Engine, "generate", broken)
    refusal = run.refused("generate", model, "--history", "3", "--history", "4")
    assert refusal.startswith("--history 1: the model gives scores that are not finite; are its weights sound")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["bake"], "invalid choice: 'bake'"),
        (["generate", "m"], "one of the arguments --sequences --history is required"),
        (["generate", "m", "--history", "3", "--sequences", "f"], "not allowed with argument"),
        (["generate", "m", "--history", "3", "--resume"], "--resume and --overwrite need --output FILE"),
        (["generate", "m", "--history", "3", "--output", "f", "--resume", "--overwrite"], "not allowed with argument"),
        (["generate", "m", "--history", "3", "--topk", "3"], "unrecognized arguments: --topk"),
        (["generate", "m", "--history", "3", "--over"], "unrecognized arguments: --over"),
        (["generate", "m", "--history", "3", "--ranking", "best"], "invalid choice: 'best'"),
        (["evaluate", "m", "f", "--split", "train"], "invalid choice: 'train'"),
        (["convert", "--method", "adrec"], "required: --weights, --settings, --output"),
    ],
)
def test_usage_errors(run: Run, argv: list[str], message: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("usage: fastdiff")
    assert message in err


@pytest.mark.parametrize("command", ["generate", "evaluate", "convert", "env"])
def test_help_holds_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"\n  fastdiff {command} " in out or f"\n  fastdiff {command}\n" in out
    assert run("--version")[1] == f"fastdiff {fastdiff.__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    check = (
        "import sys; from fastdiff.cli import build_parser; build_parser().format_help(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_as_json(run: Run, model: Path, sequences: Path) -> None:
    code, out, _ = run("evaluate", model, sequences, "--json", "--seed", 3, "--scheduler", "ddim", "--batch-size", 2)
    facts = json.loads(out)
    assert code == 0
    assert out.count("\n") == 1
    assert (facts["users"], facts["skipped_users"], facts["fewest_items"], facts["split"]) == (4, 3, 2, "test")
    assert (facts["method"], facts["ranking"], facts["seed"], facts["batch_size"]) == ("tarec", "published", 3, 2)
    assert facts["arguments"] == {"scheduler": "ddim"}
    assert facts["generation_config"]["scheduler"] == "one_step"
    assert {name.split("@")[0] for name in facts["metrics"]} == {"HR", "NDCG", "MRR", "coverage"}
    assert set(facts["standard_errors"]) == {"HR@5", "HR@10", "HR@20"}
    assert facts["policy"][-1].startswith("noise: seed 3")
    again = json.loads(run("evaluate", model, sequences, "--json", "--seed", 3, "--scheduler", "ddim")[1])
    assert again["metrics"] == facts["metrics"]
    assert again["average"] == "users"


def test_evaluate_averages_as_it_is_told(run: Run, model: Path, sequences: Path) -> None:
    asked = ("evaluate", model, sequences, "--json", "--batch-size", 3, "--average")
    users, batches = (json.loads(run(*asked, average)[1]) for average in ("users", "batches"))
    assert batches["average"] == "batches"
    assert batches["policy"] == [*users["policy"], "average: over batches of 3 users in file order, the last one of 1"]


def test_evaluate_for_people(run: Run, model: Path, sequences: Path) -> None:
    code, out, err = run("evaluate", model, sequences, "--ranking", "clean", "--split", "valid", "--num-samples", 2)
    assert (code, err) == (0, "")
    assert f"{sequences}, split valid: 3 users (4 more skipped: fewer than 3 items)" in out
    assert "sampling: num_samples 2, else the model's own settings (" in out
    assert "ranking: clean (candidates: the 50 items of the catalogue)" in out
    assert "seen items: left out" in out
    assert re.search(r"^per cent +@5 +@10 +@20$", out, re.MULTILINE)
    for name in ("HR", "NDCG", "coverage"):
        assert re.search(rf"^{name} +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d$", out, re.MULTILINE)
    assert re.search(r"^\+- .* \(standard error of HR\)$", out, re.MULTILINE)
    assert re.search(r"^MRR +\d+\.\d\d$", out, re.MULTILINE)
    assert re.search(
        r"^time .* s, \d+ histories per second \(prepare .* s, encode .* s, denoise .* s, rank .* s\)$",
        out,
        re.MULTILINE,
    )


def test_evaluate_instances(run: Run, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "test.npz"
    np.savez(data, history=[[50, 50], [3, 50], [3, 4]], history_len=[1, 1, 2], target=[3, 4, 5])
    facts = json.loads(run("evaluate", model, data, "--json", "--limit", 2)[1])
    assert (facts["users"], facts["split"], facts["fewest_items"]) == (2, None, None)
    code, _, err = run("evaluate", model, data, "--split", "test")
    assert code == 2
    assert "--split belongs to files of sequences; an .npz file holds one split" in err


def test_evaluate_notes_missing_times(run: Run, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "log.inter"
    data.write_text("user_id:token\titem_id:token\n1\t3\n1\t4\n")
    code, out, err = run("evaluate", model, data, "--json")
    assert code == 0
    assert json.loads(out)["notes"] == [err.removeprefix("fastdiff: ").rstrip("\n")]
    assert err.startswith("fastdiff: log.inter has no timestamp column")


def test_evaluate_refuses(run: Run, model: Path, sequences: Path, tmp_path: Path) -> None:
    assert run.refused("evaluate", model, tmp_path / "no").startswith(f"{tmp_path / 'no'}: there is no such file")
    assert run.refused("evaluate", model, sequences, "--limit", 0).startswith(
        "evaluate: limit must be an int of at least 1"
    )
    assert "excludes filter_seen" in run.refused("evaluate", model, sequences, "--filter-seen")


# --- convert and env --------------------------------------------------------------------------------------------------


@pytest.fixture
def authors_files(tmp_path: Path) -> list[Any]:
    """A CDDRec checkpoint as its authors write it, and the command that converts it."""
    engine = small_engine("cddrec")
    schedule = engine.config.schedule
    save_file(engine.model.weights, tmp_path / "best.safetensors")
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "max_seq_length": 8,
        "T": schedule.num_train_timesteps,
        "beta_1": schedule.beta_start,
        "beta_T": schedule.beta_end,
        "item_size": 52,
    }
    (tmp_path / "args.json").write_text(json.dumps(settings))
    options = {"method": "cddrec", "weights": tmp_path / "best.safetensors", "settings": tmp_path / "args.json"}
    return ["convert", *(word for name, value in options.items() for word in (f"--{name}", value)), "--output"]


def test_convert_says_what_it_wrote(run: Run, authors_files: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    code, out, err = run(*authors_files, folder)
    assert (code, err) == (0, "")
    assert out.startswith(f"{folder}: cddrec, 50 items (ids 1..50, pad 0), D = 16, window 8\n")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert re.search(rf"^  {name} .*bytes$", out, re.MULTILINE)
    assert f"fastdiff evaluate {folder} sequences.txt" in out
    assert run("generate", folder, "--history", "3 4", "--history", "3,4")[0] == 0


def test_convert_with_item_ids(run: Run, authors_files: list[Any], tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("".join(f"sku-{i}\n" for i in range(50)))
    assert run(*authors_files, tmp_path / "model", "--item-ids", tmp_path / "ids.txt")[0] == 0
    row = rows_of(run("generate", tmp_path / "model", "--history", "sku-3", "--top-k", 50)[1])[0]
    assert set(row["item_ids"]) == {f"sku-{i}" for i in range(50)} - {"sku-3"}


def test_convert_does_not_overwrite_unasked(run: Run, authors_files: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert run(*authors_files, folder)[0] == 0
    assert run.refused(*authors_files, folder) == (
        f"--output: {folder} exists and is not empty; give another name, or --overwrite to replace it"
    )
    assert run(*authors_files, folder, "--overwrite")[0] == 0
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" in run.refused(*authors_files, folder, "--overwrite")
    assert (folder / "notes.txt").exists()


def test_convert_refuses(run: Run, authors_files: list[Any], tmp_path: Path) -> None:
    assert "abacus" in run.refused(
        *(["abacus" if word == "cddrec" else word for word in authors_files]), tmp_path / "model"
    )
    assert not (tmp_path / "model").exists()


def test_env_as_json(run: Run) -> None:
    code, out, err = run("env", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0]["device"] == "cpu"
    assert set(facts["backends"]) == {"torch", "cpu", "triton", "cuda"}
    assert facts["backends"]["torch"] == {"available": True, "why_not": {}}
    assert set(facts["ops"]) == {op.name for op in ALL}
    assert all(reasons["torch"] is None for reasons in facts["ops"].values())


def test_env_for_people(run: Run) -> None:
    code, out, _ = run("env")
    assert code == 0
    assert f"package    {Path(fastdiff.__file__).parent}\n" in out
    assert f"fastdiff {fastdiff.__version__}" in out
    assert re.search(r"^  torch    yes$", out, re.MULTILINE)
    assert re.search(r"^  cuda     no \(on cpu: this version of fastdiff has no 'cuda' ops", out, re.MULTILINE)
    for op in ALL:
        assert re.search(rf"^  {op.name} +yes", out, re.MULTILINE)


def test_env_with_and_without_the_cpp_ops(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.why_not() is None:
        highest = library.available_levels()[-1]
        with library.at_level("baseline"):
            facts = json.loads(run("env", "--json")[1])["cpu_ops"]
            assert facts == {"built": True, "level": "baseline", "levels": list(library.available_levels())}
            if highest != "baseline":
                assert f"built; CPU level baseline (the highest here is {highest}; " in run("env")[1]
        with library.at_level(highest):
            assert f"built; CPU level {highest} (the highest here; " in run("env")[1]
    monkeypatch.setattr(library, "why_not", lambda: "they were not built")
    assert "C++ ops (libfastdiff)    not available: they were not built\n" in run("env")[1]


def test_an_unknown_cpu_level_is_an_error(tmp_path: Path) -> None:
    if library.why_not() is not None:
        pytest.skip("the C++ ops are not built")
    environment = {**os.environ, "FASTDIFF_CPU_CAPABILITY": "avx3", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastdiff", "env"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode != 0
    assert "FASTDIFF_CPU_CAPABILITY: unknown level 'avx3'; known levels: baseline, avx2, " in result.stderr
    assert "Traceback" not in result.stderr


def test_only_the_cpu_backend_minds_a_wrong_cpu_level(model: Path, tmp_path: Path) -> None:
    if library.why_not() is not None:
        pytest.skip("the C++ ops are not built")
    highest = library.available_levels()[-1]
    for level, backend, code in (
        ("avx3", "torch", 0),
        ("avx3", "cpu", 2),
        ("avx3", "auto", 2),
        (f" {highest.upper()} ", "cpu", 0),
    ):
        environment = {**os.environ, "FASTDIFF_CPU_CAPABILITY": level, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "fastdiff", "generate", str(model), "--history", "3", "--backend", backend]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert result.returncode == code, result.stderr


def test_env_with_and_without_the_cpp_part(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], Any] = lambda name: None  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find)
    assert f"C++ input reader (_C)    not available: it was not built; build it: {library.BUILD}\n" in run("env")[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "fastdiff._C", None)
    monkeypatch.delattr(fastdiff, "_C", raising=False)
    assert "not available: it was built, and cannot be loaded: " in run("env")[1]

    class Built:
        @staticmethod
        def build_facts() -> dict[str, str]:
            return {"compiler": "g++ 12"}

        @staticmethod
        def cpu_capabilities() -> dict[str, bool]:
            return {"avx2": True, "avx512": False}

    monkeypatch.setattr(fastdiff, "_C", Built, raising=False)
    monkeypatch.setitem(sys.modules, "fastdiff._C", Built)
    out = run("env")[1]
    assert "C++ input reader (_C)    built: compiler g++ 12\n" in out
    assert re.search(r"^CPU        avx2(, |$)", out, re.MULTILINE)
    if library.why_not() is None:
        assert all(level in out.split("CPU        ")[1].splitlines()[0] for level in library.available_levels()[2:])
    facts = json.loads(run("env", "--json")[1])["extension"]
    assert facts["cpu_capabilities"] == {"avx2": True, "avx512": False}
