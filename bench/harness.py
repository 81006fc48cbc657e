"""From a case to rows: build it, check every provider, time those that passed, and write down what a row needs."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from bench import machine, roofline
from bench.cases import Absent, Case, Gate, Measured, Options, Provider
from bench.rows import Row, line
from bench.timing import Budget, Timing, clock_for, estimate_seconds, interleaved

SLOW = 2.0
"""A call that took longer than this to be checked is not run again only to warm up."""


@dataclass(frozen=True)
class Checked:
    """A provider after its check: the gate's verdict, a first estimate of its time, and the FLOPs of a call.

    timing  its figures already, where it is run once only
    """

    provider: Provider
    gate: Gate
    estimate: float
    flops: float | None
    timing: Timing | None = None
    peak_bytes: float | None = None


@dataclass
class Session:
    """What is the same for all rows of one run."""

    options: Options
    budget: Budget
    facts: dict[str, Any]
    ceilings: dict[str, Any]
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
        ceilings = roofline.ceilings(options.device)
        say(f"ceilings: {roofline.describe(ceilings)}")
        return cls(options, budget, facts, ceilings, say)


def measure(case: Case, session: Session) -> list[Row]:
    """Check and time the providers of one case."""
    session.say(f"\n{case.id}  ({case.setting})")
    others, load = machine.Others(), machine.load_average()
    with torch.inference_mode():
        checked = _check_all(case, session)
        passed = {one.provider.label: one for one in checked if one.gate.passed and one.timing is None}
        if passed:
            others, load = machine.Others(), machine.load_average()
        timings = interleaved(
            {label: one.provider.run for label, one in passed.items()},
            {label: one.estimate for label, one in passed.items()},
            session.budget,
            clock_for(session.options.device),
        )
        busy = others.cores()
    loads = (load, machine.load_average())
    rows = [_row(case, one, timings.get(one.provider.label, one.timing), busy, loads, session) for one in checked]
    for row in rows:
        session.say("  " + line(row))
    if busy is not None and busy > machine.QUIET:
        session.say(f"  ! others kept {busy:.2f} cores busy meanwhile")
    return rows


def check(provider: Provider, options: Options) -> Checked:
    """Run a provider once and hold its output against the truth, before anything is timed."""
    call = provider.gated or provider.run
    # torch.compile traces nothing while a mode is on, and would run in eager for good
    counter = None if provider.is_compiled or provider.once else FlopCounterMode(display=False)
    start = time.perf_counter()
    try:
        with counter or nullcontext():
            output = call()
    except Exception as error:  # one that cannot do the work is a result; the others are measured all the same
        gate = Gate(float("inf"), 0.0, f"a result; it raised {type(error).__name__}: {error}")
        return Checked(provider, gate, 0.0, None)
    taken = Measured(output, time.perf_counter() - start)
    if isinstance(output, Measured):
        taken = output
    gate = provider.check(taken.output)
    counted = None if counter is None else float(counter.get_total_flops()) or None
    flops = provider.flops if provider.flops is not None else counted
    if not gate.passed:
        return Checked(provider, gate, taken.seconds, flops)
    if provider.once:
        seconds = taken.seconds if provider.gated is None else clock_for(options.device).sample(provider.run, 1)
        return Checked(provider, gate, seconds, flops, Timing((seconds,), 1), taken.peak_bytes)
    if taken.seconds < SLOW or provider.is_compiled or provider.gated is not None:
        return Checked(provider, gate, estimate_seconds(provider.run, clock_for(options.device)), flops)
    return Checked(provider, gate, taken.seconds, flops)


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
        "approximate": provider.approximate,
        "aside": provider.aside,
        "status": "ok" if gate.passed else "WRONG",
        "error": gate.error,
        "tolerance": gate.tolerance,
        "against": gate.against,
    }
    if timing is not None:
        row |= {"median_s": timing.median, "p10_s": timing.p10, "p90_s": timing.p90}
        row |= {"samples": len(timing.samples), "calls_per_sample": timing.calls_per_sample}
        row |= {"flops": one.flops, "bytes": provider.bytes, "arithmetic": provider.arithmetic}
        row |= {"setup_s": provider.setup, "peak_bytes": one.peak_bytes}
    return row | {
        "citation": None if case.citation is None else asdict(case.citation),
        "machine": session.facts,
        "ceilings": session.ceilings,
        "others": busy,
        "load": loads,
        "date": _now(),
        "run": session.started,
        "commit": machine.commit(),
        "version": fastdiff.__version__,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
