"""A recipe so small that the trainer can be tested with it, and data for it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data import UserSequence
from fastdiff.train.data import TrainingData, leave_one_out
from fastdiff.train.recipe import QueryModel, Recipe, Settings, Stage

DIM = 8


@dataclass(frozen=True)
class TinySettings(Settings):
    """epochs of both stages; learning_rate; clip_norm of the second stage; patience of the second stage"""

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 0.01
    patience: int | None = None
    clip_norm: float | None = None
    poison_after: int | None = None


class Tiny(Recipe):
    """The last item, after dropout, predicts the next one. Stage "table" trains the embeddings, "map" the matrix."""

    method = "tiny"
    Settings = TinySettings

    def __init__(self, settings: TinySettings, data: TrainingData) -> None:
        super().__init__(settings, data)
        self.items = nn.Embedding(data.n_items, DIM)
        self.map = nn.Linear(DIM, DIM)
        self.reference = nn.Linear(DIM, DIM).requires_grad_(False)
        self.calls = 0
        self.pairs = torch.tensor([pair for row in data.sequences for pair in pairwise(row)])

    def stages(self) -> Sequence[Stage]:
        own, options = self.settings, {"cosine_epochs": 4}
        return [
            Stage("table", own.epochs, own.batch_size, own.learning_rate, watch=("HR@5",), **options),
            Stage(
                "map",
                own.epochs,
                own.batch_size,
                own.learning_rate,
                "adamw",
                patience=own.patience,
                clip_norm=own.clip_norm,
                watch=("HR@5",),
            ),
        ]

    def n_examples(self, stage: Stage) -> int:
        return len(self.pairs)

    def enter(self, stage: Stage) -> None:
        if stage.name == "map":
            self.reference.load_state_dict(self.map.state_dict())

    def trained(self, stage: Stage) -> Iterable[nn.Parameter]:
        return self.items.parameters() if stage.name == "table" else self.map.parameters()

    def losses(self, stage: Stage, examples: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        last, following = self.pairs[examples].unbind(1)
        query = self.map(F.dropout(self.items(last), 0.3, self.training))
        loss = F.cross_entropy(query @ self.items.weight.T, following)
        if self.settings.poison_after is not None and self.calls > self.settings.poison_after:
            loss = loss * torch.nan
        drift = 0.01 * (self.map.weight - self.reference.weight).square().sum()
        return {"ce": loss, "drift": drift}

    def model(self, stage: Stage) -> QueryModel:
        def encode(histories: Sequence[Sequence[int]]) -> Tensor:
            return self.map(self.items(torch.tensor([history[-1] for history in histories])))

        return QueryModel(encode, self.items.weight)


def walks(n_users: int = 40, n_items: int = 30, length: int = 8, seed: int = 0) -> list[UserSequence]:
    """Users who step through the items one by one, or two by two: something that can be learned."""
    rng = np.random.default_rng(seed)
    users = []
    for user in range(n_users):
        steps = rng.integers(1, 3, length).cumsum() + rng.integers(0, n_items)
        users.append(UserSequence(str(user), [int(step) % n_items for step in steps], f"walks:{user + 1}"))
    return users


def tiny_data() -> TrainingData:
    return leave_one_out(walks())
