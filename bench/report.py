"""Rows to tables and plots: `python -m bench.report` reads bench/results/*.jsonl and writes Markdown and PNGs.

What is compared stands in one run: per machine and case, the latest run that holds both fastdiff and another provider.
All rows stay in the file, those that lose too.

    headline       best other provider / best of ours
    vs published   the authors' algorithm / best of ours, and its two factors:
    algorithmic    the authors' algorithm / ours in plain PyTorch (backend "torch")
    kernel         ours in plain PyTorch / best of ours
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.harness import Row, read_rows, seconds

RESULTS = Path(__file__).parent / "results"
OURS = "fastdiff"
NOISY = "†"
LEGEND = """Made by `python -m bench.report` from the rows beside it; [how they are measured](../README.md).

- **headline**: the best other provider over the best of ours
- **vs published**: the authors' algorithm over the best of ours; it is the product of
- **algorithmic**: the authors' algorithm over ours in plain PyTorch (backend "torch"), and
- **kernel**: ours in plain PyTorch over the best of ours"""
FOOTNOTE = (
    f"{NOISY} measured while others kept more than {machine.QUIET:g} cores of the machine busy: not to be quoted. "
    "GFLOP/s counts matrix products only, each provider's own; per cent of the ceiling measured in the same run."
)


# --- choosing rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The rows of one case on one machine, all of one run."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def noisy(self) -> bool:
        return any((row.get("others") or 0.0) > machine.QUIET for row in self.rows)

    def fastest(self, rows: Iterable[Row]) -> Row | None:
        timed = [row for row in rows if row["status"] == "ok"]
        return min(timed, key=lambda row: row["median_s"]) if timed else None

    @property
    def best_other(self) -> Row | None:
        return self.fastest(row for row in self.rows if not is_ours(row))

    @property
    def published(self) -> Row | None:
        return self.fastest(row for row in self.rows if row["provider"] == "published")

    @property
    def our_providers(self) -> list[str]:
        return list(dict.fromkeys(row["provider"] for row in self.rows if is_ours(row)))

    def ours(self, provider: str) -> Row | None:
        return self.fastest(row for row in self.rows if row["provider"] == provider)

    def ours_in_torch(self, provider: str) -> Row | None:
        return self.fastest(row for row in self.rows if row["provider"] == provider and row["backend"] == "torch")


def is_ours(row: Row) -> bool:
    return str(row["provider"]).startswith(OURS)


def comparisons(rows: Sequence[Row]) -> dict[str, list[Comparison]]:
    """Machine line -> comparisons, in the order in which cases first appear."""
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        key = (machine.describe(row["machine"]), row["case"], str(row["params"]))
        groups.setdefault(key, {}).setdefault(row["run"], []).append(row)
    result: dict[str, list[Comparison]] = {}
    for (where, _, _), runs in groups.items():
        latest = sorted(runs, reverse=True)
        both = [run for run in latest if {True, False} == {is_ours(row) for row in runs[run]}]
        newest = {(row["provider"], row["backend"]): row for row in runs[(both or latest)[0]]}
        result.setdefault(where, []).append(Comparison(tuple(newest.values())))
    return result


# --- tables -----------------------------------------------------------------------------------------------------------


def headline_table(rows: Sequence[Row]) -> str:
    """One line per case and per way of ours."""
    head = ["case", "ours", "median", "best other", "median", "headline", "vs published", "algorithmic", "kernel"]
    lines = []
    for group in comparisons(rows).values():
        for one in group:
            for provider in one.our_providers:
                lines.append(_headline(one, provider))
    return table(head, lines)


def _headline(one: Comparison, provider: str) -> list[str]:
    ours, in_torch, other = one.ours(provider), one.ours_in_torch(provider), one.best_other
    name = case_name(one.first) + (f" {NOISY}" if one.noisy else "")
    if ours is None:
        return [name, provider, "WRONG", *["-"] * 6]
    return [
        name,
        label(ours),
        seconds(ours["median_s"]),
        "-" if other is None else label(other),
        "-" if other is None else seconds(other["median_s"]),
        ratio(other, ours),
        ratio(one.published, ours),
        ratio(one.published, in_torch),
        ratio(in_torch, ours),
    ]


def case_table(one: Comparison) -> str:
    """Every provider of one case."""
    head = ["provider", "median", "p10 .. p90", "per user", "rate", "of ceiling", "samples", "error", "once"]
    batch = one.first["params"].get("batch", 1)
    return table(head, [_provider(row, batch) for row in one.rows])


def _provider(row: Row, batch: int) -> list[str]:
    error = f"{row['error']:.1g}"
    if row["status"] != "ok":
        return [label(row), "WRONG", *["-"] * 5, f"{error} > {row['tolerance']:g}", "-"]
    rate, share = _rate(row)
    return [
        label(row),
        seconds(row["median_s"]),
        f"{seconds(row['p10_s'])} .. {seconds(row['p90_s'])}",
        seconds(row["median_s"] / batch),
        rate,
        share,
        str(row["samples"]),
        error,
        "-" if row.get("setup_s") is None else seconds(row["setup_s"]),
    ]


def _rate(row: Row) -> tuple[str, str]:
    """The achieved rate against the roof that is nearer: GB/s where bytes are known and bind, else GFLOP/s."""
    shares = []
    for amount, ceiling, unit in (("flops", "gflops", "GFLOP/s"), ("bytes", "gbps", "GB/s")):
        if row.get(amount):
            achieved = row[amount] / row["median_s"] / 1e9
            shares.append((achieved / row["ceilings"][ceiling], f"{achieved:.3g} {unit}"))
    if not shares:
        return "-", "-"
    share, rate = max(shares)
    return rate, f"{100 * share:.2g} %"


def markdown(rows: Sequence[Row], plots: dict[str, str]) -> str:
    """The whole report; `plots`: case name -> file name."""
    parts = ["# Results", LEGEND]
    for where, group in comparisons(rows).items():
        commits = ", ".join(sorted({one.first["commit"] for one in group}))
        dates = sorted({one.first["date"][:10] for one in group})
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        parts += [f"## {where}", f"Commit {commits}, {days}."]
        measured = {id(row) for one in group for row in one.rows}
        parts.append(headline_table([row for row in rows if id(row) in measured]))
        for subject in dict.fromkeys(one.first["case"] for one in group):
            members = [one for one in group if one.first["case"] == subject]
            parts += [f"### {subject}", f"{members[0].first['setting']}. Checked against: {_checks(members)}."]
            if subject in plots:
                parts.append(f"![{subject}]({plots[subject]})")
            for one in members:
                parts += [f"**{case_name(one.first)}**" + (f" {NOISY}" if one.noisy else ""), case_table(one)]
    parts.append(FOOTNOTE)
    return "\n\n".join(parts) + "\n"


def _checks(members: Sequence[Comparison]) -> str:
    return "; ".join(dict.fromkeys(row["against"] for one in members for row in one.rows))


def label(row: Row) -> str:
    return str(row["provider"]) if row["backend"] == "eager" else f"{row['provider']}[{row['backend']}]"


def case_name(row: Row) -> str:
    return f"{row['case']} " + params_text(row["params"])


def params_text(params: dict[str, Any]) -> str:
    """For example "items 12,101, k 20"."""
    return ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in params.items()
    )


def ratio(slow: Row | None, fast: Row | None) -> str:
    if slow is None or fast is None:
        return "-"
    value = slow["median_s"] / fast["median_s"]
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned in the source as well."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [head, *lines]]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in [text[0], rule, *text[1:]])


# --- plots ------------------------------------------------------------------------------------------------------------

COLOURS = {
    "published": "#7f7f7f",
    "published-compiled": "#c49c94",
    "torch-topk": "#7f7f7f",
    "torch-topk-compiled": "#c49c94",
    "faiss": "#bcbd22",
    "faiss-tuned": "#8c564b",
    "fastdiff": "#d62728",
    "fastdiff-bf16-scan": "#ff7f0e",
    "fastdiff-closed-form": "#1f77b4",
}
MARKERS = {"eager": "o", "torch": "s", "cpu": "D", "triton": "^", "cuda": "v"}


def draw_plots(rows: Sequence[Row], folder: Path, stem: str) -> dict[str, str]:
    """One PNG per subject, of the machine measured last; {} where matplotlib is missing. Case name -> file name."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: tables without plots; `pip install matplotlib` adds them")
        return {}
    groups = comparisons(rows)
    if not groups:
        return {}
    where = machine.describe(max(rows, key=lambda row: row["date"])["machine"])
    files = {}
    for subject in dict.fromkeys(one.first["case"] for one in groups[where]):
        members = [one for one in groups[where] if one.first["case"] == subject]
        figure = _plot(pyplot, members, where)
        files[subject] = f"{stem}-{subject}.png"
        figure.savefig(folder / files[subject], dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return files


def _plot(pyplot: Any, members: Sequence[Comparison], where: str) -> Any:
    """Seconds per call over the batch size, one panel per remaining parameter."""
    panels: dict[str, list[Comparison]] = {}
    for one in members:
        rest = params_text({key: value for key, value in one.first["params"].items() if key != "batch"})
        panels.setdefault(rest, []).append(one)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.2 + 3.2 * len(panels), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, (rest, group) in zip(axes[0], panels.items(), strict=True):
        batches = sorted({one.first["params"]["batch"] for one in group})
        series: dict[str, list[Row]] = {}
        for one in group:
            for row in one.rows:
                if row["status"] == "ok":
                    series.setdefault(label(row), []).append(row)
        for number, (name, points) in enumerate(series.items()):
            aside = 0.04 * (number - (len(series) - 1) / 2)  # so that bars of spread do not hide each other
            places = [batches.index(row["params"]["batch"]) + aside for row in points]
            medians = [row["median_s"] for row in points]
            spread = [
                [row["median_s"] - row["p10_s"] for row in points],
                [row["p90_s"] - row["median_s"] for row in points],
            ]
            handles[name] = axis.errorbar(
                places,
                medians,
                yerr=spread,
                color=COLOURS[points[0]["provider"]],
                marker=MARKERS.get(points[0]["backend"], "P"),
                markersize=5,
                capsize=3,
                linewidth=1.4,
            )
        axis.set_yscale("log")
        axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axis.set_xlim(-0.3, len(batches) - 0.7)
        axis.set_xlabel("users in the batch")
        axis.set_title(rest, fontsize=9)
        axis.grid(True, which="major", alpha=0.3)
        axis.yaxis.set_major_formatter(lambda value, _: seconds(value))
    axes[0][0].set_ylabel("time per call (median, p10 to p90)")
    subject = members[0].first
    figure.suptitle(f"{subject['case']}: {subject['setting']}", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    noise = f"  {NOISY} others were using the machine" if any(one.noisy for one in members) else ""
    figure.supxlabel(f"{where}{noise}", fontsize=7, color="#555555")
    return figure


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    command.add_argument("--rows", type=Path, nargs="+", help="files of rows (default: every bench/results/*.jsonl)")
    command.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables and plots")
    command.add_argument("--readme", type=Path, help="also fill the marked tables of this file (see bench/readme.py)")
    given = command.parse_args(arguments)
    paths = given.rows or sorted(RESULTS.glob("*.jsonl"))
    if not paths:
        command.error("bench/results holds no rows yet; run `python -m bench` first, or name a file with --rows")
    given.output.mkdir(parents=True, exist_ok=True)
    for path in paths:
        try:
            rows = read_rows(path)
        except (OSError, ValueError) as error:
            command.error(str(error))
        if not rows:
            command.error(f"{path}: holds no rows")
        target = given.output / f"{path.stem}.md"
        plots = draw_plots(rows, given.output, path.stem)
        target.write_text(markdown(rows, plots), encoding="utf-8")
        print(f"{target}: {len(rows)} rows, {len(plots)} plots")
    if given.readme is not None:
        from bench.readme import fill  # it stands on this module

        try:
            fill(given.readme, [row for path in paths for row in read_rows(path)])
        except (OSError, ValueError) as error:
            command.error(str(error))
        print(f"{given.readme}: tables filled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
