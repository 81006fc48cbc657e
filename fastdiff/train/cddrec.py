"""CDDRec's training: Conditional Denoising Diffusion for sequential Recommendation (PAKDD 2024, arXiv 2304.11433).

For an item sequence s_1 .. s_n and its augmented copy (primed), at every position j and every step t = T-1 .. 0:

    c_j   = Encoder(s_1 .. s_j)                     mu_{t,j} = Decoder(c_j, Time[t])      x_t itself is never fed
    x_t   = mu_t + sigma_t z                        sigma_t^2 the posterior variance, at t = 0 that of t = 1
    e_t   = sqrt(abar_t) E[s_{j+1}] + sqrt(1 - abar_t) z'                                 the target, noised
    e-    = E[a random item that is not the user's]                                       the negative, clean

    L     = sum_t 1/(t+1) [ L_cd(x_t, e_t, e-) + L_cd(x'_t, e_t, e-) + w L_in(x_t, e_t) + w L_cross(x_t, x'_t) ]
    L_cd    mean over positions of -log sigmoid(x . e) - log(1 - sigmoid(x . e-))         cross-divergence
    L_in, L_cross   InfoNCE over cosines / temperature: of the 2 R rows of both sides, each finds its partner among
                    the 2 R - 1 others, R positions of the whole batch; `linear_infonce`: by random Fourier features

Training reads what leave-one-out leaves, up to its last item but one as history (the authors' items[:-3] ->
items[1:-2]).

What the authors' code does and the paper does not say, kept as it is: the decoder is fed users where it expects
positions, so its self-attention runs over the users of the batch, slot by slot (`batch_coupling = "published"`; with
"none" each position attends to itself alone, as the engine then does); sigma_t is the posterior's where the paper's
equation 10 has sqrt(beta_t); the weight 1/(t+1); w = 0.3; the augmentation is always a reordering, because the draw
between crop, mask and reorder compares a list with an int (`augmentation`).

`published_slips` is False, and then these slips of the code, which nothing intends, are mended:

    - a position of the augmented copy counts in L_cd with the number of its item as its weight; here all alike
    - L_cross contrasts padding as well, 8 times as many pairs on Amazon Office; here positions of items
    - padding, whose encoding sees the future, is among the keys of the coupled attention; here it is not (at inference
      there is none: the newest slot always holds an item)
    - negatives may be the mask row; here only items

Different from the code without a setting: negatives avoid the user's training items (the code also avoids the held-out
ones, and so knows them); a long sequence is cut to its window before it is augmented; cropping blanks what it drops
instead of moving the rest away from its targets; -log(1 - sigmoid) is evaluated without saturating at 1e-24. Items are
numbered from row 1: the authors' file of Amazon Office counts from 0, where a real item shares the row of padding.

Time. The decoder's self-attention does not know t: it runs once per view, and so its dropout is drawn once for all
steps instead of at each, which leaves every step's own distribution, and the expected gradient, as they are. Its
cross-attention is one row per step; the dropout of its 128 equal weights, a factor of 1 +- 0.04, is left out. Only
positions that hold items are computed. `steps_per_batch` draws n of the T steps with probability proportional to
1/(t+1), a systematic sample: an unbiased estimate of the sum over steps, T/n times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import plan as plans
from fastdiff.checkpoint import Checkpoint
from fastdiff.config import CDDRecConfig, default_generation_config
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.schedule import ScheduleConfig
from fastdiff.train.augmentations import crop, mask_out, reorder
from fastdiff.train.data import TrainingData, windows
from fastdiff.train.recipe import Recipe, Settings, Stage
from fastdiff.train.softmax import contrast, linear_contrast

AUGMENTATIONS = ("reorder", "mask", "crop", "random")
MASKED = -10000.0
"""What the authors add to the scores of keys that may not be attended to; a row without any key averages over all."""


@dataclass(frozen=True)
class CDDRecSettings(Settings):
    """Defaults are the authors' (their argument parser's where their README gives none).

    num_train_timesteps, beta_start, beta_end   the chain: an even grid of T betas
    attention_dropout   of the encoder's attention weights, and of all places of the decoder
    hidden_dropout      of embeddings and of the encoder's sublayers
    temperature         of both contrasts; at least 0.03, so that no sum of e^((cosine - 1) / temperature) underflows
    contrast_weight     w above
    linear_infonce      contrasts in linear time, by 8 D random Fourier features, redrawn at each use
    batch_coupling      "published" or "none": see above, and `CDDRecConfig`
    augmentation        "reorder" shuffles a run of 60 %, "mask" masks 30 %, "crop" keeps a run of 60 %; "random" draws
                        one of the three for each user
    published_slips     see above
    steps_per_batch     how many of the T steps a batch evaluates; None: all
    init_std            standard deviation of the first weights
    cosine_epochs       the learning rate falls along half a cosine of so many epochs; None, as the authors: constant
    patience            epochs without a better NDCG@10, after which training ends
    """

    hidden_size: int = 128
    max_seq_len: int = 20
    n_layers: int = 1
    n_heads: int = 4
    hidden_act: str = "gelu"
    num_train_timesteps: int = 20
    beta_start: float = 1e-4
    beta_end: float = 0.002
    attention_dropout: float = 0.2
    hidden_dropout: float = 0.0
    temperature: float = 0.5
    contrast_weight: float = 0.3
    linear_infonce: bool = False
    batch_coupling: str = "published"
    augmentation: str = "reorder"
    published_slips: bool = False
    steps_per_batch: int | None = None
    init_std: float = 0.02
    learning_rate: float = 1e-3
    cosine_epochs: int | None = None
    weight_decay: float = 0.0
    batch_size: int = 128
    epochs: int = 1000
    patience: int = 50

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise InvalidArgument(
                f"CDDRecSettings: augmentation must be one of {', '.join(AUGMENTATIONS)} (got {self.augmentation!r})"
            )
        if self.temperature < 0.03:
            raise InvalidArgument(
                f"CDDRecSettings: temperature must be at least 0.03 (got {self.temperature:g}); the authors' is 0.5"
            )
        steps, total = self.steps_per_batch, self.num_train_timesteps
        if steps is not None and not 1 <= steps <= total:
            raise InvalidArgument(
                f"CDDRecSettings: steps_per_batch must be None or 1..{total}, num_train_timesteps (got {steps})"
            )

    def config(self, n_items: int) -> CDDRecConfig:
        """The model that these settings train."""
        schedule = ScheduleConfig(
            "linear",
            self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            linspace_dtype="float32",
        )
        return CDDRecConfig(
            n_items,
            self.hidden_size,
            self.max_seq_len,
            schedule,
            n_heads=self.n_heads,
            n_layers=self.n_layers,
            hidden_act=self.hidden_act,
            batch_coupling=self.batch_coupling,
        )


class CDDRecRecipe(Recipe):
    """One stage, one example per user with at least two training items."""

    method = "cddrec"
    Settings = CDDRecSettings
    settings: CDDRecSettings

    def __init__(self, settings: CDDRecSettings, data: TrainingData) -> None:
        super().__init__(settings, data)
        self.config = settings.config(data.n_items)
        self.network = CDDRecNetwork(self.config, settings)
        first, length = self.config.first_item_row, settings.max_seq_len
        users = [sequence + first for sequence in data.sequences if len(sequence) >= 2]
        if not users:
            raise DataError(
                "cddrec: no user has two items to train on; with leave-one-out a user needs at least 4 items"
            )
        if max(len(set(user.tolist())) for user in users) >= data.n_items:
            raise DataError(
                "cddrec: a user has every item of the data, which leaves no negative for that user; leave the user out"
            )
        self.inputs, self.lengths = windows([user[:-1] for user in users], length, self.config.pad_id, "left")
        self.targets, _ = windows([user[1:] for user in users], length, self.config.pad_id, "left")
        self._owned = torch.cat(
            [torch.from_numpy(user) + number * self.config.n_rows for number, user in enumerate(users)]
        ).sort()[0]  # sorted user * n_rows + row of every training item
        plan = plans.ddpm(self.config.schedule.build(), None, "prev_mean", self.config.variance_type, True)
        self._sigma = plan.coef[:, 2].flip(0).tolist()
        self._abar = self.config.schedule.build().alphas_cumprod.tolist()

    def stages(self) -> Sequence[Stage]:
        settings = self.settings
        return [
            Stage(
                "train",
                settings.epochs,
                settings.batch_size,
                settings.learning_rate,
                weight_decay=settings.weight_decay,
                cosine_epochs=settings.cosine_epochs,
                patience=settings.patience,
                watch=("NDCG@10",),
            )
        ]

    def n_examples(self, stage: Stage) -> int:
        return len(self.inputs)

    def model(self, stage: Stage) -> Checkpoint:
        return self.checkpoint(self.config, default_generation_config(self.config), self.network)

    # --- the loss -----------------------------------------------------------------------------------------------------

    def losses(self, stage: Stage, examples: Tensor) -> dict[str, Tensor]:
        slips, network, weight = self.settings.published_slips, self.network, self.settings.contrast_weight
        width = self.settings.max_seq_len if slips else int(self.lengths[examples].max())
        items, targets = self.inputs[examples, -width:], self.targets[examples, -width:]
        augmented, negatives = self._augment(items), self._negatives(examples, items)

        # positions [b, width] that are computed; what follows has one row for each, in order
        rows, augmented_rows = (torch.ones_like(x, dtype=torch.bool) if slips else x != 0 for x in (items, augmented))
        shared = augmented_rows[rows]  # which rows of the view the augmented view has too
        real = (items != 0)[rows]
        counts = real.to(torch.float32)
        augmented_counts = (augmented if slips else augmented != 0)[augmented_rows].to(torch.float32)
        items, augmented, targets, negatives = (x.to(self.device) for x in (items, augmented, targets, negatives))
        rows, augmented_rows, shared, real, counts, augmented_counts = (
            x.to(self.device) for x in (rows, augmented_rows, shared, real, counts, augmented_counts)
        )

        target, negative = network.item_embeddings(targets[rows]), network.item_embeddings(negatives[rows])
        view = network.attend(network.encode(items, rows), rows)
        other = network.attend(network.encode(augmented, augmented_rows), augmented_rows)
        in_real, in_shared = _taken(real), _taken(shared)
        negative_shared = in_shared(negative)

        terms: dict[str, list[Tensor]] = {"divergence": [], "augmented": [], "in_view": [], "cross_view": []}
        for t, step_weight in self._steps():
            x = self._noised(network.step(view, t), 1.0, self._sigma[t])
            positive = self._noised(target, math.sqrt(self._abar[t]), math.sqrt(1 - self._abar[t]))
            divergence = cross_divergence(x, positive, negative, counts)
            in_view = self._contrast(in_real(x), in_real(positive))
            x_other = self._noised(network.step(other, t), 1.0, self._sigma[t])
            of_augmented = cross_divergence(x_other, in_shared(positive), negative_shared, augmented_counts)
            cross_view = self._contrast(in_shared(x), x_other)
            terms["divergence"].append(step_weight * divergence)
            terms["augmented"].append(step_weight * of_augmented)
            terms["in_view"].append(step_weight * weight * in_view)
            terms["cross_view"].append(step_weight * weight * cross_view)
        return {name: torch.stack(values).sum() for name, values in terms.items()}

    def _contrast(self, a: Tensor, b: Tensor) -> Tensor:
        if self.settings.linear_infonce:
            return linear_contrast(a, b, self.settings.temperature, 8 * self.settings.hidden_size)
        return contrast(a, b, self.settings.temperature)

    @staticmethod
    def _noised(mean: Tensor, factor: float, sigma: float) -> Tensor:
        return factor * mean + sigma * torch.randn_like(mean)

    def _steps(self) -> list[tuple[int, float]]:
        """(t, its weight in the sum), t descending."""
        total, n = self.settings.num_train_timesteps, self.settings.steps_per_batch
        weights = 1 / torch.arange(1, total + 1, dtype=torch.float64)
        if n is None:
            return [(t, float(weights[t])) for t in reversed(range(total))]
        mass = weights.sum()
        places = (torch.arange(n, dtype=torch.float64) + torch.rand((), dtype=torch.float64)) * mass / n
        drawn = torch.searchsorted(weights.cumsum(0), places, right=True).clamp(max=total - 1)
        return [(int(t), float(mass / n)) for t in drawn.flip(0)]

    # --- examples -----------------------------------------------------------------------------------------------------

    def _negatives(self, examples: Tensor, items: Tensor) -> Tensor:
        """For each position a row [b, width], drawn evenly from the items that the user has not."""
        first = self.config.first_item_row
        end = first + self.config.n_items + (1 if self.settings.published_slips else 0)
        negatives = torch.randint(first, end, items.shape)
        while True:
            keys = examples[:, None] * self.config.n_rows + negatives
            at = torch.searchsorted(self._owned, keys).clamp(max=len(self._owned) - 1)
            refused = self._owned[at] == keys
            if not bool(refused.any()):
                return negatives
            negatives[refused] = torch.randint(first, end, (int(refused.sum()),))

    def _augment(self, items: Tensor) -> Tensor:
        """The other view of left-padded histories [b, width]."""
        kinds: dict[str, Callable[[Tensor], Tensor]] = {
            "reorder": reorder,
            "mask": lambda x: mask_out(x, self.config.n_items + 1),
            "crop": crop,
        }
        if self.settings.augmentation != "random":
            return kinds[self.settings.augmentation](items)
        drawn = torch.randint(0, len(kinds), (len(items), 1))
        for number, augment in enumerate(kinds.values()):
            items = torch.where(drawn == number, augment(items), items)
        return items


def _taken(chosen: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x[chosen], and x itself where that is all of it."""
    return (lambda x: x) if bool(chosen.all()) else (lambda x: x[chosen])


# --- losses -----------------------------------------------------------------------------------------------------------


def cross_divergence(x: Tensor, positive: Tensor, negative: Tensor, weights: Tensor) -> Tensor:
    """sum_r w_r [-log sigmoid(x_r . e_r) - log(1 - sigmoid(x_r . e-_r))] / sum_r w_r.

    x, positive, negative  [R, D]        weights  [R]
    """
    losses = F.softplus(-(x * positive).sum(1)) + F.softplus((x * negative).sum(1))
    return (losses * weights).sum() / weights.sum()


# --- networks, under the authors' names -------------------------------------------------------------------------------


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dense = nn.Linear(dim, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)


class _Intermediate(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense_1, self.dense_2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)


class _Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention, self.intermediate = _Attention(dim), _Intermediate(dim)


class CDDRecNetwork(nn.Module):
    """The networks of `fastdiff.models.cddrec` for training: every position of a history is a case.

    Tensors [R, D] hold one row for each True of `rows` [b, width], the positions that are computed, in order. Histories
    are left-padded with 0, and their last slot is the model's last.
    """

    def __init__(self, config: CDDRecConfig, settings: CDDRecSettings) -> None:
        super().__init__()
        dim = config.hidden_size
        self.config, self.hidden_dropout, self.attention_dropout = (
            config,
            settings.hidden_dropout,
            settings.attention_dropout,
        )
        self.activation: Callable[[Tensor], Tensor] = F.relu if config.hidden_act == "relu" else F.gelu
        self.item_embeddings = nn.Embedding(config.n_rows, dim, padding_idx=config.pad_id)
        self.position_embeddings = nn.Embedding(config.max_seq_len, dim)
        self.time_embeddings = nn.Embedding(config.schedule.num_train_timesteps, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)
        layers = [_Layer(dim) for _ in range(config.n_layers)]
        self.conditional_encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self._layers = tuple(layers)
        self.decoder = nn.TransformerDecoderLayer(dim, config.n_heads, dim)  # its weights: `attend`, `step` do the work
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):  # padding too: the authors' is never zero
                nn.init.normal_(module.weight, std=settings.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(self, items: Tensor, rows: Tensor) -> Tensor:
        """c [R, D] of histories [b, width]."""
        width = items.shape[1]
        slots = torch.arange(self.config.max_seq_len - width, self.config.max_seq_len, device=items.device)
        allowed = (items != 0)[:, None, None, :] & (slots[:, None] >= slots)
        mask = torch.where(allowed, 0.0, MASKED).to(self.item_embeddings.weight.dtype)
        x = self.item_embeddings(items[rows]) + self.position_embeddings(slots.expand_as(items)[rows])
        x = self._drop_hidden(self.LayerNorm(x))
        for layer in self._layers:
            attention, intermediate = layer.attention, layer.intermediate
            projected = torch.cat([attention.query(x), attention.key(x), attention.value(x)], dim=1)
            mixed = attention.dense(self._attention(projected, rows, mask))
            x = attention.LayerNorm(x + self._drop_hidden(mixed))
            hidden = intermediate.dense_2(self.activation(intermediate.dense_1(x)))
            x = intermediate.LayerNorm(x + self._drop_hidden(hidden))
        c: Tensor = x
        return c

    def attend(self, c: Tensor, rows: Tensor) -> Tensor:
        """[R, D] the decoder's rows after its self-attention: over the users of the batch, slot by slot, or over the
        row itself alone."""
        attention, dim = self.decoder.self_attn, c.shape[1]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        if self.config.coupled:
            slots = rows.T  # [width, b]
            at_user_slot = torch.zeros(rows.shape, dtype=torch.int64, device=rows.device)
            at_user_slot[rows] = torch.arange(len(c), device=rows.device)
            at_slot_user = at_user_slot.T[slots]  # rows in the order of the slots
            mask = torch.where(slots[:, None, None, :], 0.0, MASKED).to(c.dtype)
            by_slot = self._attention(F.linear(c[at_slot_user], weight, bias), slots, mask)
            mixed = torch.empty_like(by_slot).index_copy(0, at_slot_user, by_slot)
        else:
            mixed = F.linear(c, weight[2 * dim :], bias[2 * dim :])
        norm: Tensor = self.decoder.norm1(c + self._drop(attention.out_proj(mixed)))
        return norm

    def step(self, attended: Tensor, t: int) -> Tensor:
        """mu_t [R, D] from `attend`'s rows."""
        decoder, dim = self.decoder, attended.shape[1]
        attention = decoder.multihead_attn
        weight, bias = attention.in_proj_weight[2 * dim :], attention.in_proj_bias[2 * dim :]
        cross = attention.out_proj(F.linear(self.time_embeddings.weight[t], weight, bias))
        x = decoder.norm2(attended + self._drop(cross.expand_as(attended)))
        hidden = decoder.linear2(self._drop(self.activation(decoder.linear1(x))))
        mean: Tensor = decoder.norm3(x + self._drop(hidden))
        return mean

    def _attention(self, projected: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """Attention within each line of `rows` [lines, keys]; projected [R, 3 D] holds queries, keys, values, and mask
        [lines, 1, queries or 1, keys] is added to the scores."""
        at = rows.flatten().nonzero()[:, 0]
        padded = projected.new_zeros(rows.numel(), projected.shape[1]).index_copy(0, at, projected)
        q, k, v = padded.view(*rows.shape, 3, self.config.n_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask.expand(-1, -1, rows.shape[1], -1), dropout)
        return mixed.transpose(1, 2).reshape(rows.numel(), -1)[at]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.attention_dropout, self.training)

    def _drop_hidden(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.hidden_dropout, self.training)
