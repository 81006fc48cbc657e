"""One page of plots for a training run: `plot_run(folder)` reads log.csv and steps.csv, and writes training.png.

    the loss and its terms, by epoch; the learning rate under it            one column per stage
    HR and NDCG on the validation users, by epoch, with the best of each
    HR, NDCG and the time per user by the number of sampling steps          one line per sampler

    python -m fastdiff.train.plots RUN        also of a run that is still going

matplotlib is needed: `pip install 'fastdiff[plot]'`.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.checkpoint import RUN_FILE
from fastdiff.errors import DataError, FastdiffError
from fastdiff.train.run_folder import LOG_COLUMNS, LOG_FILE, STEPS_COLUMNS, STEPS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILE = "training.png"

# Okabe and Ito's colours, told apart with any kind of colour vision; shapes say the same a second time.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
TERM_COLOURS = (ORANGE, SKY, GREEN, PURPLE, BLUE, RED)
METRIC_STYLES = {"HR": (BLUE, "o"), "NDCG": (RED, "s")}
SAMPLER_STYLES = {
    "ddpm": (BLUE, "o"),
    "ddim": (ORANGE, "s"),
    "one_step": (GREEN, "^"),
    "closed_form": (PURPLE, "D"),
}
SHADES = ("#f2f2f2", "#ffffff")
NARROWEST = 0.16
"""Least share of the page's width for a stage, however few its epochs."""
FEW = 40
"""Up to so many points of a line are marked one by one."""

# Inches. The places are computed here, so that the panels of all rows stand over each other on any run's page.
PAGE_WIDTH, _LEFT, _RIGHT = 10.0, 0.85, 1.55
_TOP, _TALL, _LOW, _GAP, _GAP_WITH_LABELS = 0.75, 2.5, 0.7, 0.15, 0.6

_NOT_LOSSES = re.compile(r"learning_rate|examples_per_second|(HR|NDCG|MRR|coverage)@\d+")


class NoMatplotlib(FastdiffError, ImportError):
    """Plots need a package that is not installed."""


@dataclass(frozen=True)
class Curve:
    """One line: epochs or numbers of steps, ascending, and values."""

    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class StageLog:
    """What was logged in one stage: name -> curve over its own epochs, 1, 2, ..."""

    name: str
    curves: dict[str, Curve]

    @property
    def epochs(self) -> float:
        return max(curve.x[-1] for curve in self.curves.values())

    @property
    def losses(self) -> dict[str, Curve]:
        """The sum, "loss", first."""
        names = sorted((name for name in self.curves if not _NOT_LOSSES.fullmatch(name)), key="loss".__ne__)
        return {name: self.curves[name] for name in names}


def plot_run(folder: str | Path) -> Path:
    """Draw the page of a run and return its path. Raises `NoMatplotlib`, and `DataError` where there is no log."""
    folder = Path(folder)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib("plot_run: matplotlib is not installed; `pip install 'fastdiff[plot]'` adds it") from error
    stages = read_log(folder / LOG_FILE)
    samplers = read_steps(folder / STEPS_FILE) if (folder / STEPS_FILE).is_file() else {}
    cut = _largest_cut(stages)
    heights = [_TOP, _TALL, _GAP, _LOW, _GAP_WITH_LABELS, *([_TALL, _GAP_WITH_LABELS] if cut else [])]
    heights += [0.3, _TALL, _GAP_WITH_LABELS] if samplers else []
    page = Figure(figsize=(PAGE_WIDTH, sum(heights)))  # no pyplot: nothing global is touched
    FigureCanvasAgg(page)
    page.text(_LEFT / PAGE_WIDTH, 1 - 0.28 / sum(heights), _title(folder), fontsize=12, weight="bold", va="center")
    tops = [sum(heights[:at]) for at in range(len(heights))]
    _draw_losses(Strip(page, tops[1], _TALL), stages)
    _draw_rates(Strip(page, tops[3], _LOW), stages)
    if cut:
        _draw_metrics(Strip(page, tops[5], _TALL), stages, cut)
    if samplers:
        draw_samplers(Strip(page, tops[-2], _TALL), samplers)
    path = folder / PLOT_FILE
    page.savefig(path, dpi=130, facecolor="white")
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[StageLog]:
    """The stages of a log.csv, in the order in which they ran."""
    stages: dict[str, dict[str, Curve]] = {}
    for where, row in _rows(path, LOG_COLUMNS):
        curve = stages.setdefault(row["stage"], {}).setdefault(row["name"], Curve([], []))
        curve.x.append(_number(row["epoch"], where))
        curve.y.append(_number(row["value"], where))
    if not stages:
        raise DataError(f"{path}: no epoch has been logged yet; plot the run once one is complete")
    return [StageLog(name, curves) for name, curves in stages.items()]


def read_steps(path: Path) -> dict[str, dict[str, Curve]]:
    """Sampler -> name -> curve over the number of steps."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for where, row in _rows(path, STEPS_COLUMNS):
        at = _number(row["num_steps"], where), _number(row["value"], where)
        points.setdefault(row["scheduler"], {}).setdefault(row["name"], []).append(at)
    return {
        scheduler: {name: Curve(*map(list, zip(*sorted(pairs), strict=True))) for name, pairs in names.items()}
        for scheduler, names in points.items()
    }


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give the folder of a training run")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise DataError(f"{path}:1: the columns are {reader.fieldnames}; {','.join(columns)} is accepted")
        rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    for where, row in rows:
        if None in row or None in row.values():
            raise DataError(f"{where}: a row needs {len(columns)} cells; {','.join(columns)} is accepted")
    return rows


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{where}: {text!r} is not a number") from None


def _title(folder: Path) -> str:
    """For example "adrec, seed 2025"; the folder's name where the run does not say."""
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return f"{run['method']}, seed {run['seed']}"
    except (OSError, ValueError, KeyError, TypeError):
        return folder.resolve().name


def _largest_cut(stages: Sequence[StageLog]) -> int:
    """The largest k of the logged HR@k; 0 where nothing was validated."""
    cuts = [int(name[3:]) for stage in stages for name in stage.curves if name.startswith("HR@")]
    return max(cuts, default=0)


# --- by epoch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """A row of panels across the page: `top` and `height` in inches from the page's upper edge."""

    page: Figure
    top: float
    height: float

    def panels(self, shares: Sequence[float], gap: float) -> list[Axes]:
        """Panels whose widths are in these proportions, `gap` inches apart."""
        tall = self.page.get_figheight()
        unit = (PAGE_WIDTH - _LEFT - _RIGHT - gap * (len(shares) - 1)) / sum(shares)
        axes, left = [], _LEFT
        for share in shares:
            bottom = 1 - (self.top + self.height) / tall
            axis = self.page.add_axes((left / PAGE_WIDTH, bottom, share * unit / PAGE_WIDTH, self.height / tall))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(True, axis="y", color="#d9d9d9", linewidth=0.7)
            axis.set_axisbelow(True)
            axis.tick_params(labelsize=8)
            axes.append(axis)
            left += share * unit + gap
        return axes

    def label(self, text: str) -> None:
        middle = 1 - (self.top + self.height / 2) / self.page.get_figheight()
        self.page.text(0.22 / PAGE_WIDTH, middle, text, rotation=90, ha="center", va="center", fontsize=9)

    def legend(self, handles: Sequence[Any], names: Sequence[str]) -> None:
        place = ((PAGE_WIDTH - _RIGHT + 0.1) / PAGE_WIDTH, 1 - self.top / self.page.get_figheight())
        self.page.legend(handles, names, loc="upper left", bbox_to_anchor=place, fontsize=9, frameon=False)


def _stage_axes(strip: Strip, stages: Sequence[StageLog], named: bool, epochs: bool) -> list[Axes]:
    """One panel per stage, its width by its epochs; all share the vertical axis."""
    total = sum(stage.epochs for stage in stages)
    shares = [max(stage.epochs / total, NARROWEST) for stage in stages]
    axes = strip.panels(shares, 0.08)
    for at, (axis, stage) in enumerate(zip(axes, stages, strict=True)):
        axis.set_facecolor(SHADES[at % 2])
        margin = max(0.5, 0.02 * stage.epochs)
        axis.set_xlim(1 - margin, stage.epochs + margin)
        axis.set_xticks(_whole_ticks(stage.epochs, max(1, round(10 * shares[at] / sum(shares)))))
        if named:
            axis.set_title(stage.name, fontsize=10, loc="left")
        if epochs:
            axis.set_xlabel("epoch", fontsize=8, labelpad=1)
        else:
            axis.tick_params(labelbottom=False)
        if at:
            axis.sharey(axes[0])
            axis.tick_params(axis="y", which="both", left=False, labelleft=False)
            axis.spines["left"].set_visible(False)
    return axes


def _whole_ticks(last: float, about: int) -> list[int]:
    """Round numbers of epochs up to `last`, about so many."""
    step = 10 ** math.floor(math.log10(max(1.0, last / about)))
    step = next(int(step * factor) for factor in (1, 2, 5, 10) if last / (step * factor) <= about)
    return list(range(step, int(last) + 1, step)) or [int(last)]


def _draw_losses(strip: Strip, stages: Sequence[StageLog]) -> None:
    axes = _stage_axes(strip, stages, named=True, epochs=False)
    terms = list(dict.fromkeys(name for stage in stages for name in stage.losses if name != "loss"))
    colours = {"loss": BLACK, **{name: TERM_COLOURS[at % len(TERM_COLOURS)] for at, name in enumerate(terms)}}
    values = [value for stage in stages for curve in stage.losses.values() for value in curve.y]
    if min(values) > 0 and max(values) > 30 * min(values):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:g}")
    handles: dict[str, Any] = {}
    for axis, stage in zip(axes, stages, strict=True):
        for name, curve in stage.losses.items():
            width = 2.2 if name == "loss" and terms else 1.5
            handles[name] = _line(axis, curve, colours[name], "o", width, zorder=2 if name == "loss" else 3)
    strip.label("training loss")
    names = {name: "loss (sum)" if name == "loss" and terms else name for name in ("loss", *terms) if name in handles}
    strip.legend([handles[name] for name in names], list(names.values()))


def _draw_rates(strip: Strip, stages: Sequence[StageLog]) -> None:
    axes = _stage_axes(strip, stages, named=False, epochs=True)
    curves = [stage.curves.get("learning_rate", Curve([], [])) for stage in stages]
    for axis, curve in zip(axes, curves, strict=True):
        _line(axis, curve, "#555555", "o", 1.2)
    highest = max((value for curve in curves for value in curve.y), default=0.0)
    axes[0].set_ylim(0, 1.15 * highest or 1.0)
    axes[0].set_yticks([0, highest] if highest else [0], ["0", f"{highest:.2g}"] if highest else ["0"])
    strip.label("learning\nrate")


def _draw_metrics(strip: Strip, stages: Sequence[StageLog], cut: int) -> None:
    axes = _stage_axes(strip, stages, named=False, epochs=True)
    handles: dict[str, Any] = {}
    for kind, (colour, marker) in METRIC_STYLES.items():
        name = f"{kind}@{cut}"
        curves = [stage.curves.get(name, Curve([], [])) for stage in stages]
        found = [(value, at) for at, curve in enumerate(curves) for value in curve.y]
        if not found:
            continue
        best, where = max(found, key=lambda pair: (pair[0], -pair[1]))
        for at, (axis, curve) in enumerate(zip(axes, curves, strict=True)):
            per_cent = Curve(curve.x, [100 * value for value in curve.y])
            handles[name] = _line(axis, per_cent, colour, marker, 1.5)
            if at == where:
                epoch = curve.x[curve.y.index(best)]
                axis.plot([epoch], [100 * best], marker="*", markersize=13, color=colour, zorder=5, clip_on=False)
                right = epoch > 0.6 * stages[at].epochs and stages[at].epochs > 1
                axis.annotate(
                    f"{100 * best:.2f}, epoch {epoch:g}",
                    (epoch, 100 * best),
                    xytext=(-4 if right else 4, 8),
                    textcoords="offset points",
                    ha="right" if right else "left",
                    fontsize=8,
                    color=colour,
                )
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(0 if low > 0 or low < 0.3 * high else low, 1.12 * high)
    strip.label("validation, per cent")
    strip.legend(list(handles.values()), list(handles))


# --- by number of steps -----------------------------------------------------------------------------------------------


def draw_samplers(strip: Strip, samplers: dict[str, dict[str, Curve]], users: str = "validation") -> None:
    """Accuracy and time by the number of steps, one line per sampler; `users`: whose figures they are."""
    names = list(dict.fromkeys(name for curves in samplers.values() for name in curves))
    names.sort(key=lambda name: (name == "seconds_per_user", not name.startswith("HR")))
    axes = strip.panels([1.0] * len(names), 0.6)
    counts = sorted({int(x) for curves in samplers.values() for curve in curves.values() for x in curve.x})
    handles: dict[str, Any] = {}
    for axis, name in zip(axes, names, strict=True):
        timed = name == "seconds_per_user"
        for at, (scheduler, curves) in enumerate(samplers.items()):
            colour, marker = SAMPLER_STYLES.get(scheduler, (TERM_COLOURS[at % len(TERM_COLOURS)], "v"))
            if name in curves:
                y = [value if timed else 100 * value for value in curves[name].y]
                # equal lines stay visible: the later is thinner
                handles[scheduler] = _line(axis, Curve(curves[name].x, y), colour, marker, max(1.0, 3.0 - 1.5 * at))
        axis.set_title("time per user" if timed else f"{name}, {users}, per cent", fontsize=10, loc="left")
        axis.set_xlabel("sampling steps", fontsize=8, labelpad=1)
        axis.set_xscale("log")
        axis.set_xticks(_apart(counts), [f"{count:,}" for count in _apart(counts)])
        axis.minorticks_off()
        axis.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
        if timed:
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            axis.set_ylim(min(low, high / 12), high)  # a decade at least, so that some power of ten is named
            axis.yaxis.set_major_formatter(lambda value, _: _seconds(value))
            axis.yaxis.set_minor_formatter(lambda value, _: "")
        else:
            axis.set_ylim(0, 1.12 * axis.get_ylim()[1])
    strip.legend(list(handles.values()), list(handles))


def _apart(counts: Sequence[int]) -> list[int]:
    """Those that do not crowd a logarithmic axis; the last one stays."""
    kept = [counts[-1]]
    for count in reversed(counts[:-1]):
        if kept[-1] >= 1.6 * count:
            kept.append(count)
    return kept[::-1]


def _seconds(value: float) -> str:
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g} s"


# --- parts ------------------------------------------------------------------------------------------------------------


def _line(axis: Axes, curve: Curve, colour: str, marker: str, width: float, zorder: float = 3) -> Any:
    size = 4.5 if len(curve.x) <= FEW else 0
    (line,) = axis.plot(
        curve.x, curve.y, color=colour, marker=marker, markersize=size, linewidth=width, zorder=zorder, clip_on=False
    )
    return line


def _main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m fastdiff.train.plots RUN", file=sys.stderr)
        return 2
    try:
        print(plot_run(arguments[0]))
    except FastdiffError as error:
        print(f"fastdiff: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
