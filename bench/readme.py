"""The tables of the README, written between their marks: what stands there is generated, never typed.

<!-- bench:headline --> a few cases on the machine measured last, with their conditions <!-- /bench:headline -->
<!-- bench:backends --> which op runs on which backend, by the ops' own records <!-- /bench:backends -->

`python -m bench.report --readme README.md` writes both, `python -m bench.readme README.md` the second alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.report import FOOTNOTE
from bench.rows import Row, label, seconds
from bench.tables import NOISY, Comparison, case_name, comparisons, ratio, table
from fastdiff import ops
from fastdiff.ops.backend import BACKENDS, DTYPES

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
    where = machine.describe(max(rows, key=lambda row: row["date"])["machine"])
    text = path.read_text(encoding="utf-8")
    try:
        text = put(text, "headline", _headline(group, where))
        text = put(text, "backends", backend_matrix())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    path.write_text(text, encoding="utf-8")


def put(text: str, mark: str, content: str) -> str:
    """`text` with `content` between the marks of that name; raises ValueError where they are missing."""
    marks = rf"(<!-- bench:{mark} -->\n).*?(<!-- /bench:{mark} -->)"
    text, found = re.subn(marks, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"holds {found} pairs of marks <!-- bench:{mark} -->; one is needed")
    return text


def backend_matrix() -> str:
    """Op by backend, and what stands against a backend whatever the op."""
    has = {name: [op for op in ops.ALL if name == "torch" or name in op.implementations] for name in BACKENDS}
    lines = [[f"`{op.name}`", *("yes" if op in has[name] else "not yet" for name in BACKENDS)] for op in ops.ALL]
    facts = []
    for name, device in (
        ("torch", "any device"),
        ("cpu", "a CPU"),
        ("triton", "a CUDA device"),
        ("cuda", "a CUDA device"),
    ):
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.get(name, ())) or "any floating dtype"
        facts.append(f"`{name}` runs on {device} in {dtypes}" if has[name] else f"`{name}` has no op yet")
    return f"{table(['op', *BACKENDS], lines)}\n\nWhatever the op: {'; '.join(facts)}."


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


if __name__ == "__main__":
    for readme in map(Path, sys.argv[1:]):
        readme.write_text(put(readme.read_text(encoding="utf-8"), "backends", backend_matrix()), encoding="utf-8")
