"""`python -m bench.accuracy`: run cells, and write docs/accuracy.md from their rows."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import bench.accuracy
from bench.accuracy import logs, report
from bench.accuracy.cells import BATCH_MEANS, CELLS, VARIANTS, Cell
from bench.accuracy.rows import append_rows, cell_of, digest, read_rows
from bench.accuracy.run import data_of, folder_of, plain, run_cell, settings_of
from bench.machine import ROOT
from fastdiff.errors import FastdiffError
from fastdiff.train.trainer import Interrupted

ROWS = ROOT / "bench" / "results" / "accuracy.jsonl"
DOCUMENT = ROOT / "docs" / "accuracy.md"
DONE = "done"
LEAST_MINUTES = 0.5
"""With less time than this left, no cell is begun."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        cells = _chosen(args.only)
        if args.list:
            _list(cells, args.rows, args.runs)
            return 0
        finished = True
        if args.runs is not None:
            if args.threads is not None:
                torch.set_num_threads(args.threads)
            finished = _run(cells, args.runs, _data_folder(args.data), args.rows, args.minutes, args.device)
        rows = read_rows(args.rows)
        report.write(args.document, rows, CELLS)
        print(f"{args.document}: {len({cell_of(row) for row in rows} & set(CELLS))} of {len(CELLS)} cells")
        return 0 if finished else 130
    except (ValueError, FastdiffError, OSError) as error:
        print(f"bench.accuracy: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=bench.accuracy.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="the cells and how they stand; nothing is run or written")
    parser.add_argument(
        "--only", action="append", default=[], metavar="CELL", help="method/data/variant/seed or its first parts"
    )
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder of the training runs; without it none is run")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes; the same command goes on")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder that holds <name>/sequences.txt")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where rows are read and appended")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="what is written from them")
    return parser


def _chosen(patterns: Sequence[str]) -> list[Cell]:
    chosen = [cell for cell in CELLS if not patterns or any(cell.matches(pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"--only: no cell is {' or '.join(patterns)}; --list shows them, such as {CELLS[0].id}")
    return chosen


def _data_folder(given: Path | None) -> Path:
    """--data; else FASTDIFF_MATERIAL/data, or shared/data beside the repository, as the tests look for it."""
    folder = given or Path(os.environ.get("FASTDIFF_MATERIAL", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        raise ValueError(f"--data: there is no folder {folder}; give the one that holds <name>/sequences.txt")
    return folder


def _run(cells: Sequence[Cell], runs: Path, data: Path, rows: Path, minutes: float | None, device: str) -> bool:
    """Run what is missing; whether all of it was done."""
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for cell in cells:
        if _state(cell, rows) == DONE:
            if len(cells) < len(CELLS):  # that were asked for
                print(f"{cell.id}: done already; --rows and --document of your own, and other --runs, train it again")
            continue
        left = (deadline - time.monotonic()) / 60
        if left < LEAST_MINUTES:
            print(f"the time given is up before {cell.id}; the same command goes on")
            return False
        folder = folder_of(cell, runs)
        print(f"{cell.id}: {'goes on' if folder.exists() else 'begins'} in {folder}", flush=True)
        try:
            row = run_cell(cell, folder, data_of(cell, data), None if left == math.inf else left, device)
        except Interrupted as stopped:
            print(f"{cell.id}: {stopped}")
            return False
        logs.write(cell, folder, rows)
        append_rows(rows, [row])
    return True


def _state(cell: Cell, rows: Path) -> str:
    row = next((row for row in read_rows(rows) if cell_of(row) == cell), None)
    if row is None:
        return report.NOT_RUN
    if row["settings_digest"] != digest(plain(settings_of(cell))):
        return "done with other settings"
    averages = {None, BATCH_MEANS.get(cell.data)} <= {one.get("batch_means") for one in row["evaluations"]}
    return DONE if averages and logs.path_of(cell, rows).exists() else "incomplete"


def _list(cells: Sequence[Cell], rows: Path, runs: Path | None) -> None:
    for cell in cells:
        state = _state(cell, rows)
        if state != DONE and runs is not None and folder_of(cell, runs).exists():
            state = "begun"
        print(f"{cell.id:<44} {state:<24}  {VARIANTS[cell.method][cell.variant].what}")


if __name__ == "__main__":
    sys.exit(main())
