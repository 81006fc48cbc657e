"""Rows: one JSON object per line and measurement, appended and never removed; those that lose stay too.

what      case, params, setting, provider, backend, approximate, aside
figures   median_s, p10_s, p90_s, samples, calls_per_sample, flops, bytes, arithmetic, setup_s, peak_bytes
check     status ("ok", or "WRONG" without figures), error, tolerance, against
where     machine, ceilings, others (cores that others kept busy), load, date, run, commit, version
citation  what others report for the same work, or null
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import roofline

Row = dict[str, Any]


def line(row: Row) -> str:
    """A row for the terminal: the figures, or WRONG and what is wrong."""
    name = label(row)
    if row["status"] != "ok":
        return f"{name:<28} WRONG: error {row['error']:.2g} > {row['tolerance']:g} against {row['against']}"
    rates = roofline.achieved(row)
    facts = [f"p10 {seconds(row['p10_s'])}, p90 {seconds(row['p90_s'])}, {row['samples']} samples"]
    facts += [f"error {row['error']:.1g}"]
    facts += [f"{digits(rate)} {unit}" for rate, unit in ((rates.gflops, "GFLOP/s"), (rates.gbps, "GB/s")) if rate]
    facts += [f"{per_cent(rates.share)} of the roof ({rates.bound})"] if rates.share else []
    facts += [f"{size(row['peak_bytes'])} more memory"] if row["peak_bytes"] is not None else []
    return f"{name:<28} {seconds(row['median_s']):>9}  ({'; '.join(facts)})"


def label(row: Row) -> str:
    return str(row["provider"]) if row["backend"] == "eager" else f"{row['provider']}[{row['backend']}]"


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{digits(value / factor)} {unit}"
    return f"{value / 1e-9:.3g} ns"


def size(value: float) -> str:
    """Bytes in three digits and a unit."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{digits(value / factor)} {unit}"
    return f"{value:.0f} bytes"


def digits(value: float) -> str:
    """Three digits, and more before the point where there are more: 1,234 and 12.3 and 0.00123."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def per_cent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


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
