"""Training logs beside the rows: results/training/<method>-<data>-<variant>-<seed>.csv, a line per epoch.

From a run's log.csv (stage,epoch,step,seconds,name,value): the same, with a column per name and six digits; a name that
an epoch has no value of is empty there. Validations are with the paper's sampler, or the recipe's own for validations;
the settings stand in the cell's row.
"""

from __future__ import annotations

import csv
from pathlib import Path

from bench.accuracy.cells import Cell
from fastdiff.train.run_folder import LOG_FILE

FOLDER = "training"
_LEFT_OUT = {"examples_per_second"}  # of a machine that did other things too
_PLACE = ("stage", "epoch", "step", "seconds")


def path_of(cell: Cell, rows: Path) -> Path:
    return rows.parent / FOLDER / (cell.id.replace("/", "-") + ".csv")


def write(cell: Cell, run: Path, rows: Path) -> None:
    epochs: dict[tuple[str, ...], dict[str, str]] = {}
    with (run / LOG_FILE).open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["name"] not in _LEFT_OUT:
                values = epochs.setdefault((line["stage"], line["epoch"]), {name: line[name] for name in _PLACE})
                values[line["name"]] = f"{float(line['value']):.6g}"
    names = dict.fromkeys(name for values in epochs.values() for name in values)
    path = path_of(cell, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(epochs.values())
