"""`fastdiff train`: a paper's recipe on a file of sequences, to a folder that `from_pretrained` loads."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import new_parser
from fastdiff.errors import InvalidArgument

if TYPE_CHECKING:
    from fastdiff.train.data import Source
    from fastdiff.train.run_folder import RunFolder

_DESCRIPTION = """\
Train a model by its paper's recipe, with validation by the fast engine and early stopping.

  fastdiff train adrec sequences.txt --output runs/adrec
  fastdiff train --resume --output runs/adrec
  fastdiff train tarec office.inter --preset amazon-office --set num_train_timesteps=500 --output runs/tarec --seed 1
  fastdiff train adrec --show-settings

DATA holds one user per line, `user item item ...`, oldest item first; or it is a RecBole .inter file. The last item of
each user is tested on, the one before it validated on (--split says otherwise). RUN/model is the result: give it to
`fastdiff evaluate` and `fastdiff generate`. Beside it: log.csv, steps.csv, training.png, result.json, and the state of
the run. Whatever ends a run, a kill too, --resume goes on with it, on the same number of threads to the same result:
the run remembers its method, data, settings and seed.

method: adrec, tarec, dreamrec, cddrec, dimerec; and sasrec, a discriminative yardstick that the engine does not run.
"""


def add_parser(commands: Any) -> None:
    parser = new_parser(commands, run, "train", "train a model by its paper's recipe", _DESCRIPTION)
    parser.add_argument("method", nargs="?", help="adrec, tarec, dreamrec, cddrec, dimerec or sasrec")
    parser.add_argument("data", nargs="?", help="a sequence file or a RecBole .inter file")
    parser.add_argument("--output", metavar="RUN", help="folder of the run; must be new, or be given with --resume")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output; begins where there is none"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes; --resume goes on")
    data = parser.add_argument_group("the data")
    data.add_argument(
        "--split",
        choices=("leave-one-out", "chronological"),
        help="chronological: 8:1:1 by the users' last interactions, of .inter files (default: leave-one-out)",
    )
    data.add_argument("--text-ids", action="store_true", default=None, help="items are text, not integers")
    data.add_argument("--min-interactions", type=int, metavar="N", help="leave rarer items out, first")
    data.add_argument("--min-items", type=int, metavar="N", help="leave users with fewer items out, then")
    data.add_argument(
        "--until-stable", action="store_true", default=None, help="both again until nothing more is left out"
    )
    recipe = parser.add_argument_group("the recipe")
    recipe.add_argument("--preset", metavar="NAME", help="settings that ship with fastdiff, named after a data set")
    recipe.add_argument("--settings", metavar="FILE", help="a YAML file of settings")
    recipe.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting; may be repeated")
    recipe.add_argument("--show-settings", action="store_true", help="print the settings and presets, and do nothing")
    recipe.add_argument("--seed", type=int, help="one seed, one result (default: 2025)")
    recipe.add_argument(
        "--all-steps",
        action="store_true",
        default=None,
        help="the model's default sampler is the paper's, not the one of fewest steps that is as accurate",
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: cpu)")
    machine.add_argument("--precision", help="float32, or bfloat16: autocast (default: float32)")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    machine.add_argument("--no-progress", action="store_true", help="no progress bar on stderr")


def run(args: argparse.Namespace) -> int:
    import torch

    from fastdiff.train.data import describe
    from fastdiff.train.recipe import Settings
    from fastdiff.train.run import recipe_class, train
    from fastdiff.train.run_folder import SETTINGS, RunFolder
    from fastdiff.train.settings_file import load_settings, parse_assignments, presets
    from fastdiff.train.trainer import Interrupted

    if args.output is None and not args.show_settings:
        args.usage_error("--output is needed")
    folder = RunFolder(args.output or "")
    begun: dict[str, Any] = {}
    if not args.show_settings:
        folder.check(args.resume)  # before minutes go into reading
        begun = folder.record() if folder.exists() else {}
        if args.resume and not begun and None in (args.method, args.data):
            raise InvalidArgument(
                f"--resume: there is no run in {args.output} to go on with; give the folder of one, or METHOD and DATA "
                "to begin one there"
            )
    method: str = args.method or begun.get("method", "")
    if not method:
        args.usage_error("METHOD is needed: adrec, tarec, dreamrec, cddrec, dimerec or sasrec")
    if args.resume and args.data is None and args.method is not None and Path(args.method).is_file():
        raise InvalidArgument(
            f"--resume: {args.method} is a file where METHOD stands; give both, METHOD first: fastdiff train "
            f"{begun.get('method', 'METHOD')} {args.method} --resume --output {args.output}"
        )
    kind = recipe_class(method)
    same = method == begun.get("method") and args.preset is None  # which says all settings, and is compared
    own = {name.removeprefix(SETTINGS): begun[name] for name in begun if same and name.startswith(SETTINGS)}
    settings = load_settings(method, kind.Settings, args.preset, args.settings, parse_assignments(args.set), own)
    if args.show_settings:
        for one in reversed(kind.Settings.__mro__):  # TA-Rec's settings are DreamRec's and its own
            if issubclass(one, Settings) and one is not Settings:
                print(f"{inspect.getdoc(one)}\n")
        for name, value in dataclasses.asdict(settings).items():
            print(f"{name} = {value}")
        for name, values in presets(method).items():
            print(
                f"preset {name}: {', '.join(f'{field}={value}' for field, value in values.items()) or 'the defaults'}"
            )
        return 0
    if args.threads is not None:
        if args.threads < 1:
            raise InvalidArgument(f"--threads: must be at least 1 (got {args.threads})")
        torch.set_num_threads(args.threads)

    def say(line: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stderr)

    source = _source(args, folder)
    if args.data is None and not Path(source.path).exists():
        raise InvalidArgument(
            f"--resume: the data of this run were {source.path}, which is not there; if they have moved, say where to: "
            f"fastdiff train {method} DATA --resume --output {args.output}"
        )
    data = source.read()
    for line in describe(data):
        say(line)

    def chosen(name: str, default: Any) -> Any:
        given = getattr(args, name)
        return begun.get(name, default) if given is None else given

    seed = chosen("seed", 2025)
    say(f"run           {method}, seed {seed}, in {args.output}")
    named = [name for name in presets(method) if name != "default"]
    given = args.preset is not None or args.settings is not None or args.set
    if begun and not given:
        say("settings      those that the run was begun with")
    elif not given and named:
        say(f"settings      the defaults; others, each for the data set of its name, with --preset {', '.join(named)}")
    elif args.preset is not None:
        say(f"settings      preset {args.preset}")

    try:
        result = train(
            method,
            data,
            args.output,
            settings,
            seed=seed,
            device=chosen("device", "cpu"),
            precision=chosen("precision", "float32"),
            resume=args.resume,
            minutes=args.minutes,
            all_steps=chosen("all_steps", False),
            show_progress=not args.no_progress,
            say=say,
        )
    except Interrupted as stopped:
        print(f"fastdiff: {stopped}", file=sys.stderr)
        return 130
    print(report(args.output, source.path, result))
    return 0


def _source(args: argparse.Namespace, folder: RunFolder) -> Source:
    """Where the data are: as given, else as the run was begun with."""
    from fastdiff.train.data import Source
    from fastdiff.train.run_folder import SOURCE_FILE

    begun = folder.source() or {}
    path = args.data or begun.get("path")
    if path is None:
        args.usage_error(
            f"DATA is needed: {folder.path} does not say where its data were read"
            if folder.exists()
            else "DATA is needed"
        )
    given = {
        name: getattr(args, name) for name in ("split", "text_ids", "min_items", "min_interactions", "until_stable")
    }
    try:
        return Source(**{**begun, **{name: value for name, value in given.items() if value is not None}, "path": path})
    except TypeError as error:
        raise InvalidArgument(
            f"--resume: {folder.path / SOURCE_FILE} is not as fastdiff wrote it ({error}); delete it and give DATA"
        ) from error


def report(folder: str, data: str, result: dict[str, Any]) -> str:
    """The figures of a finished run, and what to do with it."""
    epochs = ", ".join(f"{stage} {epoch}" for stage, epoch in result["epochs"].items())
    lines = [f"{result['method']}: {result['parameters']:,} weights, epochs: {epochs}, {result['seconds']:,.0f} s", ""]
    lines.append("per cent  " + "".join(f"{name:>9}" for name in ("HR@5", "HR@10", "HR@20", "NDCG@10", "NDCG@20")))
    for split in ("valid", "test"):
        values = result[split]
        cells = "".join(f"{100 * values[name]:>9.2f}" for name in ("HR@5", "HR@10", "HR@20", "NDCG@10", "NDCG@20"))
        lines.append(f"{split:<10}{cells}")
    if "sampler" in result:  # a model that the engine runs
        lines += ["", *_sampler_lines(result), "", f"fastdiff evaluate {folder}/model {data}"]
    return "\n".join(lines)


def _sampler_lines(result: dict[str, Any]) -> list[str]:
    """The model's default sampler, beside the paper's where that is another."""
    from fastdiff.sampler import Sampler

    chosen, paper = (Sampler(one["scheduler"], one["steps"]) for one in (result["sampler"], result["paper_sampler"]))
    if chosen == paper:
        return [f"sampler: {chosen}"]
    figures = [
        "HR@20 {HR@20:.2f} %, NDCG@20 {NDCG@20:.2f} %".format_map(
            {k: 100 * v for k, v in result[name]["valid"].items()}
        )
        for name in ("sampler", "paper_sampler")
    ]
    given = ", ".join(f"{name}={value!r}" for name, value in paper.arguments.items())
    return [
        f"sampler: {chosen}, in valid {figures[0]}; the paper's ({paper}): {figures[1]}",
        f"         generate({given}) runs the paper's; --all-steps makes it the default",
    ]
