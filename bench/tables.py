"""Which rows are compared, and the tables of them.

What is compared stands in one run: per machine and case, the latest run that holds both fastdiff and another provider.
All rows stay in the file, those that lose too. Rows of different machines never meet in a table.

    times faster  the best other provider that makes the same promise / the best of ours
    algorithmic   the authors' algorithm / ours in plain PyTorch (backend "torch")
    kernel        ours in plain PyTorch / the best of ours
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import machine
from bench.cases import COMPILED, GRAPHED
from bench.roofline import Achieved, achieved
from bench.rows import Row, digits, label, per_cent, seconds, size

OURS = "fastdiff"
NOISY = "†"
APPROXIMATE = "≈"
NONE = "-"


# --- choosing rows ----------------------------------------------------------------------------------------------------


def is_ours(row: Row) -> bool:
    """fastdiff as it is: neither under torch.compile, which is a rival, nor aside."""
    provider = str(row["provider"])
    return provider.startswith(OURS) and not provider.endswith((COMPILED, GRAPHED)) and not row.get("aside")


def is_other(row: Row) -> bool:
    return not row.get("aside") and not is_ours(row)


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

    @property
    def of_memory(self) -> bool:
        """Whether memory is what was measured, so that times are beside the point."""
        return any(row.get("peak_bytes") is not None for row in self.rows)

    @property
    def name(self) -> str:
        return case_name(self.first) + (f" {NOISY}" if self.noisy else "")

    def fastest(self, rows: Iterable[Row]) -> Row | None:
        timed = [row for row in rows if row["status"] == "ok"]
        return min(timed, key=lambda row: row["median_s"]) if timed else None

    @property
    def best_other(self) -> Row | None:
        return self.fastest(row for row in self.rows if is_other(row) and not row.get("approximate"))

    @property
    def best_approximate(self) -> Row | None:
        return self.fastest(row for row in self.rows if is_other(row) and row.get("approximate"))

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

    def beside(self) -> list[tuple[Row, Row]]:
        """(a row of ours, the row that stands aside for it: the same call without the lists of the case)."""
        from bench.topk import NO_LISTS

        timed = {(row["provider"], row["backend"]): row for row in self.rows if row["status"] == "ok"}
        pairs = [(row, timed.get((provider + NO_LISTS, backend))) for (provider, backend), row in timed.items()]
        return [(row, without) for row, without in pairs if without is not None]


def comparisons(rows: Sequence[Row]) -> dict[str, list[Comparison]]:
    """Machine -> comparisons in the order in which cases first appear; the machine measured last comes first."""
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    newest: dict[str, str] = {}
    for row in rows:
        where = machine.identity(row["machine"])
        newest[where] = max(newest.get(where, ""), row["date"])
        groups.setdefault((where, row["case"], str(row["params"])), {}).setdefault(row["run"], []).append(row)
    result: dict[str, list[Comparison]] = {where: [] for where in sorted(newest, key=newest.__getitem__, reverse=True)}
    for (where, _, _), runs in groups.items():
        latest = sorted(runs, reverse=True)
        whole = [run for run in latest if _is_whole(runs[run])]
        last = {(row["provider"], row["backend"]): row for row in runs[(whole or latest)[0]]}
        result[where].append(Comparison(tuple(last.values())))
    return result


def _is_whole(rows: Sequence[Row]) -> bool:
    """Whether a run holds both sides of a case; where others are only cited, ours is the whole of it."""
    cited = any(row.get("citation") for row in rows)
    return any(map(is_ours, rows)) and (cited or any(map(is_other, rows)))


# --- tables -----------------------------------------------------------------------------------------------------------


def headline_table(rows: Sequence[Row]) -> str:
    """One line per case and provider of ours, against the best of the others."""
    return headline_of([one for group in comparisons(rows).values() for one in group])


def headline_of(members: Sequence[Comparison]) -> str:
    head = ["case", "ours", "", "of ceiling", "best other", "", "times faster", "approximate other", "faster than it"]
    lines = [_headline(one, provider) for one in members if not one.of_memory for provider in one.our_providers]
    return table(head, lines)


def _headline(one: Comparison, provider: str) -> list[str]:
    ours, other, approximate = one.ours(provider), one.best_other, one.best_approximate
    if ours is None:
        return [one.name, provider, "WRONG", *[NONE] * 6]
    return [
        one.name,
        label(ours) + (f" {APPROXIMATE}" if ours.get("approximate") else ""),
        seconds(ours["median_s"]),
        share(achieved(ours)),
        NONE if other is None else label(other),
        NONE if other is None else seconds(other["median_s"]),
        ratio(other, ours),
        NONE if approximate is None else label(approximate),
        ratio(approximate, ours),
    ]


def gains_of(members: Sequence[Comparison]) -> str:
    """What the algorithm gains and what kernels gain, apart; "" where no case has both sides."""
    lines = []
    for one in members:
        for provider in one.our_providers:
            published, in_torch, ours = one.published, one.ours_in_torch(provider), one.ours(provider)
            if published is None or in_torch is None or ours is None:
                continue
            compiled = one.fastest(row for row in one.rows if row["provider"] == provider + COMPILED)
            times = [one.name, *(f"{label(row)} {seconds(row['median_s'])}" for row in (published, in_torch, ours))]
            lines.append([*times, ratio(published, in_torch), ratio(in_torch, ours), ratio(compiled, ours)])
    head = ["case", "published", "plain PyTorch", "best of ours", "algorithmic", "kernel", "over torch.compile"]
    return table(head, lines) if lines else ""


def case_table(one: Comparison) -> str:
    """Every provider of one case; columns that hold nothing are left out."""
    head = ["provider", "median", "p10 .. p90", "per user", "more memory", "GFLOP/s", "GB/s", "of ceiling"]
    head += ["samples", "error", "once"]
    batch = one.first["params"].get("batch", 1)
    return table(head, [_provider(row, batch) for row in one.rows], drop_empty=True)


def _provider(row: Row, batch: int) -> list[str]:
    name = label(row) + (f" {APPROXIMATE}" if row.get("approximate") else "")
    error = f"{row['error']:.1g}"
    if row["status"] != "ok":
        return [name, "WRONG", *[NONE] * 7, f"{error} > {row['tolerance']:g}", NONE]
    rates = achieved(row)
    return [
        name,
        seconds(row["median_s"]),
        f"{seconds(row['p10_s'])} .. {seconds(row['p90_s'])}" if row["samples"] > 1 else NONE,
        seconds(row["median_s"] / batch),
        NONE if row.get("peak_bytes") is None else size(row["peak_bytes"]),
        NONE if rates.gflops is None else digits(rates.gflops),
        NONE if rates.gbps is None else digits(rates.gbps),
        share(rates, bound=True),
        str(row["samples"]),
        error,
        NONE if row.get("setup_s") is None else seconds(row["setup_s"]),
    ]


def share(rates: Achieved, bound: bool = False) -> str:
    if rates.share is None:
        return NONE
    return per_cent(rates.share) + (f" {rates.bound}" if bound else "")


def case_name(row: Row) -> str:
    return f"{row['case']} " + params_text(row["params"])


def params_text(params: dict[str, Any]) -> str:
    """For example "items 12,101, k 20"."""
    return ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in params.items()
    )


def ratio(slow: Row | None, fast: Row | None) -> str:
    if slow is None or fast is None:
        return NONE
    return f"{digits(slow['median_s'] / fast['median_s'])}x"


def table(head: Sequence[str], lines: Sequence[Sequence[str]], drop_empty: bool = False) -> str:
    """Markdown, its columns aligned in the source as well."""
    if drop_empty and lines:
        kept = [i for i in range(len(head)) if any(line[i] != NONE for line in lines)]
        head, lines = [head[i] for i in kept], [[line[i] for i in kept] for line in lines]
    widths = [max(3, *(len(line[i]) for line in [head, *lines])) for i in range(len(head))]
    text = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [head, *lines]]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in [text[0], rule, *text[1:]])
