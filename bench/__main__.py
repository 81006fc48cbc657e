"""`python -m bench`: check, then time, every case; append rows; write the report. `make bench` runs this."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import report
from bench.cases import PROVIDERS, Case, Options, all_cases
from bench.harness import Session, measure
from bench.machine import QUIET
from bench.rows import Row, append_rows
from bench.tables import headline_table
from bench.timing import Budget

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--case", nargs="+", metavar="NAME", help="cases by name or by full id (--list shows them)")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="only these batch sizes")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help="only these providers")
    parser.add_argument("--list", action="store_true", help="show cases and providers, measure nothing")
    parser.add_argument("--full", action="store_true", help="heavy cases and providers as well")
    parser.add_argument("--compile", action="store_true", help="torch.compile baselines as well (minutes)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent per provider (default 1)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu); some cases are of one of them")
    parser.add_argument("--interpreted", action="store_true", help="measure even where TRITON_INTERPRET=1 is set")
    parser.add_argument(
        "--output",
        type=Path,
        help="rows are appended here, and no report is written (default bench/results/<device>.jsonl)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser()
    given = command.parse_args(arguments)
    try:
        device = device_of(given.device, given.list)
        cases = select(all_cases(device), given.case, given.batch, given.full)
        providers = _known(given.provider, PROVIDERS, "provider")
        cases = [case for case in cases if not providers or set(providers) & {*case.others, *case.ours}]
        if not cases:
            raise ValueError(f"--provider: none of these cases has {' or '.join(providers)}; --list shows who has what")
        refuse_interpreted(given.interpreted or given.list)
    except ValueError as error:
        command.error(str(error))
    if given.seconds <= 0:
        command.error(f"--seconds must be more than 0 (got {given.seconds:g})")
    if given.list:
        _list(cases if given.case or given.batch else all_cases(device))
        return 0
    if given.threads is not None:
        torch.set_num_threads(given.threads)

    only = frozenset(providers) if providers else None
    session = Session.open(Options(device, given.compile, given.full, only), Budget(seconds=given.seconds))
    path = given.output or RESULTS / f"{device.type}.jsonl"
    rows: list[Row] = []
    for case in cases:
        measured = measure(case, session)
        append_rows(measured, path)
        rows += measured
    print(f"\n{headline_table(rows)}")
    print(f"\n{len(rows)} rows appended to {path}")
    if given.output is None:
        print(report.write(path, RESULTS))
    noisy = sum((row["others"] or 0.0) > QUIET for row in rows)
    if noisy:
        print(f"!!! {noisy} of them were measured while others used the machine: not to be quoted")
    wrong = [row for row in rows if row["status"] != "ok"]
    if wrong:
        print(f"{len(wrong)} of them WRONG: {', '.join(sorted({row['provider'] for row in wrong}))}")
    return 1 if wrong else 0


def select(
    cases: Sequence[Case], names: Sequence[str] | None, batches: Sequence[int] | None, full: bool = False
) -> list[Case]:
    """The cases that were asked for; a case named by its full id is taken even if it is heavy."""
    ids = {case.id for case in cases}
    _known([name for name in names or () if name not in ids], {case.name for case in cases}, "case")
    known_batches = {case.params["batch"] for case in cases}
    for batch in batches or ():
        if batch not in known_batches:
            raise ValueError(f"--batch: no case has batch {batch}; known: {', '.join(map(str, sorted(known_batches)))}")
    chosen = [
        case
        for case in cases
        if (names is None or case.name in names or case.id in names)
        and (batches is None or case.params["batch"] in batches)
        and (full or not case.heavy or (names is not None and case.id in names))
    ]
    if not chosen:
        raise ValueError("no case is left; heavy cases need --full, and --case and --batch must both match")
    return chosen


def _known(given: Sequence[str] | None, known: Sequence[str] | set[str] | dict[str, str], what: str) -> list[str]:
    for name in given or ():
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"--{what}: unknown name {name!r}; known: {', '.join(sorted(known))} (see --list){hint}")
    return list(given or ())


def refuse_interpreted(asked: bool) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and not asked:
        raise ValueError(
            "TRITON_INTERPRET=1: Triton kernels are interpreted here, which says nothing of their time; unset it, or "
            "add --interpreted"
        )


def device_of(name: str, only_to_list: bool = False) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu or cuda (got {name!r})")
    if name == "cuda" and not torch.cuda.is_available() and not only_to_list:
        raise ValueError("--device: torch sees no CUDA device here; use cpu")
    return torch.device(name)


def _list(cases: Sequence[Case]) -> None:
    for name in dict.fromkeys(case.name for case in cases):
        members = [case for case in cases if case.name == name]
        print(f"{name}: {'; '.join(dict.fromkeys(case.setting for case in members))}")
        providers = dict.fromkeys(name for case in members for name in (*case.others, *case.ours))
        print(f"  providers: {', '.join(providers)}")
        for case in members:
            print(f"  {case.id}{'  (only with --full)' if case.heavy else ''}")
    print("providers:")
    for name, what in PROVIDERS.items():
        print(f"  {name:<24} {what}")


if __name__ == "__main__":
    sys.exit(main())
