"""Trains the model that the demo ships: `python -m fastdiff.demo.train --output FOLDER`, minutes on one CPU core.

60,000 simulated users of eleven items each; every item is the target of the items before it. Stage 1 learns
everything, stage 2 the denoiser alone (`network.py` has the losses). What the paper does not have, or not so:

  - a cross-entropy term in stage 1, by far the heaviest, and a stop-gradient on the target of the reconstruction, since
    the item table is learned along. After 800 steps on 20,000 users, as share of the best possible HR@10: the paper's
    stage 1 alone 14 % (the table shrinks towards 0), with the stop-gradient 61 %, with the cross-entropy 82 %, with
    both 84 %;
  - stage 2 is the paper's, and hardly matters here: a random item is an easy negative after a cross-entropy over the
    whole catalogue.

The demo's own users, and those of the tests, come from other seeds than these.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoint import Checkpoint, write_folder
from fastdiff.config import TARecConfig, default_generation_config
from fastdiff.demo.measure import measure
from fastdiff.demo.network import LossWeights, TARecNetwork, preference_loss, pretraining_loss
from fastdiff.demo.simulate import build_catalogue, build_law, simulate_users
from fastdiff.engine import Engine
from fastdiff.schedule import ScheduleConfig

WINDOW = 10
TRAINING_SEED, VALIDATION_SEED = 1, 2


@dataclass(frozen=True)
class Recipe:
    """Steps, batch sizes and learning rates of the two stages."""

    steps: int = 6000
    learning_rate: float = 5e-3
    preference_steps: int = 200
    preference_learning_rate: float = 3e-4
    batch_size: int = 256
    weights: LossWeights = field(default_factory=LossWeights)


def demo_config() -> TARecConfig:
    """D = 64 and a chain of 1000 steps, at whose end 4e-5 of the signal's variance is left."""
    return TARecConfig(
        n_items=len(build_catalogue()),
        hidden_size=64,
        max_seq_len=WINDOW,
        schedule=ScheduleConfig("linear", 1000, "float32"),
        denoiser="mlp2",
    )


def train(
    config: TARecConfig,
    sequences: Tensor,
    recipe: Recipe,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> TARecNetwork:
    """Both stages on `sequences [users, L + 1]`; `report` is called with (step, loss) after each step of either."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TARecNetwork(config)
        alphas_cumprod = config.schedule.build().alphas_cumprod

        def batch() -> Tensor:
            return sequences[torch.randint(0, len(sequences), (recipe.batch_size,))]

        optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
        )
        for step in range(recipe.steps):
            loss = pretraining_loss(network, alphas_cumprod, batch(), recipe.weights)
            _descend(optimizer, loss)
            schedule.step()
            if report is not None:
                report(step, loss.item())

        reference = copy.deepcopy(network)
        denoiser = nn.ModuleList([network.diffuser, network.step_mlp])
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.preference_learning_rate)
        for step in range(recipe.preference_steps):
            loss = preference_loss(network, reference, alphas_cumprod, batch())
            _descend(optimizer, loss)
            if report is not None:
                report(recipe.steps + step, loss.item())
    return network


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def as_checkpoint(network: TARecNetwork, item_ids: Sequence[str] | None = None) -> Checkpoint:
    """The trained network, sampled in one step by default; `item_ids` None: items go by their numbers."""
    weights = {name: weight.detach() for name, weight in network.state_dict().items()}
    return Checkpoint(network.config, default_generation_config(network.config), weights, item_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--users", type=int, default=60_000, help="simulated users to train on (default 60000)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help=f"steps of stage 1 (default {Recipe.steps})")
    arguments = parser.parse_args()

    sequences = torch.from_numpy(simulate_users(build_law(), arguments.users, WINDOW + 1, TRAINING_SEED))
    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        if (step + 1) % 500 == 0:
            print(f"step {step + 1:5d}  loss {loss:.3f}  {time.perf_counter() - started:.0f} s", flush=True)

    network = train(demo_config(), sequences, Recipe(steps=arguments.steps), report=report)
    checkpoint = as_checkpoint(network, build_catalogue().names)
    write_folder(arguments.output, checkpoint)
    measured = measure(Engine.from_checkpoint(checkpoint), n_users=5000, seed=VALIDATION_SEED)
    print(f"{time.perf_counter() - started:.0f} s of training; on new users: {measured}")


if __name__ == "__main__":
    main()
