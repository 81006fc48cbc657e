"""`fastdiff generate`: one JSON line per user."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import (
    add_engine_options,
    add_sampling_options,
    load_engine,
    new_parser,
    sampling_arguments,
)
from fastdiff.cli.output import PartFile, check_same, check_startable, digest, part_of, read_record
from fastdiff.errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from fastdiff.data import IdType, ItemId, UserSequence
    from fastdiff.engine import Engine
    from fastdiff.output import GenerateOutput

_DESCRIPTION = """\
Recommend items: one JSON line per user,
  {"user": "u1", "item_ids": [12, 7, ...], "scores": [5.25, 4.5, ...]}
best item first, on stdout or in a file; everything else is said on stderr.

  fastdiff generate my-model --history "3 17 256" --top-k 5
  fastdiff generate my-model --sequences users.txt --output recommendations.jsonl

A file of sequences holds one user per line, `user item item ...`, oldest item first; RecBole's .inter files are read
too. With --output, lines are written as they are made into FILE.part, which is renamed to FILE at the end; after an
interruption the same command with --resume goes on where it stopped, and gives the file of an unbroken run.
"""


def add_parser(commands: Any) -> None:
    parser = new_parser(commands, run, "generate", "recommend items for histories", _DESCRIPTION)
    parser.add_argument("folder", help="a model folder, as `fastdiff convert` or save_pretrained wrote it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sequences", metavar="FILE", help="a sequence file, or a RecBole .inter file")
    source.add_argument(
        "--history",
        action="append",
        metavar='"ID ID ..."',
        help='one history, oldest item first ("" for a new user); may be repeated: the users are then "1", "2", ...; '
        "an id with blanks stands in quotes",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="items per user (default: the model's own setting)")
    parser.add_argument("--seed", type=int, help="of the noise (default: drawn, and said on stderr)")
    parser.add_argument(
        "--batch-size", type=int, metavar="B", help="users at a time (default: 256, coupled CDDRec 128)"
    )
    add_sampling_options(parser)
    ranking = parser.add_argument_group("ranking")
    ranking.add_argument(
        "--ranking",
        choices=("clean", "published"),
        default="clean",
        help="clean: real items only; published: candidates and seen items as the authors rank (default: clean)",
    )
    ranking.add_argument(
        "--filter-seen",
        action=argparse.BooleanOptionalAction,
        help="leave out the items of the user's own history (default: the model's own setting)",
    )
    for name, what in (("exclude", "never recommend these"), ("candidate", "recommend none but these")):
        ranking.add_argument(
            f"--{name}-items", metavar="FILE|ID,ID,...", help=f"{what}: a file of ids, or ids separated by commas"
        )
    add_engine_options(parser)
    files = parser.add_argument_group("output file")
    files.add_argument("--output", metavar="FILE", help="where the lines go (default: stdout)")
    again = files.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted run; begins where there is none")
    again.add_argument("--overwrite", action="store_true", help="replace FILE and any unfinished run towards it")


def run(args: argparse.Namespace) -> int:
    if args.output is None and (args.resume or args.overwrite):
        args.usage_error("--resume and --overwrite need --output FILE")
    path = None if args.output is None else Path(args.output)
    if path is not None:
        check_startable(path, args.resume, args.overwrite)
    engine = load_engine(args)

    from fastdiff.data import id_type_of  # here, not above: it imports torch, which bad usage should not wait for
    from fastdiff.evaluate import default_batch_size

    id_type = id_type_of(engine.catalog)
    sequences = _sequences(args, id_type)
    arguments = _generate_arguments(args, id_type)
    batch_size = default_batch_size(engine) if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise InvalidArgument(f"--batch-size: must be at least 1 (got {batch_size})")
    try:
        n_users = _check_all(sequences, engine)
    except DataError as error:
        raise DataError(f"{error}{_about_blanks(args, id_type)}") from None
    if engine.config.coupled:
        _say(
            f"the users of a batch attend to one another in this model: the order and --batch-size {batch_size} matter"
        )

    before = read_record(path) if path is not None and args.resume else None
    seed = args.seed
    if seed is None:
        seed = secrets.randbits(63) if before is None else before["seed"]
    job = _Job(engine, sequences, n_users, batch_size, seed, arguments, show_progress=not args.no_progress)
    if path is None:
        return _to_stdout(job)
    return _to_file(job, path, args, before)


def _to_stdout(job: _Job) -> int:
    done = 0
    try:
        for lines in job.batches():
            sys.stdout.write("".join(f"{line}\n" for line in lines))
            sys.stdout.flush()
            done += len(lines)
    except KeyboardInterrupt:
        _say(f"interrupted after {done} of {job.n_users} users; with --output FILE a run can be continued")
        return 130
    _say(job.summary(done))
    return 0


def _to_file(job: _Job, path: Path, args: argparse.Namespace, before: dict[str, Any] | None) -> int:
    record = _record(job, args)
    if before is not None:
        check_same(path, before, record)
        users = (sequence.user for sequence in job.sequences)
        part = PartFile.resume(path, users, job.batch_size)
        _say(f"{part.kept} of {job.n_users} users are done, continuing")
    else:
        if args.resume:
            _say("no unfinished run here, beginning one")
        part = PartFile.begin(path, record)
    with part:
        try:
            for lines in job.batches(skip=part.kept):
                part.write(lines)
            part.finish()
        except KeyboardInterrupt:
            words = [word for word in args.argv if word not in ("--resume", "--overwrite")]
            _say(
                f"interrupted: {part.kept + part.written} of {job.n_users} users are kept in {part_of(path)}; "
                f"continue with: fastdiff {shlex.join([*words, '--resume'])}"
            )
            return 130
    _say(f"{job.summary(part.written)}; written to {path}")
    return 0


class _Job:
    """What is to be generated: a run over all users, from any batch on."""

    def __init__(
        self,
        engine: Engine,
        sequences: Iterable[UserSequence],
        n_users: int,
        batch_size: int,
        seed: int,
        arguments: dict[str, Any],
        show_progress: bool,
    ) -> None:
        self.engine, self.sequences, self.n_users = engine, sequences, n_users
        self.batch_size, self.seed, self.arguments = batch_size, seed, arguments
        self._show_progress = show_progress
        self._start = time.perf_counter()

    def batches(self, skip: int = 0) -> Iterator[list[str]]:
        """The JSON lines of batch after batch, without those of the first `skip` users."""
        from tqdm.auto import tqdm

        source = islice(self.sequences, skip, None)
        hidden = None if self._show_progress else True  # None: hidden where stderr is no terminal
        self._start = time.perf_counter()
        with tqdm(total=self.n_users, initial=skip, unit="user", disable=hidden) as bar:
            while batch := list(islice(source, self.batch_size)):
                output = self.engine.generate([sequence.items for sequence in batch], seed=self.seed, **self.arguments)
                yield _lines(batch, output)
                bar.update(len(batch))

    def summary(self, done: int) -> str:
        seconds = time.perf_counter() - self._start
        users = "1 user" if done == 1 else f"{done} users"
        return f"{users} in {seconds:.2f} s ({done / seconds:.0f} per second), seed {self.seed}"


def _lines(batch: list[UserSequence], output: GenerateOutput) -> list[str]:
    import numpy as np

    scores = output.scores.cpu().numpy()
    shown = scores.astype(np.str_)  # the shortest decimal that is the same float32
    item_ids = output.item_ids.tolist()
    lines = []
    for row, (sequence, valid) in enumerate(zip(batch, output.num_valid.tolist(), strict=True)):
        if not np.isfinite(scores[row, :valid]).all():
            raise InvalidArgument(
                f"{sequence.where}: the model gives scores that are not finite; are its weights sound, "
                "and is its --dtype wide enough?"
            )
        values = {
            "user": sequence.user,
            "item_ids": item_ids[row][:valid],
            "scores": [float(score) for score in shown[row, :valid]],
        }
        lines.append(json.dumps(values, ensure_ascii=False))
    return lines


# --- what goes in -----------------------------------------------------------------------------------------------------


def _sequences(args: argparse.Namespace, id_type: IdType) -> Iterable[UserSequence]:
    from fastdiff.data import SequenceFile, UserSequence

    if args.sequences is not None:
        file = SequenceFile(args.sequences, id_type)
        for note in file.notes:
            _say(note)
        return file
    # commas part integers too, as in --exclude-items
    texts = [text.replace(",", " ") for text in args.history] if id_type is int else args.history
    named = ((f"--history {position}", text) for position, text in enumerate(texts, start=1))
    return [UserSequence(where.split()[1], _history(text, id_type, where), where) for where, text in named]


def _history(text: str, id_type: IdType, where: str) -> list[ItemId]:
    """Ids separated by blanks; a text id that holds blanks stands in quotes, as in a shell."""
    from fastdiff.data import parse_items

    if id_type is str and re.search(r"(^|\s)[\"']", text):
        try:
            return list(shlex.split(text))
        except ValueError:
            pass  # without its other half, a quote is a part of its id
    return parse_items(text, id_type, where)


def _generate_arguments(args: argparse.Namespace, id_type: IdType) -> dict[str, Any]:
    return {
        "top_k": args.top_k,
        **sampling_arguments(args),
        "ranking": args.ranking,
        "filter_seen": args.filter_seen,
        "exclude_items": _item_list(args.exclude_items, id_type, "--exclude-items"),
        "candidate_items": _item_list(args.candidate_items, id_type, "--candidate-items"),
    }


def _item_list(value: str | None, id_type: IdType, option: str) -> list[ItemId] | None:
    from fastdiff.data import parse_items, read_items

    if value is None:
        return None
    if os.path.isfile(value):  # unlike Path.is_file, no error where the text is too long to be a name
        return read_items(value, id_type)
    return [item for part in value.split(",") for item in parse_items(part, id_type, option)]


def _check_all(sequences: Iterable[UserSequence], engine: Engine) -> int:
    """Read the whole input once before anything slow: a bad last line should not end a long run. Returns its users."""
    from fastdiff.data import check_known

    source, count = iter(sequences), 0
    while batch := list(islice(source, 4096)):
        check_known(batch, [sequence.items for sequence in batch], engine.catalog, engine.config)
        count += len(batch)
    return count


def _about_blanks(args: argparse.Namespace, id_type: IdType) -> str:
    """What to know of ids with blanks in them, where an unknown id may be a piece of one."""
    if id_type is int or (args.sequences is not None and args.sequences.endswith(".inter")):
        return ""
    if args.sequences is not None:
        return " (ids are separated by white space; a RecBole .inter file, separated by tabs, may hold ids with blanks)"
    if not any(len(text.split()) > 1 for text in args.history):
        return ""
    return """ (ids are separated by white space; one with blanks in it stands in quotes: --history '"an id" other')"""


def _record(job: _Job, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the result depends on."""
    import fastdiff
    from fastdiff.checkpoint import NATIVE_FILES

    folder = Path(args.folder)
    if args.sequences is not None:
        source = digest([Path(args.sequences)])
    else:
        source = hashlib.sha256(json.dumps(args.history).encode()).hexdigest()[:16]
    return {
        "fastdiff": fastdiff.__version__,
        "model (contents)": digest([file for name in sorted(NATIVE_FILES) if (file := folder / name).is_file()]),
        "input (contents)": source,
        "seed": job.seed,
        "batch_size": job.batch_size,
        **job.arguments,
        "device": job.engine.device.type,
        "dtype": str(job.engine.model.dtype).removeprefix("torch."),
        "backends": job.engine.backends,
    }


def _say(message: str) -> None:
    print(f"fastdiff: {message}", file=sys.stderr)
