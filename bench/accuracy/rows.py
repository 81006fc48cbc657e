"""Rows of results/accuracy.jsonl: one JSON object per cell that was run.

cell       method, data, variant, seed
run        settings, settings_digest, data_digest, facts (users, items, interactions), epochs, seconds, parameters
result     valid: metrics of the weights that were kept, under the default sampler; sampler: the model's default, chosen
           on the validation users; evaluations on the test users: ranking, scheduler and num_steps (null: the paper's
           sampler), batch_means (of so many users; null or not there: the mean over users), metrics, users,
           seconds_per_user
where      machine, date
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.accuracy.cells import Cell

Row = dict[str, Any]

_KEYS = {"method", "data", "variant", "seed", "settings_digest", "epochs", "seconds", "evaluations", "machine"}


def cell_of(row: Row) -> Cell:
    return Cell(row["method"], row["data"], row["variant"], row["seed"])


def key_of(evaluation: Mapping[str, Any]) -> tuple[str, str | None, int | None, int | None]:
    """ranking, scheduler, num_steps, batch_means: what tells a cell's evaluations apart."""
    return evaluation["ranking"], evaluation["scheduler"], evaluation["num_steps"], evaluation.get("batch_means")


def digest(settings: Mapping[str, Any]) -> str:
    """Eight digits that differ where any setting does."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_rows(path: Path) -> list[Row]:
    """The last row of each cell, in the order in which cells first stand in the file; [] where there is no file."""
    rows: dict[Cell, Row] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object ({error}); each line is one row") from error
        if not isinstance(row, dict) or not row.keys() >= _KEYS:
            raise ValueError(f"{path}:{number}: not a row of this bench; it writes one JSON object per cell")
        rows[cell_of(row)] = row
    return list(rows.values())


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
