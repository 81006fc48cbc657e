"""`python -m bench.ops OP`: one op at a time, every backend that can run it here against the best plain PyTorch.

    python -m bench.ops decode_context --batch 1 128 --device cuda --dtype float16 --compile

Each is checked against the reference in float64, then timed in turns: median, p10 and p90, GB/s and FLOP/s of what the
call has to move and multiply, and its share of what this machine was measured to do. The call is one that the engine
makes (`bench/calls.py`). Rows are written only where --output names a file: ops are not compared in the report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.__main__ import device_of, refuse_interpreted
from bench.baselines import Calls, Wrap, compiled_only
from bench.bench_score_topk import score_topk_case
from bench.calls import SOURCES, Call, record, tensors_in
from bench.cases import GOLDEN, Absent, Case, Gate, Options, Provider, relative_error
from bench.graphs import Replayed, graphed_only
from bench.harness import Session, measure
from bench.rows import append_rows
from bench.timing import Budget
from fastdiff.config import DTYPES
from fastdiff.ops import ALL
from fastdiff.ops.backend import BACKENDS, Op

BATCHES = (1, 32, 256)
OTHERS = {"philox_normals": ("torch-randn",)}
"""Rivals beside the reference, which is the best plain PyTorch that we know, and the reference under torch.compile."""


def op_case(op: Op, batch: int, dtype: torch.dtype = torch.float32, **sizes: int) -> Case:
    """The case of one op; `sizes` go to the model that calls it, or to `score_topk_case`."""
    if op.name == "score_topk":
        if dtype != torch.float32:
            raise ValueError(f"--dtype: score_topk takes float32 only (got {str(dtype).removeprefix('torch.')})")
        return score_topk_case(**{"n_items": 100_000, "k": 100, "batch": batch, **sizes})
    params: dict[str, int | str] = {"op": op.name, "dtype": str(dtype).removeprefix("torch."), "batch": batch}
    build = partial(providers, op, batch, dtype, sizes)
    others = (*OTHERS.get(op.name, ()), "fastdiff-compiled", "fastdiff-graphed")
    return Case("op", params, SOURCES[op.name].setting, build, (op,), others, ("fastdiff", "fastdiff-graph"))


def providers(
    op: Op, batch: int, dtype: torch.dtype, sizes: dict[str, int], options: Options
) -> Iterator[Provider | Absent]:
    call = record(op, batch, options.device, dtype, **sizes)
    output = call.on("torch")()
    check = _check(call, output)
    facts: dict[str, Any] = {
        "bytes": call.bytes(output),
        # no product in float16 is measured; a GPU's matrix units are as fast in it as in bfloat16
        "arithmetic": "float32" if dtype == torch.float32 else "bfloat16",
    }
    if op.name == "philox_normals":
        shape, device = output.shape, options.device
        yield Provider("torch-randn", lambda: torch.randn(shape, device=device), _moments, aside=True, **facts)

    def compiled(wrap: Wrap) -> Calls:
        return replace(call, op=Op(op.name, wrap(op.reference))).on("torch"), None

    yield from compiled_only("fastdiff-compiled", compiled, check, options, **facts)
    yield from graphed_only(partial(_captured, call, "torch"), check, options, **facts)
    for backend in BACKENDS:
        reason = op.why_not(backend, options.device, dtype)
        if reason is None and backend == "triton":
            captured = partial(_captured, call, backend)
            yield from graphed_only(captured, check, options, "fastdiff-graph", backend, **facts)
        if reason is None:
            yield Provider("fastdiff", call.on(backend), check, backend=backend, **facts)
        else:
            yield Absent(f"fastdiff[{backend}]", reason)


def _captured(call: Call, backend: str) -> Calls:
    return Replayed(call.on(backend)), None


def _check(call: Call, output: Any) -> Callable[[Any], Gate]:
    """Within twice the error of plain PyTorch in the same dtype, and float32's tolerance."""
    truth = _numbers(call.in_float64())
    tolerance = max(GOLDEN, 2 * _error(output, truth))
    return lambda found: Gate(_error(found, truth), tolerance, "the reference in float64")


def _numbers(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _error(output: Any, truth: list[Tensor]) -> float:
    found = _numbers(output)
    if len(found) != len(truth):
        return float("inf")
    return max(_apart(ours, exact) for ours, exact in zip(found, truth, strict=True))


def _apart(ours: Tensor, exact: Tensor) -> float:
    """The relative error, where what is not finite has to be the same."""
    finite = exact.isfinite()
    if ours.shape != exact.shape or not torch.equal(ours[~finite].to(exact.dtype), exact[~finite]):
        return float("inf")
    return relative_error(ours[finite], exact[finite]) if bool(finite.any()) else 0.0


def _moments(draws: Tensor) -> Gate:
    error = max(float(draws.mean().abs()), float((draws.var() - 1).abs())) * draws.numel() ** 0.5
    return Gate(error, 8.0, "mean 0 and variance 1, in standard errors")


def main(arguments: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m bench.ops", description=(__doc__ or "").split("\n")[0])
    command.add_argument("op", choices=[op.name for op in ALL])
    command.add_argument("--batch", nargs="+", type=int, metavar="B", default=BATCHES, help="users (1 32 256)")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    command.add_argument("--dtype", default="float32", choices=[*DTYPES], help="of the model (default float32)")
    command.add_argument("--interpreted", action="store_true", help="measure even where TRITON_INTERPRET=1 is set")
    command.add_argument("--compile", action="store_true", help="plain PyTorch under torch.compile as well (minutes)")
    command.add_argument("--seconds", type=float, default=1.0, help="time spent per provider (default 1)")
    command.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    command.add_argument("--output", type=Path, help="rows are appended here (default: they are only shown)")
    given = command.parse_args(arguments)
    (op,) = (op for op in ALL if op.name == given.op)
    try:
        device = device_of(given.device)
        refuse_interpreted(given.interpreted)
        cases = [op_case(op, batch, DTYPES[given.dtype]) for batch in given.batch]
    except ValueError as error:
        command.error(str(error))
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    session = Session.open(Options(device, given.compile), Budget(seconds=given.seconds))
    rows = []
    for case in cases:
        measured = measure(case, session)
        rows += measured
        if given.output is not None:
            append_rows(measured, given.output)
    if given.output is not None:
        print(f"\n{len(rows)} rows appended to {given.output}")
    wrong = sorted({row["provider"] for row in rows if row["status"] != "ok"})
    if wrong:
        print(f"WRONG: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
