"""`fastdiff convert`: from the authors' files to a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdiff.cli.options import new_parser
from fastdiff.errors import InvalidArgument

_DESCRIPTION = """\
Turn a checkpoint of the authors' code into a model folder: config.json, generation_config.json, model.safetensors.

  fastdiff convert --method adrec --weights best.pth --settings config.yaml --output my-model

Nothing in a file is executed. What neither the weights nor the settings tell is named, and nothing is written.
"""


def add_parser(commands: Any) -> None:
    parser = new_parser(commands, run, "convert", "turn the authors' checkpoint into a model folder", _DESCRIPTION)
    parser.add_argument("--method", required=True, help="adrec, tarec, dreamrec, cddrec or dimerec")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a state dict: .safetensors, .pth or .pt")
    parser.add_argument(
        "--settings",
        required=True,
        metavar="FILE",
        help="the authors' own settings: .yaml, .json, or a text file with the Namespace(...) that argparse prints",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the model folder to write")
    parser.add_argument(
        "--item-ids",
        metavar="FILE",
        help="your ids of the items, in row order: one per line, or a JSON list (default: row numbers)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that exists")


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if not args.overwrite and output.is_dir() and any(output.iterdir()):
        raise InvalidArgument(
            f"--output: {output} exists and is not empty; give another name, or --overwrite to replace it"
        )

    from fastdiff.checkpoint import convert

    checkpoint = convert(args.method, args.weights, args.settings, output, args.item_ids)
    config = checkpoint.config
    first = config.first_item_row
    ids = f"ids {first}..{first + config.n_items - 1}" if checkpoint.item_ids is None else "ids of your own"
    print(
        f"{output}: {config.method}, {config.n_items} items ({ids}, pad {config.pad_id}), D = {config.hidden_size}, "
        f"window {config.max_seq_len}"
    )
    for file in sorted(output.iterdir()):
        print(f"  {file.name:<24}{file.stat().st_size:>12,} bytes")
    print("Use it:")
    print(f'  python:  fastdiff.from_pretrained("{output}").generate([[...]], top_k=10)')
    print(f'  shell:   fastdiff generate {output} --history "ID ID ID"')
    print(f"           fastdiff evaluate {output} sequences.txt")
    return 0
