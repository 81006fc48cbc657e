"""How good a model is on new simulated users, against the best that any model can reach under the law."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from fastdiff.demo.simulate import (
    Floats,
    Ints,
    Law,
    best_hit_rate,
    build_catalogue,
    build_law,
    expected_hit_rate,
    simulate_users,
)
from fastdiff.engine import Engine

LONGEST = 10


@dataclass(frozen=True)
class Users:
    """Simulated users: the first `lengths[b]` of `items[b]` (`[B, L + 1]`) are the history, the next is the answer."""

    items: Ints
    lengths: Ints

    @property
    def answers(self) -> Ints:
        return self.items[np.arange(len(self.items)), self.lengths]

    def histories(self) -> list[list[str]]:
        """External ids, as the engine takes them."""
        names = build_catalogue().names
        return [[names[item] for item in row[:n]] for row, n in zip(self.items, self.lengths, strict=True)]

    def probabilities(self, law: Law) -> Floats:
        return law.next_item(self.items[:, :-1], self.lengths)


def draw_users(law: Law, n_users: int, seed: int) -> Users:
    """Users with histories of 1 to 10 items, every length as likely."""
    lengths = np.random.default_rng([seed, 1]).integers(1, LONGEST + 1, n_users)
    return Users(simulate_users(law, n_users, LONGEST + 1, seed), lengths)


def numbers_of(names: object) -> Ints:
    """Item numbers of an array of names, any shape."""
    number = {name: i for i, name in enumerate(build_catalogue().names)}
    array = np.asarray(names, dtype=object)
    return np.array([number[name] for name in array.ravel()], dtype=np.int64).reshape(array.shape)


@dataclass(frozen=True)
class Measured:
    """HR@k of one model on one set of users.

    hit_rate  the share of users whose next item was among the k recommended
    expected  the same in expectation over the law: the mean mass of the k recommended items
    best      the highest value of `expected` that any model can have
    """

    k: int
    n_users: int
    hit_rate: float
    expected: float
    best: float
    seconds: float

    @property
    def share_of_best(self) -> float:
        return self.expected / self.best

    def __str__(self) -> str:
        return (
            f"HR@{self.k} {self.hit_rate:.3f} (in expectation {self.expected:.3f}, which is {self.share_of_best:.1%} "
            f"of the {self.best:.3f} that the best possible model reaches)"
        )


def measure(engine: Engine, n_users: int, seed: int, k: int = 10) -> Measured:
    """Recommend to `n_users` new users and compare with the law. `seconds` is the time of the recommendations alone,
    after one call that warms PyTorch up."""
    law = build_law()
    users = draw_users(law, n_users, seed)
    histories = users.histories()
    engine.generate(histories[:1], top_k=k, seed=seed)
    started = time.perf_counter()
    outputs = list(engine.generate_batches(histories, top_k=k, seed=seed, request_ids=range(n_users)))
    seconds = time.perf_counter() - started

    recommended = numbers_of(np.concatenate([output.item_ids for output in outputs]))
    probabilities = users.probabilities(law)
    return Measured(
        k=k,
        n_users=n_users,
        hit_rate=float((recommended == users.answers[:, None]).any(axis=1).mean()),
        expected=expected_hit_rate(probabilities, recommended),
        best=best_hit_rate(probabilities, k),
        seconds=seconds,
    )
