"""Trains the models that the demo ships: `python -m fastdiff.demo.train METHOD --output RUN`, minutes on one CPU core.

Each method by its own recipe (`fastdiff.train`) with the settings "simulated", on 60,000 simulated users. The demo's
own users, and those of the tests, come from other seeds than these. RUN/model is the result; a run that was stopped
goes on with --resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import fastdiff
from fastdiff.checkpoint import MODEL_FOLDER
from fastdiff.data import Instance
from fastdiff.demo.measure import LONGEST, draw_users, measure
from fastdiff.demo.simulate import build_catalogue, build_law, simulate_users
from fastdiff.train.data import TrainingData
from fastdiff.train.run import recipe_class, train
from fastdiff.train.settings_file import load_settings

METHODS = ("tarec", "dreamrec", "adrec", "cddrec", "dimerec")
N_USERS = 60_000
TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 1, 2, 3
SEES_PADS = ("adrec", "cddrec")
"""Methods whose users' positions and pads depend on how long the history is: they have to see short ones too."""


def simulated_data(method: str, n_users: int = N_USERS, n_held_out: int = 5000) -> TrainingData:
    """Users to learn from, all of whose items are targets, and others to validate and test on.

    Each training user has eleven items; for the methods of `SEES_PADS` from 3 to 11, every number as likely.
    """
    names = build_catalogue().names
    sequences = list(simulate_users(build_law(), n_users, LONGEST + 1, TRAINING_SEED))
    if method in SEES_PADS:
        lengths = np.random.default_rng([TRAINING_SEED, 1]).integers(3, LONGEST + 2, n_users)
        sequences = [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)]
    valid, test = (_instances(n_held_out, seed) for seed in (VALIDATION_SEED, TEST_SEED))
    return TrainingData(names, sequences, valid, test)


def _instances(n_users: int, seed: int) -> list[Instance]:
    users, names = draw_users(build_law(), n_users, seed), build_catalogue().names
    rows = zip(users.histories(), users.answers, strict=True)
    return [
        Instance(str(user), list(history), names[answer], f"simulated user {user}")
        for user, (history, answer) in enumerate(rows)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    arguments = parser.parse_args(argv)
    method = arguments.method
    torch.set_num_threads(1)
    settings = load_settings(method, recipe_class(method).Settings, preset="simulated")
    train(method, simulated_data(method), arguments.output, settings, resume=arguments.resume)
    print(f"on new users: {measure(fastdiff.from_pretrained(arguments.output / MODEL_FOLDER), 5000, VALIDATION_SEED)}")


if __name__ == "__main__":
    main()
