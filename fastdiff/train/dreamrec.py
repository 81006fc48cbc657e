"""DreamRec: Yang et al., "Generate What You Prefer: Reshaping Sequential Recommendation via Guided Diffusion" (NeurIPS
2023, arXiv 2310.20453).

An instance is (s_0 .. s_{n-1}, the next item y): every item of a sequence after the L before it, the first one after an
empty history. With h the encoded history, x = E[y], t ~ U{0 .. T-1} and noise ~ N(0, I)

    x_t    = sqrt(abar_t) x + sqrt(1 - abar_t) noise
    L_diff = E mean_D (x - f(x_t, h', t))^2                         h' = the null token with probability p, else h

`fastdiff/models/dreamrec.py` has encoder, denoiser f and sampler. What the authors' code does beyond the paper:

  - the table E is drawn from N(0, 1) and learned by L_diff alone, as target and inside x_t, with no gradient stopped;
  - AdamW without weight decay; dropout 0.1 on e_j, on the attention's weights and on the feed-forward's output;
  - its evaluation runs with dropout (`model.eval()` is never called). Ours does not;
  - T, schedule, learning rate and w differ per data set; the defaults here are its command for YooChoose.

What is ours, and off by default (`ranking_weight`, `stop_gradient`). All embeddings equal is an optimum of L_diff, and
a table that is learned by it shrinks. So

    L = E mean_D (sg(x) - f(sg(x_t), h', t))^2 + ranking_weight E -log softmax(x^ . E / temperature)[y]

has the cross-entropy of what the engine ranks by, over the whole catalogue, to place the embeddings. x^ is the estimate
f(x_t, h', t), or, with `ranking_at` "last", f(noise, h', T-1) of another noise: what a sampler in one step would rank
by, and without x_t, which at small t gives y away.

The encoder is causal and pads stand on the right, so one pass over the first L + 1 items of a sequence encodes all
their prefixes; only later items, whose window slides, need a pass of their own, for one query. Each instance still
draws its own t, noise and null token, and the result is that of one pass per instance (dropout aside, whose masks the
prefixes of a pass share). A batch is `batch_size` such passes, and its losses are means over its instances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import DreamRecConfig, default_generation_config
from fastdiff.errors import InvalidArgument
from fastdiff.models.layers import sinusoidal_embedding
from fastdiff.schedule import ScheduleConfig
from fastdiff.train.data import Numbers, TrainingData, windows
from fastdiff.train.recipe import Recipe, Settings, Stage
from fastdiff.train.softmax import cross_entropy

RANKINGS_AT = ("drawn", "last")


@dataclass(frozen=True)
class DreamRecSettings(Settings):
    """Defaults: the authors' command for YooChoose.

    hidden_size          D                      max_seq_len  L
    num_train_timesteps  T                      beta_schedule  "linear" (beta_start .. beta_end), "exp" or "cosine"
    denoiser             "mlp1", one linear layer, or "mlp2", two with a GELU between
    guidance_scale       g = w + 1 of u + g (c - u), of validations and of the checkpoint; 1 is off
    drop_guidance        p, the share of instances trained with the null token
    dropout              of e_j, of the attention's weights and of the feed-forward's output
    epochs, batch_size   at most so many passes over the data; sequences, not instances, in a batch (the authors take
                         256 instances)
    validate_every       epochs between validations; `patience` of them without a better NDCG@20 end the training
    ranking_weight       ours: weight of the cross-entropy over the catalogue; 0 is the paper
    ranking_at           ours: "drawn", the cross-entropy of the estimate at t; "last", of one call on pure noise
    ranking_temperature  ours: None is sqrt(D)
    stop_gradient        ours: L_diff takes the embeddings as they are, and does not move them; False is the paper
    embedding_std        of items, positions and null token at the start; 1 is the authors'
    cosine_epochs        the learning rate falls along half a cosine of so many epochs; None, as the authors: constant
    """

    hidden_size: int = 64
    max_seq_len: int = 10
    num_train_timesteps: int = 500
    beta_schedule: str = "exp"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    denoiser: str = "mlp1"
    guidance_scale: float = 3.0
    drop_guidance: float = 0.1
    dropout: float = 0.1
    epochs: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    validate_every: int = 10
    patience: int | None = 10
    ranking_weight: float = 0.0
    ranking_at: str = "drawn"
    ranking_temperature: float | None = None
    stop_gradient: bool = False
    embedding_std: float = 1.0
    cosine_epochs: int | None = None

    def __post_init__(self) -> None:
        if self.ranking_at not in RANKINGS_AT:
            raise InvalidArgument(
                f"{type(self).__name__}: ranking_at must be one of {', '.join(RANKINGS_AT)} (got {self.ranking_at!r})"
            )


# --- the network ------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """f(x_t, h, t) = diffuser([x_t ; h ; step_mlp(t)])."""

    def __init__(self, config: DreamRecConfig) -> None:
        super().__init__()
        self.dim = dim = config.hidden_size
        # number 0 is the authors' sinusoids, which have no weights
        self.step_mlp = nn.Sequential(nn.Identity(), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        if config.denoiser == "mlp1":
            self.diffuser = nn.Sequential(nn.Linear(3 * dim, dim))
        else:
            self.diffuser = nn.Sequential(nn.Linear(3 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def denoise(self, x_t: Tensor, h: Tensor, timesteps: Tensor) -> Tensor:
        """The estimate of x `[R, D]` from x_t `[R, D]`, h `[R, D]` and timesteps `[R]`."""
        sinusoids = sinusoidal_embedding(timesteps, self.dim, "sin_cos", "half_minus_one").to(x_t.dtype)
        estimate: Tensor = self.diffuser(torch.cat([x_t, h, self.step_mlp(sinusoids)], dim=1))
        return estimate


class DreamRecNetwork(Denoiser):
    """Encoder and denoiser under the authors' parameter names."""

    def __init__(self, config: DreamRecConfig, dropout: float) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.config, self.dropout = config, dropout
        self.item_embeddings = nn.Embedding(config.n_rows, dim)
        self.none_embedding = nn.Embedding(1, dim)
        self.positional_embeddings = nn.Embedding(config.max_seq_len, dim)
        self.ln_1, self.ln_2, self.ln_3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mh_attn = _Attention(dim)
        self.feed_forward = _FeedForward(dim)

    def encode_prefixes(self, items: Tensor) -> Tensor:
        """h `[B, n + 1, D]` of the prefixes of 0, 1, .. n items of `[B, n]`, n at most L. What a prefix with a pad in
        it gets means nothing."""
        e = self._embed(items)
        query, attention = self.ln_1(e), self.mh_attn
        mixed = F.scaled_dot_product_attention(
            attention.linear_q(query),
            attention.linear_k(e),
            attention.linear_v(e),
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        # an empty history is a zero row before the last norm
        cold = self.ln_3.bias.expand(len(items), 1, -1)
        return torch.cat([cold, self._after_attention(query + mixed)], dim=1)

    def encode_windows(self, items: Tensor) -> Tensor:
        """h `[B, D]` of full windows `[B, L]`: one query each, with W_k moved to it and W_v out of the sum over e."""
        e = self._embed(items)
        query, attention = self.ln_1(e[:, -1]), self.mh_attn
        towards_e = attention.linear_q(query) @ attention.linear_k.weight / math.sqrt(e.shape[-1])
        weights = F.dropout((e @ towards_e[:, :, None]).squeeze(-1).softmax(dim=1), self.dropout, self.training)
        mixed = (weights[:, None] @ e).squeeze(1) @ attention.linear_v.weight.T
        mixed = mixed + weights.sum(dim=1, keepdim=True) * attention.linear_v.bias
        return self._after_attention(query + mixed)

    def _embed(self, items: Tensor) -> Tensor:
        places = torch.arange(items.shape[1], device=items.device)
        return F.dropout(self.item_embeddings(items) + self.positional_embeddings(places), self.dropout, self.training)

    def _after_attention(self, y: Tensor) -> Tensor:
        z, feed_forward = self.ln_2(y), self.feed_forward
        hidden = F.linear(z, feed_forward.w_1.weight.squeeze(-1), feed_forward.w_1.bias).relu()
        hidden = F.linear(hidden, feed_forward.w_2.weight.squeeze(-1), feed_forward.w_2.bias)
        o = feed_forward.layer_norm(F.dropout(hidden, self.dropout, self.training) + z)
        h: Tensor = self.ln_3(o)
        return h


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_q, self.linear_k, self.linear_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)


class _FeedForward(nn.Module):
    """The authors' layers are convolutions of width 1, and so are their weights' shapes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, dim, 1)
        self.layer_norm = nn.LayerNorm(dim)


# --- the instances ----------------------------------------------------------------------------------------------------


class Instances(NamedTuple):
    """h `[R, D]` of R histories, and the item that came next `[R]`."""

    h: Tensor
    targets: Tensor


class Passes:
    """What one pass of the encoder takes in: the first L + 1 items of each sequence, or the window before a later item.

    Pass number e < len(heads) is `heads[e]`, all of whose items are targets; the others are `tails[e - len(heads)]`,
    whose last item is one.
    """

    def __init__(self, sequences: Sequence[Numbers], length: int, pad: int) -> None:
        self.heads, self.lengths = windows([sequence[: length + 1] for sequence in sequences], length + 1, pad, "right")
        late = [sequence[at - length : at + 1] for sequence in sequences for at in range(length + 1, len(sequence))]
        self.tails, _ = windows(late, length + 1, pad, "right")

    def __len__(self) -> int:
        return len(self.heads) + len(self.tails)

    def encode(self, network: DreamRecNetwork, passes: Tensor, device: torch.device) -> Instances:
        """All instances of the given passes `[b]`: of the heads in order, place by place, then of the tails."""
        early = passes[passes < len(self.heads)]
        lengths = self.lengths[early]
        width = int(lengths.max()) if len(early) else 0
        heads = self.heads[early, :width].to(device)
        tails = self.tails[passes[passes >= len(self.heads)] - len(self.heads)].to(device)
        filled = (torch.arange(width) < lengths[:, None]).to(device)
        found = []
        if width:
            found.append(Instances(network.encode_prefixes(heads[:, :-1])[filled], heads[filled]))
        if len(tails):
            found.append(Instances(network.encode_windows(tails[:, :-1]), tails[:, -1]))
        return Instances(torch.cat([part.h for part in found]), torch.cat([part.targets for part in found]))


# --- the recipe -------------------------------------------------------------------------------------------------------


class DreamRecRecipe(Recipe):
    """One stage, "diffusion"."""

    method: ClassVar[str] = "dreamrec"
    Settings: ClassVar[type[Settings]] = DreamRecSettings
    config_class: ClassVar[type[DreamRecConfig]] = DreamRecConfig
    settings: DreamRecSettings

    def __init__(self, settings: DreamRecSettings, data: TrainingData) -> None:
        super().__init__(settings, data)
        self.config = self.config_class(
            data.n_items,
            settings.hidden_size,
            settings.max_seq_len,
            schedule_of(settings),
            denoiser=settings.denoiser,
        )
        self.network = DreamRecNetwork(self.config, settings.dropout)
        network = self.network
        for table in (network.item_embeddings, network.positional_embeddings, network.none_embedding):
            nn.init.normal_(table.weight, std=settings.embedding_std)
        self.passes = Passes(data.sequences, settings.max_seq_len, self.config.pad_id)
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", self.config.schedule.build().alphas_cumprod, persistent=False)

    def stages(self) -> Sequence[Stage]:
        return [self.diffusion_stage("diffusion")]

    def diffusion_stage(self, name: str) -> Stage:
        settings = self.settings
        return Stage(
            name,
            settings.epochs,
            settings.batch_size,
            settings.learning_rate,
            "adamw",
            settings.weight_decay,
            settings.cosine_epochs,
            validate_every=settings.validate_every,
            patience=settings.patience,
        )

    def n_examples(self, stage: Stage) -> int:
        return len(self.passes)

    def losses(self, stage: Stage, examples: Tensor) -> dict[str, Tensor]:
        h, targets = self.passes.encode(self.network, examples, self.device)
        t = torch.randint(0, self.config.schedule.num_train_timesteps, targets.shape, device=self.device)
        x = self.target_embeddings(targets)
        x_t = self.add_noise(x, t, torch.randn_like(x))
        guidance = self.drop_guidance(h)
        estimate = self.network.denoise(x_t, guidance, t)
        return {"diffusion": F.mse_loss(estimate, x)} | self.ranking(estimate, guidance, targets)

    def model(self, stage: Stage) -> Checkpoint:
        generation_config = default_generation_config(self.config, self.settings.guidance_scale)
        return self.checkpoint(self.config, generation_config, self.network)

    # --- parts of losses ----------------------------------------------------------------------------------------------

    def target_embeddings(self, targets: Tensor) -> Tensor:
        """x `[R, D]`."""
        x: Tensor = self.network.item_embeddings(targets)
        return x.detach() if self.settings.stop_gradient else x

    def add_noise(self, x: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_t `[R, D]` from x and noise `[R, D]`, timesteps `[R]`."""
        abar = self.alphas_cumprod[timesteps][:, None]
        return abar.sqrt() * x + (1 - abar).sqrt() * noise

    def drop_guidance(self, h: Tensor) -> Tensor:
        """h', with the null token in a share of the rows."""
        null = torch.rand(len(h), 1, device=h.device) < self.settings.drop_guidance
        return torch.where(null, self.network.none_embedding.weight, h)

    def ranking(self, estimate: Tensor, guidance: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Our term, where it is asked for: the cross-entropy over the catalogue of estimates `[R, D]`."""
        settings = self.settings
        if settings.ranking_weight == 0:
            return {}
        if settings.ranking_at == "last":
            last = torch.full_like(targets, self.config.schedule.num_train_timesteps - 1)
            estimate = self.network.denoise(torch.randn_like(estimate), guidance, last)
        items = self.network.item_embeddings.weight[: self.config.n_items]
        temperature = settings.ranking_temperature or math.sqrt(estimate.shape[1])
        return {"ranking": settings.ranking_weight * cross_entropy(estimate / temperature, items, targets)}


def schedule_of(settings: DreamRecSettings) -> ScheduleConfig:
    """The chain in float32, as the authors compute it."""
    return ScheduleConfig(
        settings.beta_schedule,
        settings.num_train_timesteps,
        "float32",
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
    )
