"""Plots of the machine that was measured last; without matplotlib there are none, and the report says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.roofline import achieved
from bench.rows import Row, digits, label, seconds
from bench.tables import NOISY, Comparison, comparisons, is_other, is_ours, params_text

COLOURS = {
    "published": "#7f7f7f",
    "published-compiled": "#c49c94",
    "eager": "#17becf",
    "torch-topk": "#7f7f7f",
    "torch-topk-compiled": "#c49c94",
    "torch-topk-bf16": "#c7c7c7",
    "torch-topk-bf16-compiled": "#e7cbc4",
    "faiss": "#bcbd22",
    "faiss-tuned": "#8c564b",
    "implicit": "#9467bd",
    "usearch": "#e377c2",
    "fastdiff": "#d62728",
    "fastdiff-compiled": "#f7b6b7",
    "fastdiff-bf16-scan": "#ff7f0e",
    "fastdiff-fp16-scan": "#aec7e8",
    "fastdiff-int8-scan": "#2ca02c",
    "fastdiff-bf16-uncertified": "#ffbb78",
    "fastdiff-int8-uncertified": "#98df8a",
    "fastdiff-closed-form": "#1f77b4",
}
ASIDE = "#dddddd"
MARKERS = {"eager": "o", "torch": "s", "cpu": "D", "triton": "^", "cuda": "v"}
BAR = 0.22
"""Inches of height per bar."""


def draw_plots(rows: Sequence[Row], folder: Path, stem: str) -> dict[str, str]:
    """PNGs in `folder`: what is shown -> file name; {} where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: tables without plots; `pip install matplotlib` adds them")
        return {}
    where, group = next(iter(comparisons(rows).items()), ("", []))
    figures: dict[str, Any] = {
        name: draw(pyplot, group) for name, draw in (("ratios", _ratios), ("roofline", _roofline), ("gains", _gains))
    }
    for subject in dict.fromkeys(one.first["case"] for one in group):
        members = [one for one in group if one.first["case"] == subject]
        if len({one.first["params"]["batch"] for one in members}) > 1:
            figures[subject] = _times(pyplot, members)
    files = {}
    for name, drawn in figures.items():
        if drawn is None:
            continue
        noisy = f"  {NOISY} others were using the machine" if any(one.noisy for one in group) else ""
        drawn.supxlabel(f"{where}{noisy}", fontsize=7, color="#555555")
        files[name] = f"{stem}-{name}.png"
        drawn.savefig(folder / files[name], dpi=120, bbox_inches="tight")
        pyplot.close(drawn)
    return files


# --- bars over all cases ----------------------------------------------------------------------------------------------


def _ratios(pyplot: Any, group: Sequence[Comparison]) -> Any:
    """How many times faster ours is than the strongest rival that promises the same."""
    bars = []
    for one in group:
        for provider in one.our_providers:
            ours, other = one.ours(provider), one.best_other
            if ours is None or other is None or ours.get("approximate") or one.of_memory:
                continue
            faster = other["median_s"] / ours["median_s"]
            bars.append((f"{_short(one)}  {label(ours)}", faster, provider, label(other)))
    if not bars:
        return None
    drawn, axis = _bars(pyplot, [bar[0] for bar in bars], "times faster than the strongest rival (log scale)")
    values = [bar[1] for bar in bars]
    axis.barh(range(len(bars)), [v - 1 for v in values], left=1, color=[COLOURS.get(b[2], ASIDE) for b in bars])
    for place, (_, value, _, other) in enumerate(bars):
        axis.text(max(value, 1.0) * 1.05, place, f"{digits(value)}x {other}", va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(min(0.5, 0.8 * min(values)), 20 * max(*values, 1.0))
    axis.axvline(1, color="black", linewidth=0.8)
    return drawn


def _roofline(pyplot: Any, group: Sequence[Comparison]) -> Any:
    """How near each provider comes to what the machine can do."""
    lines = []
    for one in group:
        timed = [row for row in one.rows if row["status"] == "ok" and (is_ours(row) or is_other(row))]
        points = [(row, achieved(row).share) for row in timed]
        known = [(row, share) for row, share in points if share is not None]
        if any(is_ours(row) for row, _ in known):
            lines.append((_short(one), known))
    if not lines:
        return None
    drawn, axis = _bars(pyplot, [name for name, _ in lines], "per cent of the ceiling measured in the same run")
    seen: dict[str, Any] = {}
    for place, (_, known) in enumerate(lines):
        for row, share in known:
            seen[label(row)] = axis.scatter(
                100 * share,
                place,
                color=COLOURS.get(row["provider"], ASIDE),
                marker=MARKERS.get(row["backend"], "P"),
                s=26 if is_ours(row) else 14,
                zorder=3 if is_ours(row) else 2,
            )
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlim(left=0)
    axis.legend(seen.values(), seen.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    return drawn


def _gains(pyplot: Any, group: Sequence[Comparison]) -> Any:
    """Published to plain PyTorch, and from there to kernels, end to end on a log scale: factors add up."""
    bars = []
    for one in group:
        for provider in one.our_providers:
            published, in_torch, ours = one.published, one.ours_in_torch(provider), one.ours(provider)
            if published is not None and in_torch is not None and ours is not None:
                algorithmic = published["median_s"] / in_torch["median_s"]
                bars.append((f"{_short(one)}  {provider}", algorithmic, in_torch["median_s"] / ours["median_s"]))
    if not bars:
        return None
    drawn, axis = _bars(pyplot, [name for name, _, _ in bars], "times faster than published (log scale)")
    places = range(len(bars))
    algorithmic, whole = [bar[1] for bar in bars], [bar[1] * bar[2] for bar in bars]
    axis.barh(places, [v - 1 for v in algorithmic], left=1, color="#9ecae1", label="algorithmic: plain PyTorch")
    kernel = [all_of_it - part for all_of_it, part in zip(whole, algorithmic, strict=True)]
    axis.barh(places, kernel, left=algorithmic, color="#d62728", label="kernel: best of ours")
    for place, (_, first, second) in enumerate(bars):
        axis.text(
            max(first * second, first, 1.0) * 1.05,
            place,
            f"{digits(first)} x {digits(second)}",
            va="center",
            fontsize=7,
        )
    axis.set_xscale("log")
    axis.set_xlim(min(0.5, 0.8 * min(algorithmic)), 8 * max(*whole, 1.0))
    axis.axvline(1, color="black", linewidth=0.8)
    axis.legend(loc="lower right", fontsize=7)
    return drawn


def _bars(pyplot: Any, names: Sequence[str], title: str) -> tuple[Any, Any]:
    """A figure with one line per name, the first on top."""
    drawn, axis = pyplot.subplots(figsize=(9, 1.2 + BAR * len(names)), layout="constrained")
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title(title, fontsize=9)
    axis.grid(True, axis="x", alpha=0.3)
    axis.tick_params(axis="x", labelsize=7)
    return drawn, axis


def _short(one: Comparison) -> str:
    """A case's name in few letters: values that explain themselves stand alone."""
    params = dict(one.first["params"])
    batch = params.pop("batch", None)
    named = [f"{key} {value:,}" if isinstance(value, int) else str(value) for key, value in params.items()]
    return " ".join([one.first["case"], *named, f"B {batch:,}"]) + (f" {NOISY}" if one.noisy else "")


# --- time over the batch size -----------------------------------------------------------------------------------------


def _times(pyplot: Any, members: Sequence[Comparison]) -> Any:
    """Seconds per call over the batch size, one panel per remaining parameter."""
    panels: dict[str, list[Comparison]] = {}
    for one in members:
        rest = params_text({key: value for key, value in one.first["params"].items() if key != "batch"})
        panels.setdefault(rest, []).append(one)
    drawn, axes = pyplot.subplots(
        1, len(panels), figsize=(2.2 + 3.2 * len(panels), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, (rest, group) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, group, handles)
        axis.set_title(rest, fontsize=9)
    axes[0][0].set_ylabel("time per call (median, p10 to p90)")
    subject = members[0].first
    drawn.suptitle(f"{subject['case']}: {subject['setting']}", fontsize=10)
    drawn.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    return drawn


def _panel(axis: Any, group: Sequence[Comparison], handles: dict[str, Any]) -> None:
    batches = sorted({one.first["params"]["batch"] for one in group})
    series: dict[str, list[Row]] = {}
    for one in group:
        for row in one.rows:
            if row["status"] == "ok":
                series.setdefault(label(row), []).append(row)
    for number, (name, points) in enumerate(series.items()):
        aside = 0.4 * (number / max(1, len(series) - 1) - 0.5)  # so that bars of spread do not hide each other
        medians = [row["median_s"] for row in points]
        below = [row["median_s"] - row["p10_s"] for row in points]
        above = [row["p90_s"] - row["median_s"] for row in points]
        handles[name] = axis.errorbar(
            [batches.index(row["params"]["batch"]) + aside for row in points],
            medians,
            yerr=[below, above],
            color=COLOURS.get(points[0]["provider"], ASIDE),
            marker=MARKERS.get(points[0]["backend"], "P"),
            markersize=5,
            capsize=3,
            linewidth=1.4,
        )
    axis.set_yscale("log")
    axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set_xlim(-0.4, len(batches) - 0.6)
    axis.set_xlabel("users in the batch")
    axis.grid(True, which="major", alpha=0.3)
    axis.yaxis.set_major_formatter(lambda value, _: seconds(value))
