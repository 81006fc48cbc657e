"""Rows to tables and plots: `python -m bench.report` reads bench/results/*.jsonl and writes Markdown and PNGs.

The machine that was measured last is shown in full, with plots; others by their headline. `bench/tables.py` says which
rows are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import machine, roofline
from bench.plots import draw_plots
from bench.rows import Row, label, read_rows, seconds
from bench.tables import (
    NOISY,
    Comparison,
    case_table,
    comparisons,
    gains_of,
    headline_of,
    ratio,
)

RESULTS = Path(__file__).parent / "results"
LEGEND = """Made by `python -m bench.report` from the rows beside it; [how they are measured](../README.md).

- **times faster**: the best other provider that makes the same promise, over the best of ours; providers that promise
  less (≈) are compared apart
- **algorithmic**: the authors' algorithm over ours in plain PyTorch (backend "torch"); **kernel**: that over the best
  of ours
- **of ceiling**: the time that the machine needs at least, by what it was measured to read and multiply in the same
  run, over the time taken"""
FOOTNOTE = (
    f"{NOISY} measured while others kept more than {machine.QUIET:g} cores of the machine busy: not to be quoted. "
    "GFLOP/s counts matrix products only, each provider's own."
)


def markdown(rows: Sequence[Row], plots: dict[str, str]) -> str:
    """The whole report; `plots`: what is shown -> file name."""
    newest, *older = comparisons(rows).items()
    parts = ["# Results", LEGEND, *_in_full(*newest, plots)]
    for where, group in older:
        parts += [f"## Earlier: {where}", _when(group), headline_of(group)]
    return "\n\n".join([*parts, FOOTNOTE]) + "\n"


def _in_full(where: str, group: Sequence[Comparison], plots: dict[str, str]) -> list[str]:
    parts = [f"## {where}", _when(group), headline_of(group), *_plot(plots, "ratios"), *_plot(plots, "roofline")]
    gains = gains_of(group)
    if gains:
        parts += ["### What the algorithm gains and what kernels gain", gains, *_plot(plots, "gains")]
    for subject in dict.fromkeys(one.first["case"] for one in group):
        members = [one for one in group if one.first["case"] == subject]
        settings = "; ".join(dict.fromkeys(one.first["setting"] for one in members))
        parts += [f"### {subject}", f"{settings}. Checked against: {_checks(members)}.", *_plot(plots, subject)]
        for one in members:
            parts += [f"**{one.name}**", case_table(one), *_notes(one)]
    return parts


def _when(group: Sequence[Comparison]) -> str:
    """Commits, days, versions and ceilings of the rows that are shown."""
    commits = ", ".join(dict.fromkeys(one.first["commit"] for one in group))
    days = sorted({one.first["date"][:10] for one in group})
    last = max((one.first for one in group), key=lambda row: row["date"])
    packages = last["machine"].get("packages", {})
    versions = {"torch": last["machine"]["torch"], "Python": last["machine"]["python"]} | packages
    return (
        f"Commit {commits}, {days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}. "
        f"Ceilings of the last run: {roofline.describe(last['ceilings'])}."
    )


def _notes(one: Comparison) -> list[str]:
    """What lists cost, and what others report."""
    notes = [
        f"{label(row)}: {ratio(row, without)} the time of the same call without lists." for row, without in one.beside()
    ]
    cited = one.first.get("citation")
    if cited:
        ours = [row for provider in one.our_providers if (row := one.ours(provider)) is not None]
        times = "".join(
            f", {cited['seconds'] / row['median_s']:,.0f} times as long as {label(row)} here" for row in ours
        )
        notes.append(f"Reported by others, not measured here: {seconds(cited['seconds'])}{times} ({cited['source']}).")
    return notes


def _plot(plots: dict[str, str], what: str) -> list[str]:
    return [f"![{what}]({plots[what]})"] if what in plots else []


def _checks(members: Sequence[Comparison]) -> str:
    return "; ".join(dict.fromkeys(row["against"] for one in members for row in one.rows))


def write(path: Path, folder: Path) -> str:
    """The tables and plots of one file of rows, into `folder`; what was written. Raises ValueError for no rows."""
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{path.stem}.md"
    plots = draw_plots(rows, folder, path.stem)
    target.write_text(markdown(rows, plots), encoding="utf-8")
    return f"{target}: {len(rows)} rows, {len(plots)} plots"


def main(arguments: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    command.add_argument("--rows", type=Path, nargs="+", help="files of rows (default: every bench/results/*.jsonl)")
    command.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables and plots")
    command.add_argument("--readme", type=Path, help="also fill the marked tables of this file (see bench/readme.py)")
    given = command.parse_args(arguments)
    paths = given.rows or sorted(RESULTS.glob("*.jsonl"))
    if not paths:
        command.error("bench/results holds no rows yet; run `python -m bench` first, or name a file with --rows")
    for path in paths:
        try:
            print(write(path, given.output))
        except (OSError, ValueError) as error:
            command.error(str(error))
    if given.readme is not None:
        from bench.readme import fill

        try:
            fill(given.readme, [row for path in paths for row in read_rows(path)])
        except (OSError, ValueError) as error:
            command.error(str(error))
        print(f"{given.readme}: tables filled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
