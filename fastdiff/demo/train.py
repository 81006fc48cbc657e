"""Trains the model that the demo ships: `python -m fastdiff.demo.train --output RUN`, minutes on one CPU core.

TA-Rec's recipe (`fastdiff.train.tarec`) with its settings "demo", on 60,000 simulated users of eleven items each. The
demo's own users, and those of the tests, come from other seeds than these. RUN/model is the result; a run that was
stopped goes on with --resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fastdiff
from fastdiff.data import Instance
from fastdiff.demo.measure import LONGEST, draw_users, measure
from fastdiff.demo.simulate import build_catalogue, build_law, simulate_users
from fastdiff.train.data import TrainingData
from fastdiff.train.run import train
from fastdiff.train.run_folder import MODEL_FOLDER
from fastdiff.train.settings_file import load_settings
from fastdiff.train.tarec import TARecSettings

N_USERS = 60_000
TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 1, 2, 3


def simulated_data(n_users: int = N_USERS, n_held_out: int = 5000) -> TrainingData:
    """Users to learn from, all of whose items are targets, and others to validate and test on."""
    names = build_catalogue().names
    sequences = list(simulate_users(build_law(), n_users, LONGEST + 1, TRAINING_SEED))
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
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = load_settings("tarec", TARecSettings, preset="demo")
    train("tarec", simulated_data(), arguments.output, settings, resume=arguments.resume)
    print(f"on new users: {measure(fastdiff.from_pretrained(arguments.output / MODEL_FOLDER), 5000, VALIDATION_SEED)}")


if __name__ == "__main__":
    main()
