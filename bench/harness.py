"""From a case to rows: build it, check every provider, time those that passed, and write down what a row needs.

A row is one JSON object on one line: what was measured (case, params, setting, provider, backend), the figures
(median_s, p10_s, p90_s, samples, calls_per_sample, flops, bytes, setup_s), the check (status, error, tolerance,
against) and where (machine, ceilings, others, load, date, run, commit, version). A provider that fails its check has
the status "WRONG" and no figures.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from bench import machine
from bench.cases import Absent, Case, Gate, Options, Provider
from bench.timing import Budget, Timing, clock_for, estimate_seconds, interleaved

Row = dict[str, Any]

SLOW = 2.0
"""A plain PyTorch call that took longer than this to be checked is not run again only to warm up."""


@dataclass(frozen=True)
class Checked:
    """A provider after its check: the gate's verdict, a first estimate of its time, and the FLOPs of a call."""

    provider: Provider
    gate: Gate
    estimate: float
    flops: float | None


@dataclass
class Session:
    """What is the same for all rows of one run."""

    options: Options
    budget: Budget
    facts: dict[str, Any]
    ceilings: dict[str, float]
    say: Callable[[str], None] = print
    started: str = field(default_factory=lambda: _now())
    absent: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, options: Options, budget: Budget, say: Callable[[str], None] = print) -> Session:
        """Look at the machine: print the machine line, warn when others use it, measure its ceilings."""
        facts = machine.facts(options.device)
        say(machine.describe(facts))
        busy, load = machine.busy_now(), machine.load_average()
        say(f"load average {load:.2f}; others keep {'unknown' if busy is None else f'{busy:.2f}'} cores busy")
        if (busy or 0.0) > machine.QUIET:
            say(
                "!!! WARNING: this machine is not quiet. On a loaded machine threads wait for each other, and ratios "
                "change as well.\n!!! Rows measured while others use it are marked; do not quote them."
            )
        ceilings = machine.ceilings(options.device)
        say(f"ceilings: {ceilings['gflops']:.0f} GFLOP/s (float32 matrix product), {ceilings['gbps']:.0f} GB/s (read)")
        return cls(options, budget, facts, ceilings, say)


def measure(case: Case, session: Session) -> list[Row]:
    """Check and time the providers of one case."""
    session.say(f"\n{case.id}  ({case.setting})")
    with torch.inference_mode():
        checked = _check_all(case, session)
        passed = {one.provider.label: one for one in checked if one.gate.passed}
        others, load = machine.Others(), machine.load_average()
        timings = interleaved(
            {label: one.provider.run for label, one in passed.items()},
            {label: one.estimate for label, one in passed.items()},
            session.budget,
            clock_for(session.options.device),
        )
        busy = others.cores()
    loads = (load, machine.load_average())
    rows = [_row(case, one, timings.get(one.provider.label), busy, loads, session) for one in checked]
    for row in rows:
        session.say("  " + line(row))
    if busy is not None and busy > machine.QUIET:
        session.say(f"  ! others kept {busy:.2f} cores busy meanwhile")
    return rows


def check(provider: Provider, options: Options) -> Checked:
    """Run a provider once and hold its output against the truth, before anything is timed."""
    call = provider.gated or provider.run
    # torch.compile traces nothing while a mode is on, and would run in eager for good
    counter = None if provider.is_compiled else FlopCounterMode(display=False)
    start = time.perf_counter()
    with counter or nullcontext():
        output = call()
    seconds = time.perf_counter() - start
    gate = provider.check(output)
    counted = None if counter is None else float(counter.get_total_flops()) or None
    flops = provider.flops if provider.flops is not None else counted
    if not gate.passed:
        return Checked(provider, gate, seconds, flops)
    if seconds < SLOW or provider.name != "published" or provider.gated is not None:
        seconds = estimate_seconds(provider.run, clock_for(options.device))
    return Checked(provider, gate, seconds, flops)


def _check_all(case: Case, session: Session) -> list[Checked]:
    checked = []
    for provider in case.build(session.options):
        if not session.options.wants(provider.name):
            continue
        if isinstance(provider, Absent):
            if provider.name not in session.absent:  # once in a run
                session.say(f"  {provider.name} is absent: {provider.reason}")
                session.absent.add(provider.name)
            continue
        checked.append(check(provider, session.options))
    # products inside kernels and compiled code are not seen; they do the work of the same provider in plain PyTorch
    seen = {one.provider.plain_name: one.flops for one in checked if one.provider.is_plain}
    return [
        one if one.provider.is_plain else replace(one, flops=seen.get(one.provider.plain_name, one.flops))
        for one in checked
    ]


def _row(
    case: Case,
    one: Checked,
    timing: Timing | None,
    busy: float | None,
    loads: tuple[float, float],
    session: Session,
) -> Row:
    provider, gate = one.provider, one.gate
    row: Row = {
        "case": case.name,
        "params": case.params,
        "setting": case.setting,
        "provider": provider.name,
        "backend": provider.backend,
        "status": "ok" if gate.passed else "WRONG",
        "error": gate.error,
        "tolerance": gate.tolerance,
        "against": gate.against,
    }
    if timing is not None:
        row |= {"median_s": timing.median, "p10_s": timing.p10, "p90_s": timing.p90}
        row |= {"samples": len(timing.samples), "calls_per_sample": timing.calls_per_sample}
        row |= {"flops": one.flops, "bytes": provider.bytes, "setup_s": provider.setup}
    return row | {
        "machine": session.facts,
        "ceilings": session.ceilings,
        "others": busy,
        "load": loads,
        "date": _now(),
        "run": session.started,
        "commit": machine.commit(),
        "version": fastdiff.__version__,
    }


def line(row: Row) -> str:
    """A row for the terminal: the figures, or WRONG and what is wrong."""
    label = row["provider"] if row["backend"] == "eager" else f"{row['provider']}[{row['backend']}]"
    if row["status"] != "ok":
        return f"{label:<28} WRONG: error {row['error']:.2g} > {row['tolerance']:g} against {row['against']}"
    spread = f"p10 {seconds(row['p10_s'])}, p90 {seconds(row['p90_s'])}, {row['samples']} samples"
    return f"{label:<28} {seconds(row['median_s']):>9}  ({spread}; error {row['error']:.1g})"


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def append_rows(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; raises ValueError naming the line that is not one."""
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error}); each line is one row") from error
        if not isinstance(row, dict) or not {"case", "params", "provider", "backend", "status"} <= row.keys():
            raise ValueError(f"{path}, line {number}: not a row of this bench; it writes one JSON object per line")
        rows.append(row)
    return rows


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
