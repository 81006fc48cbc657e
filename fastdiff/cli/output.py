"""An output file that survives interruption: written as FILE.part, renamed to FILE when it is whole.

Beside FILE.part lies FILE.part.json, the record of what the run was made from: the model, the input, the seed and every
argument that the result depends on. A run is continued only under the same record, and only from the end of a whole
batch: then each batch is the one of an unbroken run, and so is the file, also where rounding depends on the batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdiff.errors import DataError, InvalidArgument

Record = dict[str, Any]


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def record_of(path: Path) -> Path:
    return path.with_name(path.name + ".part.json")


def check_startable(path: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to destroy what is there, before anything slow is done."""
    if path.is_dir():
        raise InvalidArgument(f"--output: {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise InvalidArgument(f"--output: there is no folder {path.parent}; make it first")
    if overwrite:
        return
    if path.exists():
        if resume and not part_of(path).exists():
            raise InvalidArgument(
                f"--resume: {path} is complete, there is nothing to continue; give another name, or --overwrite to "
                "replace it"
            )
        raise InvalidArgument(f"--output: {path} exists; give another name, or --overwrite to replace it")
    if part_of(path).exists():
        if not resume:
            raise InvalidArgument(
                f"--output: {part_of(path)} holds an unfinished run; give --resume to continue it, "
                "or --overwrite to begin again"
            )
        if not record_of(path).exists():
            raise InvalidArgument(
                f"--resume: {record_of(path)} is missing, so what {part_of(path).name} was made from is not known; "
                "give --overwrite to begin again"
            )


def read_record(path: Path) -> Record | None:
    """The record of the unfinished run towards `path`; None where there is no such run."""
    if not record_of(path).exists():
        return None
    try:
        record = json.loads(record_of(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{record_of(path)}: not the JSON that a run leaves ({error}); give --overwrite to begin again"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("seed"), int):
        raise DataError(
            f"{record_of(path)}: not the record that a run leaves (got {_shown(record)}); "
            "give --overwrite to begin again"
        )
    return record


def check_same(path: Path, before: Record, now: Record) -> None:
    """Refuse to continue a run under another record; names every difference."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        differences = "; ".join(f"{name} was {_shown(before.get(name))}, now {_shown(now.get(name))}" for name in names)
        raise InvalidArgument(
            f"--resume: {part_of(path)} was made otherwise: {differences}; give the same, or --overwrite to begin again"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class PartFile:
    """The file under way: `write` batch by batch, `finish` when whole. On any exit, what was written stays.

    kept  lines that a continued run found and keeps
    """

    def __init__(self, path: Path, kept: int, end: int) -> None:
        self.path, self.kept, self.written = path, kept, 0
        self._file = part_of(path).open("r+b")
        self._file.truncate(end)
        self._file.seek(end)

    @classmethod
    def begin(cls, path: Path, record: Record) -> PartFile:
        """Begin a run, whatever is there."""
        part_of(path).unlink(missing_ok=True)
        fresh = record_of(path).with_name(record_of(path).name + ".new")
        fresh.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(fresh, record_of(path))
        part_of(path).touch()
        return cls(path, 0, 0)

    @classmethod
    def resume(cls, path: Path, users: Iterable[str], batch_size: int) -> PartFile:
        """Go on after the last whole batch. A last line that is cut off, or is not of the expected user, is dropped."""
        part_of(path).touch()
        return cls(path, *_whole_batches(part_of(path), users, batch_size))

    def write(self, lines: Sequence[str]) -> None:
        """Append lines and hand them to the operating system, so that they outlive this process."""
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        self.written += len(lines)

    def finish(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(part_of(self.path), self.path)
        record_of(self.path).unlink(missing_ok=True)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _whole_batches(part: Path, users: Iterable[str], batch_size: int) -> tuple[int, int]:
    """How many lines to keep, and where in the file they end."""
    lines = end = kept = kept_end = 0
    with part.open("rb") as file:
        for line, user in zip(file, users, strict=False):
            if not _is_line_of(line, user):
                break
            lines += 1
            end += len(line)
            if lines % batch_size == 0:
                kept, kept_end = lines, end
    return kept, kept_end


def _is_line_of(line: bytes, user: str) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("user") == user


def digest(files: Iterable[Path]) -> str:
    """A short hash of the contents of files: what tells one model or input from another."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()[:16]
