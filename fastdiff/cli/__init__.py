"""The command line: `fastdiff generate | evaluate | train | convert | env`.

Results go to stdout, everything that is said about them to stderr. Exit codes: 0 done, 2 what was given is wrong (one
line says what), 130 interrupted. A command is only a thin layer: it calls what a Python user would call.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import fastdiff
from fastdiff.cli import convert, env, evaluate, generate, train
from fastdiff.errors import FastdiffError

COMMANDS = (generate, evaluate, train, convert, env)

_DESCRIPTION = """\
Recommendations from diffusion-based sequential recommenders: ADRec, TA-Rec, CDDRec, DimeRec, DreamRec.

  fastdiff convert  --method adrec --weights best.pth --settings config.yaml --output my-model
  fastdiff generate my-model --history "3 17 256"
  fastdiff evaluate my-model sequences.txt
  fastdiff train    tarec sequences.txt --output runs/tarec
  fastdiff env
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdiff", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fastdiff {fastdiff.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name; None takes sys.argv's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    args.argv = argv
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (such as `head`) has seen enough; keep the interpreter from writing once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FastdiffError as error:
        return _refuse(" ".join(str(error).splitlines()))
    except OSError as error:
        return _refuse(f"{error.filename or 'files'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return 130


def _refuse(message: str) -> int:
    print(f"fastdiff: {message}", file=sys.stderr)
    return 2
