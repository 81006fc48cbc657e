"""The folder of a training run, and the state from which it goes on after a kill at any moment.

run.json      what the run is made from: method, settings, data, seed; a run is resumed only under the same
data.json     where the data were read, and how (`fastdiff.train.data.Source`), so that a resumed run finds them again
state.pt      everything that the next batch depends on; replaced as a whole (written beside it, then renamed)
log.csv       stage,epoch,step,seconds,name,value: losses, learning rates, speed, metrics of the validations
steps.csv     scheduler,num_steps,name,value: accuracy and time by number of sampling steps, at the end
training.png  all of it as one page of plots
model/        the result, as `fastdiff.from_pretrained` loads it
result.json   the metrics of the result
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoint import RUN_FILE
from fastdiff.errors import DataError, InvalidArgument

STATE_FILE, LOG_FILE, STEPS_FILE, RESULT_FILE = "state.pt", "log.csv", "steps.csv", "result.json"
SOURCE_FILE = "data.json"
SETTINGS = "settings."
"""What the names of settings begin with in run.json."""
ALL_STEPS = "all_steps"
"""What run.json says of the model that is written at the end: another resumption may say otherwise."""
LOG_COLUMNS = ("stage", "epoch", "step", "seconds", "name", "value")
STEPS_COLUMNS = ("scheduler", "num_steps", "name", "value")

State = dict[str, Any]


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def exists(self) -> bool:
        return (self.path / RUN_FILE).exists()

    def check(self, resume: bool) -> None:
        """Raise where a run cannot be here: nothing that is there is ever overwritten unasked."""
        if not self.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                which = "folder of the run" if resume else "name of a new folder"
                raise InvalidArgument(f"--output: {self.path} exists and holds no training run; give the {which}")
        elif not resume:
            raise InvalidArgument(
                f"--output: {self.path} holds a training run; give --resume to go on with it, or another folder"
            )

    def record(self) -> dict[str, Any]:
        """What the run that is here is made from."""
        return _read_json(self.path / RUN_FILE)

    def source(self) -> dict[str, Any] | None:
        """Where its data were read; None where they are from no file."""
        path = self.path / SOURCE_FILE
        return _read_json(path) if path.exists() else None

    def open(self, record: dict[str, Any], source: dict[str, Any] | None, resume: bool) -> State | None:
        """Begin a run (None), or its state where one is resumed."""
        self.check(resume)
        if not self.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json(RUN_FILE, record)
            if source is not None:
                self.write_json(SOURCE_FILE, source)
            return None
        before = self.record()
        compared = {**before, **record}.keys() - {ALL_STEPS}
        names = sorted(name for name in compared if before.get(name) != record.get(name))
        names = ["method"] if "method" in names else names  # of which all settings follow
        if names:
            told = [
                f"{name} was {_short(before.get(name))}, now {_short(record.get(name))}"
                for name in names
                if name != "data"
            ]
            cures = ["leave these options out, for the run keeps its own"] if told else []
            if "data" in names:
                begun = (self.source() or {}).get("path")
                told.append("the data are others (users, items, their order or the split)")
                cures.append(f"give those that it began with{f', read from {begun}' if begun else ''}")
            raise InvalidArgument(
                f"--resume: {self.path} was made otherwise: {'; '.join(told)}; {'; '.join(cures)}; or give another "
                "folder, where another run begins"
            )
        if before.get(ALL_STEPS) != record.get(ALL_STEPS):
            self.write_json(RUN_FILE, record)
        if source not in (None, self.source()):
            self.write_json(SOURCE_FILE, source)  # the same data, at another place now
        return self.load_state()

    def load_state(self) -> State | None:
        path = self.path / STATE_FILE
        if not path.exists():
            return None
        try:
            state: State = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DataError(
                f"{path}: damaged or cut short; delete this file to begin the run again, or give another folder"
            ) from error
        return state

    def save_state(self, state: State) -> None:
        fresh = self.path / f"{STATE_FILE}.new"
        with fresh.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path / STATE_FILE)

    def write_log(self, rows: Iterable[Sequence[Any]]) -> None:
        """The whole log: it is kept in the state, so that a resumed run's is an unbroken one's."""
        self._write_csv(LOG_FILE, LOG_COLUMNS, rows)

    def write_steps(self, rows: Iterable[Sequence[Any]]) -> None:
        self._write_csv(STEPS_FILE, STEPS_COLUMNS, rows)

    def write_json(self, name: str, value: Any) -> None:
        fresh = self.path / f"{name}.new"
        fresh.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(fresh, self.path / name)

    def _write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        fresh = self.path / f"{name}.new"
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
        os.replace(fresh, self.path / name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); give another folder") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not the record of a training run; give another folder")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
