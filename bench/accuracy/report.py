"""docs/accuracy.md from the rows: what stands there is generated, never typed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.accuracy.cells import ABLATIONS, BATCH_MEANS, CELLS, DATA, REPORTED, TITLES, VARIANTS, Cell
from bench.accuracy.rows import Row, cell_of, key_of
from bench.rows import seconds
from bench.tables import table
from fastdiff.sampler import NAMES
from fastdiff.train.steps import NOTHING

NOT_RUN = "not yet run"
METRICS = ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20")
PLOTS = "accuracy"
"""Folder of the plots, beside the document."""

INTRODUCTION, FINDINGS = (Path(__file__).with_name(name) for name in ("introduction.md", "findings.md"))


def render(rows: Sequence[Row], cells: Sequence[Cell] = CELLS) -> str:
    """The document."""
    parts = [file.read_text(encoding="utf-8").rstrip() for file in (INTRODUCTION, FINDINGS)]
    for data, title in DATA.items():
        mine = [cell for cell in cells if cell.data == data]
        if mine:
            parts.append(_data_set(data, title, mine, rows))
    parts += [_ablations(cells, rows), _steps(cells, rows), _machines(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path, rows: Sequence[Row], cells: Sequence[Cell] = CELLS) -> None:
    """The document and, with matplotlib, its plots."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(rows, cells), encoding="utf-8")
    draw(rows, path.parent / PLOTS)


# --- a data set -------------------------------------------------------------------------------------------------------


def _data_set(data: str, title: str, cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    facts = next((row["facts"] for row in rows if row["data"] == data), None)
    parts = [f"## {title}"]
    if facts is not None:
        counts = ", ".join(f"{facts[name]:,} {name}" for name in ("users", "items", "interactions"))
        parts.append(f"`{data}`: {counts}.")
    sources: list[str] = []
    head = ["method", "trained", "D", "seeds", *METRICS, *_other_columns(data), "reported HR@20 / NDCG@20"]
    kinds = dict.fromkeys((cell.method, cell.variant) for cell in cells)
    body = [_line(method, variant, data, cells, rows, sources) for method, variant in kinds]
    parts.append(table([*head, "epochs", "time"], body))
    if sources:
        parts.append("\n".join(f"{number}. Reported: {source}." for number, source in enumerate(sources, start=1)))
    return "\n\n".join(parts)


def _line(
    method: str, variant: str, data: str, cells: Sequence[Cell], rows: Sequence[Row], sources: list[str]
) -> list[str]:
    found = _rows_of(rows, method, data, variant)
    planned = sum((cell.method, cell.data, cell.variant) == (method, data, variant) for cell in cells)
    start = [TITLES[method], VARIANTS[method][variant].what]
    reported = _reported(method, variant, data, sources)
    figures = [_metric(name, "published") for name in METRICS] + list(_other_columns(data).values())
    if not found:
        return [*start, "", f"0 of {planned}", NOT_RUN, *[""] * (len(figures) - 1), reported, "", ""]
    seeds = str(len(found)) if len(found) >= planned else f"{len(found)} of {planned}"
    epochs = [sum(row["epochs"].values()) for row in found]
    minutes = [row["seconds"] for row in found]
    return [
        *start,
        str(found[0]["settings"].get("hidden_size", "")),
        seeds,
        *(_mean(found, figure) for figure in figures),
        reported,
        f"{statistics.mean(epochs):.0f}",
        _duration(statistics.mean(minutes)),
    ]


def _other_columns(data: str) -> dict[str, Callable[[Row], float]]:
    """Title -> figure of a row: the clean ranking and, where they are what is reported, means of batches."""
    names, batch = ("HR@20", "NDCG@20"), BATCH_MEANS.get(data)
    columns = {f"clean {name}": _metric(name, "clean") for name in names}
    if batch is not None:
        columns |= {f"means of {batch}: {name}": _metric(name, "published", batch) for name in names}
    return columns


def _reported(method: str, variant: str, data: str, sources: list[str]) -> str:
    """What others report, with the number of its source below the table."""
    for one in REPORTED:
        if (one.method, one.variant, one.data) == (method, variant, data):
            if one.source not in sources:
                sources.append(one.source)
            return f"{one.hr:g} / {one.ndcg:g} ({sources.index(one.source) + 1})"
    return ""


def _rows_of(rows: Sequence[Row], method: str, data: str, variant: str) -> list[Row]:
    """All seeds, with the settings of the row that came last: figures of different settings are never averaged."""
    found = [row for row in rows if (row["method"], row["data"], row["variant"]) == (method, data, variant)]
    last = max((row for row in found), key=lambda row: str(row.get("date")), default=None)
    return [row for row in found if last is not None and row["settings_digest"] == last["settings_digest"]]


def _evaluation(
    row: Row,
    ranking: str,
    scheduler: str | None = None,
    num_steps: int | None = None,
    batch_means: int | None = None,
) -> dict[str, Any]:
    wanted = (ranking, scheduler, num_steps, batch_means)
    for one in row["evaluations"]:
        if key_of(one) == wanted:
            return dict(one)
    raise ValueError(f"{cell_of(row).id}: there is no evaluation {wanted}; run the cell again")


def _metric(name: str, ranking: str, batch_means: int | None = None) -> Callable[[Row], float]:
    return lambda row: 100 * float(_evaluation(row, ranking, batch_means=batch_means)["metrics"][name])


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> str:
    values = [value(row) for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _duration(value: float) -> str:
    minutes = round(value / 60)
    if minutes < 2:
        return f"{value:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# --- ablations --------------------------------------------------------------------------------------------------------


def _ablations(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    body = []
    for what, method, without, with_it in ABLATIONS:
        for data in dict.fromkeys(cell.data for cell in cells if (cell.method, cell.variant) == (method, with_it)):
            if not any((cell.method, cell.data, cell.variant) == (method, data, without) for cell in cells):
                continue
            body.append([TITLES[method], what, data, *_differences(rows, method, data, without, with_it)])
    head = ["method", "what is added", "data", "seeds", "HR@20 without", "with", "NDCG@20 without", "with"]
    note = (
        "Seeds that both sides have. With one seed a difference of a few tenths of a per cent says nothing: the "
        "standard error of HR@20 alone, 100 sqrt(p (1 - p) / users), is 0.5 for p = 0.15 and 5,000 users."
    )
    return "\n\n".join(["## Ablations", table(head, body), note]) if body else ""


def _differences(rows: Sequence[Row], method: str, data: str, without: str, with_it: str) -> list[str]:
    sides = [{row["seed"]: row for row in _rows_of(rows, method, data, name)} for name in (without, with_it)]
    common = sorted(sides[0].keys() & sides[1].keys())
    if not common:
        return ["0", NOT_RUN, "", "", ""]
    cells = [
        _mean([side[seed] for seed in common], _metric(name, "published"))
        for name in ("HR@20", "NDCG@20")
        for side in sides
    ]
    return [str(len(common)), *cells]


# --- accuracy against steps -------------------------------------------------------------------------------------------


def _steps(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    parts = [
        "## Accuracy against steps",
        "Test users, published ranking; the mean over seeds, of times the least. Only the sampler differs. "
        "The closed form is equal to all DDPM steps in law. *Default*: for how many seeds `fastdiff train` made it the "
        "model's default sampler, the one of fewest steps whose HR@20 and NDCG@20 on the validation users are at least "
        f"{100 - 100 * NOTHING:.0f} % of those of the paper's (TA-Rec's and CDDRec's has one step; the closed form is "
        "one draw).",
    ]
    for method in dict.fromkeys(cell.method for cell in cells if cell.method != "sasrec"):
        mine = dict.fromkeys((cell.data, cell.variant) for cell in cells if cell.method == method)
        lines = [line for data, variant in mine for line in _step_lines(method, data, variant, rows)]
        parts.append(f"### {TITLES[method]}")
        if not lines:
            parts.append(f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}.")
            continue
        for data, variant in mine:
            if name := plot_name(method, data, variant, rows):
                what = f"{TITLES[method]}, {DATA[data]}, {VARIANTS[method][variant].what}"
                parts.append(f"![{what}: accuracy and time by sampling steps]({PLOTS}/{name})")
        head = ["data", "trained", "sampler", "steps", "HR@20", "NDCG@20", "per user", "default"]
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def _samplers(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """(scheduler, steps) that all rows have."""
    each = [[(one["scheduler"], one["num_steps"]) for one in row["evaluations"] if one["scheduler"]] for row in rows]
    return [kind for kind in each[0] if all(kind in other for other in each)] if each else []


def _step_lines(method: str, data: str, variant: str, rows: Sequence[Row]) -> list[list[str]]:
    found = _rows_of(rows, method, data, variant)
    lines = []
    for scheduler, steps in _samplers(found):
        hr, ndcg, time = _at(found, scheduler, steps).values()
        figures = [f"{100 * hr:.2f}", f"{100 * ndcg:.2f}", seconds(time)]
        chosen = sum(_is_default(row, scheduler, steps) for row in found)
        figures.append(f"{chosen} of {len(found)}" if chosen else "")
        lines.append([data, VARIANTS[method][variant].what, NAMES[scheduler], f"{steps:,}", *figures])
    return lines


def _is_default(row: Row, scheduler: str, steps: int) -> bool:
    """Whether the trained model samples so unless told otherwise."""
    chosen = row.get("sampler")
    return chosen is not None and (chosen["scheduler"], chosen["steps"]) == (scheduler, steps)


def _at(rows: Sequence[Row], scheduler: str, steps: int) -> dict[str, float]:
    """Over the seeds: the mean of HR@20 and of NDCG@20, the least of the time, which other work only makes longer."""
    found = [_evaluation(row, "published", scheduler, steps) for row in rows]
    means = {name: statistics.mean(float(one["metrics"][name]) for one in found) for name in ("HR@20", "NDCG@20")}
    return means | {"seconds_per_user": min(float(one["seconds_per_user"]) for one in found)}


def plot_name(method: str, data: str, variant: str, rows: Sequence[Row]) -> str:
    """The PNG of a model's samplers; "" where there is only one to look at."""
    kinds = _samplers(_rows_of(rows, method, data, variant))
    return f"{method}-{data}-{variant}.png" if len(kinds) > 1 else ""


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The plots that the document shows; [] where matplotlib is missing, which is said."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: the document without new plots; `pip install matplotlib` adds them")
        return []
    from fastdiff.train.plots import PAGE_WIDTH, Curve, Strip, draw_samplers

    paths = []
    for method, data, variant in dict.fromkeys((row["method"], row["data"], row["variant"]) for row in rows):
        name = plot_name(method, data, variant, rows)
        if not name:
            continue
        found = _rows_of(rows, method, data, variant)
        curves: dict[str, dict[str, Curve]] = {}
        for scheduler, steps in sorted(_samplers(found), key=lambda kind: kind[1]):
            mine = curves.setdefault(scheduler, {})
            for measured, value in _at(found, scheduler, steps).items():
                curve = mine.setdefault(measured, Curve([], []))
                curve.x.append(steps)
                curve.y.append(value)
        page = Figure(figsize=(PAGE_WIDTH, 3.4))
        FigureCanvasAgg(page)
        draw_samplers(Strip(page, 0.35, 2.5), {name: curves[name] for name in NAMES if name in curves}, "test")
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / name)
        page.savefig(paths[-1], dpi=120, facecolor="white")
    return paths


def _machines(rows: Sequence[Row]) -> str:
    lines = list(dict.fromkeys(machine.describe(row["machine"]) for row in rows))
    return "\n".join(["## Machines", "", *(f"- {line}" for line in lines)]) if lines else ""
