"""SASRec: a causal transformer whose last row is the query. Not a diffusion model: what the others are measured by.

Papers: "Self-Attentive Sequential Recommendation" (ICDM 2018, arXiv 1808.09781); with cross-entropy over the whole
catalogue it is the baseline that ADRec's authors (arXiv 2505.19544) and others call SASRec+.

For a history s_1 .. s_n, padded on the left to L slots; item table E, one row per slot P:

    x      = d(LN(E[s] + P))          without P in ADRec's first stage
    o      = transformer(x)           causal; `fastdiff.train.layers` has the blocks, their dropout d, and the pads
    score  = o_last . E^T

    loss "ce"    mean over all real slots j of  -log softmax(o_j . E^T)[s_{j+1}]          all rows of E, the pad's too
    loss "bce"   mean over all real slots j of  -log sigmoid(o_j . E[s_{j+1}]) - log sigmoid(-o_j . E[i_j]),
                 i_j uniform among the items that the user has not in the training data

Network, "ce" and the defaults are those of ADRec's authors. The ICDM paper has "bce", and a network that differs:
blocks with the norm in front, ReLU, no attention to pads, E scaled by sqrt(D); these are not offered.

Choices of ours: validations watch NDCG@20, where the authors go on while any of HR and NDCG at 5, 10, 20 gets better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import DataError, InvalidArgument
from fastdiff.train.data import TrainingData, windows
from fastdiff.train.layers import CausalTransformer, Packed, PadRows
from fastdiff.train.recipe import QueryModel, Recipe, Settings, Stage
from fastdiff.train.softmax import cross_entropy

INIT_STD = 0.1


@dataclass(frozen=True)
class SASRecSettings(Settings):
    """Defaults: the config.yaml of ADRec's authors.

    hidden_size    D                        max_seq_len  L
    n_heads, n_layers                       of the transformer
    dropout        inside the transformer   emb_dropout  after the first LayerNorm
    loss           "ce" or "bce"
    weight_decay   L2, inside Adam          cosine_epochs  of the learning rate
    epochs         at most                  validate_every, patience  as in `Stage`
    """

    hidden_size: int = 128
    max_seq_len: int = 50
    n_heads: int = 4
    n_layers: int = 2
    dropout: float = 0.1
    emb_dropout: float = 0.3
    loss: str = "ce"
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    epochs: int = 500
    cosine_epochs: int = 500
    validate_every: int = 5
    patience: int = 4

    def __post_init__(self) -> None:
        if self.loss not in ("ce", "bce"):
            raise InvalidArgument(f"SASRecSettings: loss must be 'ce' or 'bce' (got {self.loss!r})")


@dataclass(frozen=True)
class NextItems:
    """Training examples: users with at least two items, cut to their last L + 1.

    table    [users, L + 1] rows of the item table, 0 in front
    lengths  [users], real slots: all but the last item are history, all but the first targets
    users    [users], their numbers in the data
    """

    table: Tensor
    lengths: Tensor
    users: Tensor

    @classmethod
    def of(cls, data: TrainingData, window: int) -> NextItems:
        users = [at for at, sequence in enumerate(data.sequences) if len(sequence) >= 2]
        if not users:
            raise DataError(
                f"train: no user has two items to learn from (got {len(data.sequences)} users); at least one user with "
                "two items besides those held out is needed; give more data"
            )
        table, n_items = windows([data.sequences[at] + 1 for at in users], window + 1, 0, "left")
        return cls(table, n_items - 1, torch.tensor(users))

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, examples: Tensor) -> tuple[Packed, Tensor]:
        """Histories of examples [b], and the targets of their rows [N]."""
        table, lengths = self.table[examples], self.lengths[examples]
        return Packed.of(table[:, :-1], lengths), Packed.of(table[:, 1:], lengths).items


class SASRecNetwork(nn.Module):
    """Names and initial weights are ADRec's authors' (normal with standard deviation 0.1, the pad's row too)."""

    def __init__(
        self,
        n_items: int,
        dim: int,
        window: int,
        n_heads: int,
        n_layers: int,
        dropout: float,
        emb_dropout: float,
        positions: bool = True,
    ) -> None:
        super().__init__()
        self.window = window
        self.item_embedding = nn.Embedding(n_items + 1, dim, padding_idx=0)
        self.position_embedding = nn.Embedding(window, dim) if positions else None
        self.trm_encoder = CausalTransformer(dim, n_heads, n_layers, dropout)
        self.LayerNorm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(emb_dropout)
        self.apply(_draw)

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """o [N, D] of the rows of `batch`, and [D] of an empty history."""
        e = self.item_embedding(batch.items)
        pads = self.item_embedding.weight[:1].detach()  # the pad's row learns from the loss's catalogue alone
        if self.position_embedding is not None:
            e = e + self.position_embedding(batch.slots)
            pads = pads + self.position_embedding.weight
        rows, after = self.trm_encoder(
            self.dropout(self.LayerNorm(e)), batch, PadRows(self.LayerNorm(pads).unsqueeze(0))
        )
        return rows, after.final[0]

    def encode(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Queries [B, D] of histories of item numbers."""
        batch = Packed.of_histories(histories, self.window).to(self.item_embedding.weight.device)
        return batch.last(*self(batch))

    def query_model(self) -> QueryModel:
        return QueryModel(self.encode, self.item_embedding.weight.detach()[1:])


def _draw(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class SASRec(Recipe):
    """See the module's docstring. The trained names and shapes are those of `SASRecNetwork`."""

    method = "sasrec"
    Settings = SASRecSettings
    settings: SASRecSettings

    def __init__(self, settings: SASRecSettings, data: TrainingData) -> None:
        super().__init__(settings, data)
        s = settings
        self.examples = NextItems.of(data, s.max_seq_len)
        self.network = SASRecNetwork(
            data.n_items, s.hidden_size, s.max_seq_len, s.n_heads, s.n_layers, s.dropout, s.emb_dropout
        )
        self._seen = self._pairs() if settings.loss == "bce" else torch.empty(0)

    def _pairs(self) -> Tensor:
        """user x n_rows + row of everything in the training data, ascending."""
        n_rows, sequences = self.data.n_items + 1, self.data.sequences
        pairs = [np.unique(sequence + 1) + user * n_rows for user, sequence in enumerate(sequences)]
        full = [user for user, own in enumerate(pairs) if len(own) == self.data.n_items]
        if full:
            raise DataError(
                f"train: {len(full)} users have all {self.data.n_items} items in the training data (the first is "
                f"number {full[0]}); loss 'bce' needs an item that a user has not; leave them out, or set loss=ce"
            )
        return torch.from_numpy(np.concatenate(pairs))

    def stages(self) -> Sequence[Stage]:
        s = self.settings
        return [
            Stage(
                "train",
                s.epochs,
                s.batch_size,
                s.learning_rate,
                weight_decay=s.weight_decay,
                cosine_epochs=s.cosine_epochs,
                validate_every=s.validate_every,
                patience=s.patience,
            )
        ]

    def n_examples(self, stage: Stage) -> int:
        return len(self.examples)

    def losses(self, stage: Stage, examples: Tensor) -> dict[str, Tensor]:
        packed, targets = self.examples.batch(examples)
        batch, targets = packed.to(self.device), targets.to(self.device)
        rows, _ = self.network(batch)
        table = self.network.item_embedding
        if self.settings.loss == "ce":
            return {"ce": cross_entropy(rows, table.weight, targets)}
        users = packed.per_row(self.examples.users[examples][packed.order])
        wanted = (rows * table(targets)).sum(1)
        unwanted = (rows * table(self.draw_others(users).to(self.device))).sum(1)
        return {"bce": -(F.logsigmoid(wanted) + F.logsigmoid(-unwanted)).mean()}

    def draw_others(self, users: Tensor) -> Tensor:
        """For each of users [N] (their numbers) the row of an item that the user has not, uniform among these."""
        n_rows = self.data.n_items + 1
        others = torch.randint(1, n_rows, users.shape)
        while True:
            pairs = users * n_rows + others
            at = torch.searchsorted(self._seen, pairs).clamp(max=len(self._seen) - 1)
            again = (self._seen[at] == pairs).nonzero().squeeze(1)
            if not len(again):
                return others
            others[again] = torch.randint(1, n_rows, again.shape)

    def model(self, stage: Stage) -> QueryModel:
        return self.network.query_model()
