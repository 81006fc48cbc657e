"""The measured table of the README, written between its marks: figures there are generated, never typed.

<!-- bench:headline --> a few cases on the machine measured last, with their conditions <!-- /bench:headline -->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.report import FOOTNOTE
from bench.rows import Row, label, seconds
from bench.tables import NOISY, Comparison, case_name, comparisons, ratio, table

_MILLION = {"items": 1_000_000, "dim": 64, "k": 100}
HEADLINE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("score_topk", {**_MILLION, "batch": 1}),
    ("score_topk", {**_MILLION, "batch": 32}),
    ("score_topk", {**_MILLION, "batch": 256}),
    ("topk_lists", {"lists": "denied", **_MILLION, "batch": 32}),
    ("adrec", {"lengths": "full", "batch": 1}),
    ("adrec", {"lengths": "full", "batch": 32}),
    ("adrec", {"lengths": "beauty", "batch": 32}),
    ("dreamrec", {"denoiser": "mlp1", "batch": 1}),
    ("dreamrec", {"denoiser": "mlp1", "batch": 256}),
    ("yoochoose", {"data": "YooChoose", "batch": 55_245}),
    ("tarec", {"batch": 1}),
    ("cddrec", {"batch": 128}),
    ("dimerec", {"batch": 32}),
)


def fill(path: Path, rows: Sequence[Row]) -> None:
    """Rewrite what stands between the marks of `path`; raises ValueError where they are missing."""
    group = next(iter(comparisons(rows).values()))
    content = _headline(group, machine.describe(max(rows, key=lambda row: row["date"])["machine"]))
    marks = r"(<!-- bench:headline -->\n).*?(<!-- /bench:headline -->)"
    text, found = re.subn(
        marks, lambda match: f"{match[1]}{content}\n{match[2]}", path.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"{path}: holds {found} pairs of marks <!-- bench:headline -->; one is needed")
    path.write_text(text, encoding="utf-8")


def _headline(group: Sequence[Comparison], where: str) -> str:
    lines, settings, cited = [], {}, {}
    for name, params in HEADLINE:
        for one in group:
            if (one.first["case"], one.first["params"]) == (name, params):
                settings[name] = f"{name}: {one.first['setting']}"
                lines += [_line(one, provider) for provider in one.our_providers]
                if one.first.get("citation") and one.best_other is None:
                    cited[name] = one.first["citation"]["source"]
    text = table(["case", "fastdiff", "", "best other", "", "times faster"], lines)
    caption = [f"{where}; medians, per call. {'; '.join(settings.values())}."]
    if any("closed-form" in cell for line in lines for cell in line):
        caption.append("The closed form is equal in law, not draw for draw.")
    caption += [f"Cited, not measured here: {source}." for source in cited.values()]
    if any(NOISY in line[0] for line in lines):
        caption.append(FOOTNOTE)
    return "\n\n".join([text, " ".join(caption)])


def _line(one: Comparison, provider: str) -> list[str]:
    ours, other, cited = one.ours(provider), one.best_other, one.first.get("citation")
    name = case_name(one.first) + (f" {NOISY}" if one.noisy else "")
    if ours is None:
        return [name, provider, "WRONG", "-", "-", "-"]
    if other is None:
        return [
            name,
            label(ours),
            seconds(ours["median_s"]),
            *(["cited", seconds(cited["seconds"]), "-"] if cited else ["-"] * 3),
        ]
    return [
        name,
        label(ours),
        seconds(ours["median_s"]),
        label(other),
        seconds(other["median_s"]),
        ratio(other, ours).removesuffix("x"),
    ]
