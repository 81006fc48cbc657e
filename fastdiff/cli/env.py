"""`fastdiff env`: what this installation is and can do."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastdiff.cli.options import new_parser

_DESCRIPTION = """\
Versions, devices, how the C++ parts were built, and for each backend: yes, or why not. Put it into bug reports.

  fastdiff env
  fastdiff env --json
"""


def add_parser(commands: Any) -> None:
    parser = new_parser(commands, run, "env", "versions, devices, each backend: yes, or why not", _DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    from fastdiff.env import collect, report

    facts = collect()
    print(json.dumps(facts) if args.json else report(facts))
    return 0
