"""DimeRec: Li et al., "DimeRec: A Unified Framework for Enhanced Sequential Recommendation via Generative Diffusion
Models" (WSDM 2025, arXiv 2408.12153), trained in one stage with Adam.

Guidance extraction (GEM) gives K interests g_1 .. g_K of a history, and a diffusion on the unit sphere (DAM), guided by
them, generates the item to recommend. `fastdiff/models/dimerec.py` has both networks. For a history with next item a:

    L       = L_gem + lambda L_recon + mu L_ssm                                         [paper]
    L_gem   = -log softmax_i(g_u . e_i)[a],    g_u = the g_k with the largest g_k . e_a [paper]
    L_recon = |sg(x_0) - f(x_t, t, g_1 .. g_K)|^2,    x_0 = e_a / |e_a|                 [paper; sg is ours]
    L_ssm   = -log softmax_i(f(x_t, t, g_1 .. g_K) . e_i)[a]                            [paper]

    x_t     = exp_{x_0}(v),  v = sqrt(1 - abar_t) eps,  eps ~ N(0, I),  t uniform       [paper, Algorithm 1]
              a draw, through which no gradient flows                                   [ours]
    exp_x(v) = cos|v| x + sin|v| v / |v|                                                [paper]

No code of the authors is public, and of the paper only its figure, the equations above and its two algorithm boxes were
at hand. What they leave open is a setting each, marked [ours] in `DimeRecSettings`, whose defaults are what works.

What there is to know about it:

  - eps is not projected on the tangent space at x_0 in the box, and |eps| is about sqrt(D): the walk goes round the
    sphere, so that x_t leaves the sphere, and tells the network of x_0 (as cos|v| x_0) even at t = T, where sampling
    starts from pure noise. `tangent` projects eps; `quarter_circle` measures the walk in quarter circles, |v| =
    sqrt(1 - abar_t) (pi / 2) |eps| / sqrt(D), so that x_T stands about at right angles to x_0, which is what a uniform
    draw on the sphere does in D dimensions.
  - a state that tells of x_0 is an easier teacher than the guidance, which is all there is when sampling starts. So the
    default chain begins in noise (at t = 1, x_t stands at about 75 degrees to x_0), and a few steps, or one, rank as
    well as all T: see `settings/dimerec.yaml`.
  - L_gem scores raw items with means of raw items: it cannot tell "b after a" from "a after b". f can. A large mu (with
    lambda in proportion: Adam does not see the scale of the sum) leaves the table to L_ssm.
  - the item table is learned along. Without sg, x_0 moves towards f, and the table towards few directions.
  - e_u has length 1 and is scored against raw items: their lengths are the model's only way to favour popular items,
    and (with f of length 1 in L_ssm) to be sure of anything. Raw f in L_ssm leaves that to |f|, which L_recon pulls
    to 1 and the ranking does not see.

An example is a stretch of at most L + 1 items of a user, oldest first, and every item in it but the first a target:
what GEM's attention gives to an item does not depend on what follows, so all prefixes share its logits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import DimeRecConfig, GenerationConfig
from fastdiff.schedule import ScheduleConfig
from fastdiff.train.data import Numbers, TrainingData
from fastdiff.train.recipe import Recipe, Settings, Stage
from fastdiff.train.softmax import cross_entropy

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class DimeRecSettings(Settings):
    """What is not marked [paper] is [ours]: the material that we had does not say.

    The networks:
    hidden_size         D of items, interests and states
    max_seq_len         L, how many items of a history are read
    n_interests         K
    guidance_extractor  "self_attention" (of Cen et al. 2020; [paper]'s main one) or "last_items" (a variant of [paper])
    mlp_widths          hidden widths of the denoiser; () makes it one linear layer
    mlp_activation      between its layers
    start_at_guidance   the denoiser begins as f = the mean of the interests (`start_at_guidance`), not at random
    init_std            standard deviation of the drawn items and positions; the step embeddings' is 1
    dropout             of the history's embeddings, of the denoiser's interests and of its hidden layers

    The chain: betas of `schedule`, T of them.
    num_train_timesteps, schedule, beta_start, beta_end     of `fastdiff.schedule.ScheduleConfig`
    first_timestep      t is drawn from first_timestep .. T; [paper] 0, where x_t is x_0 and which is never run
    tangent             project eps on the tangent space at x_0; [paper] False
    quarter_circle      the length of the walk, as the module's docstring has it; [paper] False

    The losses:
    recon_weight        lambda
    ssm_weight          mu
    negatives           sampled softmax with that many uniform draws per target of the batch, shared by the batch
                        (Cen et al. 2020 take 10); 0 takes the whole catalogue
    temperature         every logit is divided by it
    stop_target         no gradient of L_recon into x_0
    detach_guidance     no gradient of L_recon and L_ssm into the interests
    unit_output         L_ssm scores f / |f|, as the ranking does, instead of f
    normalize_items     both softmaxes, and the ranking, take e_i / |e_i|
    shortest_history    0 learns the first item of each user too, from the empty history

    Optimisation: Adam ([paper]) with `weight_decay`, the learning rate on half a cosine of `cosine_epochs` if given; at
    most `epochs`, until NDCG@20 on the validation data has not grown for `patience` of its looks, one every
    `validate_every` epochs.

    Inference: `num_inference_steps` steps of the chain, None for all T ([paper])
    """

    hidden_size: int = 64
    max_seq_len: int = 50
    n_interests: int = 4
    guidance_extractor: str = "self_attention"
    mlp_widths: tuple[int, ...] = (256,)
    mlp_activation: str = "gelu"
    start_at_guidance: bool = True
    init_std: float = 0.1
    dropout: float = 0.3

    num_train_timesteps: int = 10
    schedule: str = "linear"
    beta_start: float = 0.7
    beta_end: float = 0.9
    first_timestep: int = 1
    tangent: bool = True
    quarter_circle: bool = True

    recon_weight: float = 0.1
    ssm_weight: float = 1.0
    negatives: int = 0
    temperature: float = 1.0
    stop_target: bool = True
    detach_guidance: bool = False
    unit_output: bool = False
    normalize_items: bool = False
    shortest_history: int = 1

    batch_size: int = 128
    learning_rate: float = 1e-3
    cosine_epochs: int | None = None
    weight_decay: float = 0.0
    epochs: int = 200
    validate_every: int = 1
    patience: int = 10
    num_inference_steps: int | None = None


# --- the walk on the sphere -------------------------------------------------------------------------------------------


def exp_map(x: Tensor, v: Tensor) -> Tensor:
    """exp_x(v) = cos|v| x + sin|v| v / |v|, all `[.., D]`; x itself where v = 0."""
    length = v.norm(dim=-1, keepdim=True)
    return torch.cos(length) * x + torch.sinc(length / math.pi) * v


def walk(x_0: Tensor, eps: Tensor, one_minus_abar: Tensor, tangent: bool, quarter_circle: bool) -> Tensor:
    """x_t of Algorithm 1, `[R, D]`, from x_0 and eps `[R, D]` and 1 - abar_t `[R]`; the switches as in the settings."""
    if tangent:
        eps = eps - (eps * x_0).sum(dim=-1, keepdim=True) * x_0
    scale = one_minus_abar.sqrt()
    if quarter_circle:
        scale = scale * (math.pi / 2 / math.sqrt(x_0.shape[-1]))
    return exp_map(x_0, scale[:, None] * eps)


# --- the networks -----------------------------------------------------------------------------------------------------


class _InterestLogits(nn.Module):
    def __init__(self, dim: int, n_interests: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, 4 * dim)
        self.w_2 = nn.Linear(4 * dim, n_interests)

    def forward(self, placed: Tensor) -> Tensor:
        logits: Tensor = self.w_2(torch.tanh(self.w_1(placed)))
        return logits


class DimeRecNetwork(nn.Module):
    """GEM and DAM under the parameter names of `fastdiff.models.dimerec`."""

    def __init__(self, config: DimeRecConfig, init_std: float, dropout: float) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.item_embeddings = nn.Embedding(config.n_rows, dim)
        nn.init.normal_(self.item_embeddings.weight, std=init_std)
        nn.init.zeros_(self.item_embeddings.weight[config.pad_id])
        self.step_embeddings = nn.Embedding(config.schedule.num_train_timesteps + 1, dim)
        if config.guidance_extractor == "self_attention":
            self.position_embeddings = nn.Embedding(config.max_seq_len, dim)
            nn.init.normal_(self.position_embeddings.weight, std=init_std)
            self.interest = _InterestLogits(dim, config.n_interests)
        widths = ((config.n_interests + 2) * dim, *config.mlp_widths, dim)
        self.denoiser = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def interests(self, items: Tensor, lengths: Tensor) -> Tensor:
        """g `[B, n + 1, K, D]` of the first 0, 1, .. n items of each history; beyond its length they mean nothing.

        items    [B, n] rows of the table, oldest first, the pad row after the first `lengths` of them; n at most L
        lengths  [B]
        """
        embedded = self.dropout(self.item_embeddings(items))
        return self._attend(embedded, lengths) if hasattr(self, "interest") else self._last(embedded)

    def _attend(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """g_k = sum_j softmax_j(l_jk) H_j over the places j of a prefix; l_j = w_2 tanh(w_1 (H_j + P_j))."""
        users, n, dim = embedded.shape
        places = torch.arange(n, device=embedded.device)
        user, place = torch.nonzero(places < lengths[:, None], as_tuple=True)
        given = self.interest(embedded[user, place] + self.position_embeddings.weight[place])
        logits = given.new_zeros(users, n, self.config.n_interests).index_put((user, place), given)

        in_prefix = places < places[:, None] + 1  # [n, n]: the first 1, 2, .. n places
        logits = logits.transpose(1, 2)[:, None]  # [B, 1, K, n]
        weights = torch.softmax(logits.masked_fill(~in_prefix[:, None], -math.inf), dim=-1)  # [B, n, K, n]
        values = embedded + self.position_embeddings.weight[:n] if self.config.positions_in_values else embedded
        g = (weights.flatten(1, 2) @ values).reshape(users, n, self.config.n_interests, dim)
        return torch.cat([g.new_zeros(users, 1, self.config.n_interests, dim), g], dim=1)

    def _last(self, embedded: Tensor) -> Tensor:
        """g_k = H_{n - K + k}, zeros before the first place."""
        before = embedded.new_zeros(embedded.shape[0], self.config.n_interests, embedded.shape[2])
        return torch.cat([before, embedded], dim=1).unfold(1, self.config.n_interests, 1).transpose(2, 3)

    def denoise(self, x_t: Tensor, t: Tensor, g: Tensor) -> Tensor:
        """f `[R, D]` of the states `[R, D]`, their steps t `[R]` in 0 .. T, and the interests `[R, K, D]`."""
        parts = {"x": x_t, "t": self.step_embeddings(t), "g": self.dropout(g).flatten(1)}
        h = torch.cat([parts[name] for name in self.config.mlp_input_order], dim=1)
        activation = _ACTIVATIONS[self.config.mlp_activation]
        for i, layer in enumerate(self.denoiser):
            h = layer(h if i == 0 else self.dropout(activation(h)))
        return h


@torch.no_grad()
def start_at_guidance(network: DimeRecNetwork) -> None:
    """Set the denoiser so that f is the mean of the interests plus what its hidden units beyond the first 2 D add.

    Of each hidden layer, units 0 .. D-1 carry a and D .. 2D-1 carry -a, since act(a) - act(-a) = a for GELU, ReLU and
    SiLU: a network that starts by recommending what is like the history, as one with residual connections does.
    """
    config, dim = network.config, network.config.hidden_size
    one = torch.eye(dim).to(network.item_embeddings.weight)
    blocks, carried = {"x": 1, "t": 1, "g": config.n_interests}, []
    for name in config.mlp_input_order:
        carried += [one * (name == "g") / config.n_interests] * blocks[name]
    a = torch.cat(carried, dim=1)
    for i, layer in enumerate(network.denoiser):
        assert isinstance(layer, nn.Linear)
        last = i == len(network.denoiser) - 1
        rows = a if last else torch.cat([a, -a])
        layer.weight[: len(rows), : rows.shape[1]] = rows
        layer.weight[: len(rows), rows.shape[1] :] *= 0.1
        layer.bias[: len(rows)] = 0.0
        a = torch.cat([one, -one], dim=1)


# --- the recipe -------------------------------------------------------------------------------------------------------


class DimeRec(Recipe):
    method: ClassVar[str] = "dimerec"
    Settings: ClassVar[type[Settings]] = DimeRecSettings

    settings: DimeRecSettings
    one_minus_abar: Tensor

    def __init__(self, settings: DimeRecSettings, data: TrainingData) -> None:
        super().__init__(settings, data)
        self.config = DimeRecConfig(
            n_items=data.n_items,
            hidden_size=settings.hidden_size,
            max_seq_len=settings.max_seq_len,
            schedule=ScheduleConfig(
                settings.schedule,
                settings.num_train_timesteps,
                beta_start=settings.beta_start,
                beta_end=settings.beta_end,
            ),
            n_interests=settings.n_interests,
            guidance_extractor=settings.guidance_extractor,
            mlp_widths=tuple(settings.mlp_widths),
            mlp_activation=settings.mlp_activation,
            normalize_items=settings.normalize_items,
        )
        self.network = DimeRecNetwork(self.config, settings.init_std, settings.dropout)
        if settings.start_at_guidance:
            start_at_guidance(self.network)
        abar = self.config.schedule.build().alphas_cumprod
        one_minus_abar = torch.cat([abar.new_zeros(1), 1 - abar]).float()  # by step t = 0 .. T
        self.register_buffer("one_minus_abar", one_minus_abar, persistent=False)
        self._items, self._targets = stretches(
            data.sequences, settings.max_seq_len, self.config.first_item_row, settings.shortest_history
        )

    def stages(self) -> Sequence[Stage]:
        s = self.settings
        return [
            Stage(
                "joint",
                epochs=s.epochs,
                batch_size=s.batch_size,
                learning_rate=s.learning_rate,
                weight_decay=s.weight_decay,
                cosine_epochs=s.cosine_epochs,
                validate_every=s.validate_every,
                patience=s.patience,
            )
        ]

    def n_examples(self, stage: Stage) -> int:
        return self._items.shape[0]

    def losses(self, stage: Stage, examples: Tensor) -> dict[str, Tensor]:
        items, is_target = self._items[examples].to(self.device), self._targets[examples].to(self.device)
        lengths = (items != self.config.pad_id).sum(dim=1)
        longest = int(lengths.max())
        items, is_target = items[:, :longest], is_target[:, :longest]
        prefixes = self.network.interests(items[:, :-1], lengths - 1)
        return self.loss_terms(prefixes[is_target], items[is_target])

    def loss_terms(self, g: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The weighted losses, means over R: interests g `[R, K, D]` of histories, the rows that came next `[R]`."""
        s, network = self.settings, self.network
        candidates = _Candidates.draw(self.item_vectors(), targets - self.config.first_item_row, s.negatives)

        e_a = candidates.of_targets
        best = torch.einsum("rkd,rd->rk", g, e_a).argmax(dim=1)
        g_u = g[torch.arange(len(g), device=g.device), best]
        losses = {"gem": candidates.cross_entropy(g_u, s.temperature)}

        x_0 = F.normalize(e_a, dim=1)
        if s.stop_target:
            x_0 = x_0.detach()
        t = torch.randint(s.first_timestep, s.num_train_timesteps + 1, (len(targets),)).to(g.device)
        eps = torch.randn(x_0.shape, dtype=x_0.dtype).to(g.device)
        x_t = walk(x_0.detach(), eps, self.one_minus_abar[t], s.tangent, s.quarter_circle)
        f = network.denoise(x_t, t, g.detach() if s.detach_guidance else g)
        losses["recon"] = s.recon_weight * (x_0 - f).square().sum(dim=1).mean()
        query = F.normalize(f, dim=1) if s.unit_output else f
        losses["ssm"] = s.ssm_weight * candidates.cross_entropy(query, s.temperature)
        return losses

    def item_vectors(self) -> Tensor:
        """`[N, D]`: what the softmaxes score."""
        first = self.config.first_item_row
        table = self.network.item_embeddings.weight[first : first + self.config.n_items]
        return F.normalize(table, dim=1) if self.settings.normalize_items else table

    def model(self, stage: Stage) -> Checkpoint:
        generation = GenerationConfig(scheduler="ddpm", num_inference_steps=self.settings.num_inference_steps)
        return self.checkpoint(self.config, generation, self.network)

    def validation_settings(self, stage: Stage) -> dict[str, Any]:
        """All real items, those of the history too; the authors' ranking is not known."""
        return {"ranking": "clean", "filter_seen": False}


@dataclass(frozen=True)
class _Candidates:
    """What the softmaxes of a batch run over: the whole table `[N, D]`, or each target beside shared draws.

    targets  [R] item numbers        of_targets  [R, D] their rows        drawn  [m] item numbers, or None for the table
    """

    table: Tensor
    targets: Tensor
    of_targets: Tensor
    drawn: Tensor | None

    @classmethod
    def draw(cls, table: Tensor, targets: Tensor, negatives: int) -> _Candidates:
        drawn = torch.randint(0, len(table), (negatives * len(targets),)).to(table.device) if negatives else None
        return cls(table, targets, table[targets], drawn)

    def cross_entropy(self, query: Tensor, temperature: float) -> Tensor:
        """Mean over R of -log softmax(query . e / temperature)[target]. Draws are uniform, so that they need no
        correction; a draw that is the row's own target does not count."""
        if self.drawn is None:
            return cross_entropy(query / temperature, self.table, self.targets)
        query = query / temperature
        own = (query * self.of_targets).sum(dim=1, keepdim=True)
        others = query @ self.table[self.drawn].T
        others = others.masked_fill(self.drawn == self.targets[:, None], -math.inf)
        return F.cross_entropy(torch.cat([own, others], dim=1), torch.zeros_like(self.targets))


def stretches(
    sequences: Sequence[Numbers], max_seq_len: int, first_row: int, shortest_history: int
) -> tuple[Tensor, Tensor]:
    """Rows of the table `[W, L + 1]`, filled with 0 on the right, and which of them are targets.

    A sequence longer than L + 1 is cut from its end, each stretch beginning with the last target of the one before:
    every item is a target once, but for the first `shortest_history` of each sequence.
    """
    rows, firsts = [], []
    for sequence in sequences:
        end = len(sequence)
        while end > shortest_history:
            start = max(0, end - max_seq_len - 1)
            rows.append(torch.from_numpy(sequence[start:end]) + first_row)
            firsts.append(shortest_history if start == 0 else max(1, shortest_history))
            end = start + firsts[-1] if start else 0
    items = torch.zeros(len(rows), max_seq_len + 1, dtype=torch.int64)
    targets = torch.zeros(len(rows), max_seq_len + 1, dtype=torch.bool)
    for at, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        items[at, : len(row)] = row
        targets[at, first : len(row)] = True
    return items, targets
