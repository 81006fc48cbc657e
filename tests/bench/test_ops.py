"""`python -m bench.ops`: every op has a case, which checks its answer before it is timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import ops as command
from bench import roofline
from bench.calls import SOURCES, record, tensors_in
from bench.harness import Session, measure
from bench.ops import op_case
from bench.rows import read_rows
from fastdiff.ops import ALL
from fastdiff.ops.backend import Op
from tests.bench.toys import CEILINGS, Listener

TINY = {"hidden_size": 16, "n_items": 60}
CPU = torch.device("cpu")


def test_every_op_has_a_case() -> None:
    assert {*SOURCES, "score_topk"} == {op.name for op in ALL}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_a_tiny_case(op: Op, dtype: torch.dtype, session: Session, listener: Listener) -> None:
    if op.name == "score_topk":
        if dtype != torch.float32:
            with pytest.raises(ValueError, match=r"--dtype: score_topk takes float32 only \(got float16\)"):
                op_case(op, 3, dtype)
            return
        rows = measure(op_case(op, 3, n_items=200, k=7, dim=8), session)
    else:
        rows = measure(op_case(op, 3, dtype, **TINY), session)
    ran = {row["backend"] for row in rows if row["provider"] == "fastdiff"}
    assert ran == set(op.available("cpu", dtype))
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["bytes"] > 0 for row in rows)
    assert "GB/s" in listener.text


def test_a_wrong_answer_gets_no_time(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    (op,) = (op for op in ALL if op.name == "row_linear")
    case = op_case(op, 3, **TINY)
    monkeypatch.setattr(type(record(op, 3, CPU, torch.float32, **TINY)), "in_float64", lambda call: torch.ones(3, 16))
    assert {row["status"] for row in measure(case, session)} == {"WRONG"}


def test_a_call_counts_each_tensor_once_and_the_rows_in_use() -> None:
    (op,) = (op for op in ALL if op.name == "encode_padded_history")
    call = record(op, 3, CPU, torch.float32, **TINY)
    items, encoder = call.arguments["items"], call.arguments["encoder"]
    weights = sum(4 * tensor.numel() for tensor in tensors_in(encoder))
    table = 4 * 16 * min(items.numel(), call.arguments["item_table"].shape[0])
    output = call.on("torch")()
    assert call.bytes(output) == weights + table + 8 * items.numel() + 8 * 3 + 4 * output.numel()
    twice = replace(call, arguments={**call.arguments, "again": encoder})
    assert twice.bytes(output) == call.bytes(output)


def test_noise_and_prefixes_are_new_in_every_call() -> None:
    for name in ("denoise_attention_loop", "denoise_mlp_loop"):
        (op,) = (op for op in ALL if op.name == name)
        call = record(op, 2, CPU, torch.float32, **TINY)
        kept = {name: dict(vars(value)) for name, value in call.arguments.items() if hasattr(value, "__dict__")}
        assert torch.equal(call.on("torch")(), call.on("torch")())
        assert all(vars(call.arguments[name]).keys() == before.keys() for name, before in kept.items())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "ceilings", lambda _: CEILINGS)
    output = tmp_path / "rows.jsonl"
    arguments = ["sampler_step", "--batch", "2", "--seconds", "0.001", "--output", str(output)]
    assert command.main(arguments) == 0
    rows = read_rows(output)
    assert {row["params"]["op"] for row in rows} == {"sampler_step"}
    assert f"{len(rows)} rows appended" in capsys.readouterr().out
    for wrong, message in ((["--device", "tpu"], "must be cpu or cuda"), (["--batch", "x"], "invalid int value")):
        with pytest.raises(SystemExit):
            command.main(["sampler_step", *wrong])
        assert message in capsys.readouterr().err
