"""Options that `generate` and `evaluate` share, and the engine that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.engine import Engine

SAMPLING = ("num_inference_steps", "scheduler", "eta", "guidance_scale", "num_samples", "aggregation")
"""Options handed to `Engine.generate` as they are; None means the model's own setting."""

_MODEL_SETTING = "(default: the model's own setting)"


def new_parser(
    commands: Any, run: Callable[[argparse.Namespace], int], name: str, summary: str, description: str
) -> argparse.ArgumentParser:
    """A command's parser; options must be written out, since an interrupted run repeats them in its advice."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, usage_error=parser.error)
    return parser


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the machine")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cpu)")
    group.add_argument(
        "--dtype",
        help="arithmetic of the model: float32, float64, bfloat16 or float16 (default: float32); ranking stays exact",
    )
    group.add_argument(
        "--backend",
        default="auto",
        help="auto, torch, cpu, triton or cuda; a named one either runs or says why it cannot (default: auto)",
    )
    group.add_argument("--no-progress", action="store_true", help="no progress bar on stderr")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-inference-steps", type=int, metavar="S", help=f"denoising steps {_MODEL_SETTING}")
    group.add_argument("--scheduler", metavar="NAME", help=f"ddpm, ddim, one_step or closed_form {_MODEL_SETTING}")
    group.add_argument("--eta", type=float, help=f"noise of ddim: 0 is deterministic, 1 is like ddpm {_MODEL_SETTING}")
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help=f"classifier-free guidance u + G (c - u), 1 is off {_MODEL_SETTING}",
    )
    group.add_argument("--num-samples", type=int, metavar="M", help=f"generated embeddings per user {_MODEL_SETTING}")
    group.add_argument("--aggregation", metavar="HOW", help=f"of their scores: max or mean {_MODEL_SETTING}")


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING}


def load_engine(args: argparse.Namespace) -> Engine:
    # imported here: `fastdiff --help` and bad usage should not wait for torch
    from fastdiff.config import DTYPES
    from fastdiff.errors import InvalidArgument
    from fastdiff.loading import from_pretrained

    if args.dtype is not None and args.dtype not in DTYPES:
        raise InvalidArgument(f"--dtype: must be one of {', '.join(DTYPES)} (got {args.dtype!r})")
    return from_pretrained(args.folder, device=args.device, dtype=args.dtype, backend=args.backend)
