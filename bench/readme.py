"""The measured table of the README, written between its marks: figures there are generated, never typed.

<!-- bench:headline --> a few cases, with their conditions <!-- /bench:headline -->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench import machine
from bench.harness import Row, seconds
from bench.report import FOOTNOTE, NOISY, Comparison, case_name, comparisons, label, ratio, table

HEADLINE = (
    ("adrec", {"lengths": "full", "batch": 1}),
    ("adrec", {"lengths": "full", "batch": 32}),
    ("cddrec", {"batch": 128}),
    ("dreamrec", {"batch": 32}),
    ("tarec", {"batch": 256}),
    ("score_topk", {"items": 1_000_000, "k": 100, "batch": 32}),
)


def fill(path: Path, rows: Sequence[Row]) -> None:
    """Rewrite what stands between the marks of `path`; raises ValueError where they are missing."""
    where = machine.describe(max(rows, key=lambda row: row["date"])["machine"])
    content = _headline(comparisons(rows)[where], where)
    marks = r"(<!-- bench:headline -->\n).*?(<!-- /bench:headline -->)"
    text, found = re.subn(
        marks, lambda match: f"{match[1]}{content}\n{match[2]}", path.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"{path}: holds {found} pairs of marks <!-- bench:headline -->; one is needed")
    path.write_text(text, encoding="utf-8")


def _headline(group: Sequence[Comparison], where: str) -> str:
    lines, settings = [], {}
    for name, params in HEADLINE:
        for one in group:
            if (one.first["case"], one.first["params"]) == (name, params):
                settings[name] = f"{name}: {one.first['setting']}"
                lines += [_line(one, provider) for provider in one.our_providers]
    text = table(["case", "fastdiff", "time", "best other", "time", "times faster"], lines)
    caption = [f"{where}; medians, per call. {'; '.join(settings.values())}."]
    if any("closed-form" in cell for line in lines for cell in line):
        caption.append("The closed form is equal in law, not draw for draw.")
    if any(NOISY in line[0] for line in lines):
        caption.append(FOOTNOTE)
    return "\n\n".join([text, " ".join(caption)])


def _line(one: Comparison, provider: str) -> list[str]:
    ours, other = one.ours(provider), one.best_other
    name = case_name(one.first) + (f" {NOISY}" if one.noisy else "")
    if ours is None or other is None:
        return [name, provider, "-", "-", "-", "-"]
    return [
        name,
        label(ours),
        seconds(ours["median_s"]),
        label(other),
        seconds(other["median_s"]),
        ratio(other, ours).removesuffix("x"),
    ]
