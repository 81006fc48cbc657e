"""`fastdiff evaluate`: metrics on held-out items, with the policy behind them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.cli.options import (
    add_engine_options,
    add_sampling_options,
    load_engine,
    new_parser,
    sampling_arguments,
)

if TYPE_CHECKING:
    from fastdiff.data import InstanceFile, LeaveOneOut
    from fastdiff.engine import Engine
    from fastdiff.evaluate import EvaluationResult

_DESCRIPTION = """\
Hold out one item of each user, recommend from the items before it, and see where it stands: HR and NDCG at 5, 10, 20,
MRR, the share of the catalogue that is recommended to anybody, and the time that it took.

  fastdiff evaluate my-model sequences.txt
  fastdiff evaluate my-model sequences.txt --ranking clean --split valid --json

The data is a sequence file (`user item item ...` per line, oldest first) or a RecBole .inter file, of which the last
item of each user is the test target and the one before it the validation target; or an .npz file of instances with the
integer arrays history [B, L], history_len [B] and target [B]. The same command gives the same numbers.
"""


def add_parser(commands: Any) -> None:
    parser = new_parser(commands, run, "evaluate", "HR, NDCG, MRR and coverage on held-out items", _DESCRIPTION)
    parser.add_argument("folder", help="a model folder, as `fastdiff convert` or save_pretrained wrote it")
    parser.add_argument("data", help="a sequence file, a RecBole .inter file, or an .npz file of instances")
    parser.add_argument(
        "--ranking",
        choices=("published", "clean"),
        default="published",
        help="published: candidates and seen items as the authors rank; clean: real items only (default: published)",
    )
    parser.add_argument(
        "--filter-seen",
        action=argparse.BooleanOptionalAction,
        help="of the clean ranking: leave out the items of the user's history (default: the model's own setting)",
    )
    parser.add_argument("--split", choices=("test", "valid"), help="which item is held out (default: test)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N users")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--batch-size", type=int, metavar="B", help="users at a time (default: 256; coupled CDDRec: 128)"
    )
    parser.add_argument(
        "--average",
        choices=("users", "batches"),
        default="users",
        help="batches: the mean of the batches' means; needs --batch-size (ADRec's authors: 512) (default: users)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else there")
    add_sampling_options(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    engine = load_engine(args)

    from fastdiff.data import InstanceFile, LeaveOneOut, SequenceFile, id_type_of
    from fastdiff.evaluate import evaluate

    instances: InstanceFile | LeaveOneOut
    notes: list[str] = []
    if Path(args.data).suffix == ".npz":
        if args.split is not None:
            args.usage_error("--split belongs to files of sequences; an .npz file holds one split")
        instances = InstanceFile(args.data)
    else:
        file = SequenceFile(args.data, id_type_of(engine.catalog))
        instances, notes = LeaveOneOut(file, args.split or "test"), file.notes
    for note in notes:
        print(f"fastdiff: {note}", file=sys.stderr)
    result = evaluate(
        engine,
        instances,
        ranking=args.ranking,
        batch_size=args.batch_size,
        seed=args.seed,
        filter_seen=args.filter_seen,
        limit=args.limit,
        show_progress=not args.no_progress,
        average=args.average,
        **sampling_arguments(args),
    )
    facts = _facts(args, engine, instances, result, notes)
    print(json.dumps(facts, allow_nan=False) if args.json else _report(facts))
    return 0


def _facts(
    args: argparse.Namespace,
    engine: Engine,
    instances: InstanceFile | LeaveOneOut,
    result: EvaluationResult,
    notes: list[str],
) -> dict[str, Any]:
    given = {name: value for name, value in sampling_arguments(args).items() if value is not None}
    return {
        "model": args.folder,
        "method": engine.config.method,
        "data": args.data,
        "split": getattr(instances, "split", None),
        "users": result.users,
        "skipped_users": result.skipped,
        "items": result.items,
        "catalogue_items": engine.catalog.n_items,
        "fewest_items": getattr(instances, "min_items", None),
        "notes": notes,
        "ranking": args.ranking,
        "policy": result.policy,
        "arguments": given,
        "generation_config": engine.generation_config.to_dict(),
        "seed": result.seed,
        "batch_size": result.batch_size,
        "average": result.average,
        "device": str(engine.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "backends": engine.backends,
        "own_sampler": _own_sampler(engine),
        "metrics": result.metrics,
        "standard_errors": result.standard_errors,
        "seconds": result.seconds,
        "histories_per_second": result.histories_per_second,
        "timings": result.timings,
    }


def _own_sampler(engine: Engine) -> str:
    """What runs where neither scheduler nor number of steps is given: "ddpm, 1 of 32 steps"."""
    from fastdiff.sampler import Sampler

    sampler, total = Sampler.of(engine.generation_config, engine.config), engine.config.schedule.num_train_timesteps
    if sampler.scheduler == "one_step":
        return sampler.scheduler
    return f"{sampler.scheduler}, {sampler.steps} of {total} steps"


def _report(facts: dict[str, Any]) -> str:
    split = "" if facts["split"] is None else f", split {facts['split']}"
    skipped = ""
    if facts["skipped_users"]:
        skipped = f" ({facts['skipped_users']} more skipped: fewer than {facts['fewest_items']} items)"
    backends = ", ".join(sorted(set(facts["backends"].values())))
    given = ", ".join(f"{name} {value}" for name, value in facts["arguments"].items())
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in facts["timings"].items())
    lines = [
        f"model   {facts['model']} ({facts['method']}), {facts['dtype']} on {facts['device']}, backend {backends}",
        f"data    {facts['data']}{split}: {facts['users']:,} users{skipped}, "
        f"{facts['items']:,} items (the model's catalogue: {facts['catalogue_items']:,})",
        *(f"        {note}" for note in facts["notes"]),
        f"        sampling: {f'{given}, else ' if given else ''}the model's own settings ({facts['own_sampler']})",
        *(f"        {line}" for line in facts["policy"]),
        "",
        *_table(facts["metrics"], facts["standard_errors"]),
        "",
        f"time    {facts['seconds']:.2f} s, {facts['histories_per_second']:.0f} histories per second ({stages})",
    ]
    return "\n".join(lines)


def _table(metrics: dict[str, float], errors: dict[str, float]) -> list[str]:
    cuts = [name.removeprefix("HR@") for name in metrics if name.startswith("HR@")]
    lines = ["per cent" + "".join(f"{'@' + cut:>10}" for cut in cuts)]
    for name, values in (("HR", metrics), ("+-", errors), ("NDCG", metrics), ("coverage", metrics)):
        key = "HR" if values is errors else name
        cells = "".join(f"{100 * values[f'{key}@{cut}']:>10.2f}" for cut in cuts)
        lines.append(f"{name:<8}{cells}" + ("   (standard error of HR)" if values is errors else ""))
    lines.append(f"{'MRR':<8}" + " " * 10 * (len(cuts) - 1) + f"{100 * metrics[f'MRR@{cuts[-1]}']:>10.2f}")
    return lines
