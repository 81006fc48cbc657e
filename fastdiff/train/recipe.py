"""What a training recipe is. A paper's file fills this in; `trainer.py` runs it.

A recipe is an `nn.Module` that holds every network of the paper (frozen copies too: all of it is in the state of a run
that is resumed), and says in which stages they are trained, what an example is, and what the losses are. Its random
draws come from PyTorch's global generators, which the trainer seeds, stores and restores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import GenerationConfig
from fastdiff.train.data import TrainingData


@dataclass(frozen=True)
class Stage:
    """One part of a recipe, with an optimizer of its own.

    epochs          at most so many passes over the examples
    optimizer       "adam" or "adamw"
    cosine_epochs   the learning rate falls along half a cosine of so many epochs, stepped once per epoch (and would
                    rise again after them); None leaves it constant
    validate_every  epochs between validations; 0: none, and the last weights are the stage's result
    patience        validations that are no better, after which the stage ends; None: never early
    watch           the metrics of which at least one must be higher than ever for a validation to be better; the
                    weights of the last better one are the stage's result
    clip_norm       largest L2 norm of the gradient of all weights; None: as it is
    """

    name: str
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str = "adam"
    weight_decay: float = 0.0
    cosine_epochs: int | None = None
    validate_every: int = 1
    patience: int | None = None
    watch: tuple[str, ...] = ("NDCG@20",)
    clip_norm: float | None = None


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a recipe: a frozen dataclass of plain values, the fields of a settings file.

    Defaults are the paper's, or the authors' code's where the two differ, which the recipe's docstring says.
    """


@dataclass(frozen=True)
class QueryModel:
    """A model that is no diffusion model, for validation only: histories in, queries out, ranked by dot product.

    encode    histories as item numbers, oldest first -> queries [B, D]
    item_emb  [n_items, D]
    """

    encode: Callable[[Sequence[Sequence[int]]], Tensor]
    item_emb: Tensor


class Recipe(nn.Module, ABC):
    """A method's training, for one data set.

    method    the name under which `fastdiff train` knows it
    Settings  the class of its settings
    """

    method: ClassVar[str]
    Settings: ClassVar[type[Settings]]

    def __init__(self, settings: Any, data: TrainingData) -> None:
        super().__init__()
        self.settings, self.data = settings, data

    # --- what the trainer asks ----------------------------------------------------------------------------------------

    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """The stages in the order in which they run; names are unique."""

    @abstractmethod
    def n_examples(self, stage: Stage) -> int:
        """How many examples one epoch visits, each once, in an order that the trainer draws."""

    @abstractmethod
    def losses(self, stage: Stage, examples: Tensor) -> dict[str, Tensor]:
        """The terms of the loss on a batch of example numbers [b] (int64, on the CPU), each a scalar that is already
        weighted: their sum is what is minimised. Names go into the log."""

    def enter(self, stage: Stage) -> None:
        """Called once, when a stage begins for the first time, with the best weights of the stage before."""

    def trained(self, stage: Stage) -> Iterable[nn.Parameter]:
        """The weights that a stage changes; the trainer freezes all others."""
        return self.parameters()

    def backward(self, stage: Stage, losses: dict[str, Tensor]) -> None:
        """Fill the gradients; a recipe that merges the gradients of its terms in another way than by sum says so."""
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]

    @abstractmethod
    def model(self, stage: Stage) -> Checkpoint | QueryModel:
        """What is validated during a stage, and the result after the last: a checkpoint that the engine runs (its
        weights may share memory with this recipe's), or a `QueryModel` where there is nothing to diffuse."""

    def validation_settings(self, stage: Stage) -> dict[str, Any]:
        """Arguments of `fastdiff.evaluate.evaluate` for validations, such as the ranking; None keeps its defaults."""
        return {"ranking": "published"}

    # --- shared -------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def checkpoint(self, config: Any, generation_config: GenerationConfig, network: nn.Module) -> Checkpoint:
        """`network`'s weights as a checkpoint with the data's item ids."""
        weights = {name: weight.detach() for name, weight in network.state_dict().items()}
        return Checkpoint(config, generation_config, weights, self.data.external_ids(config))
