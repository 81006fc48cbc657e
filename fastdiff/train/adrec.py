"""ADRec: every item of a history is diffused on its own, and denoised given a clean causal encoding of what came first.

Paper: "Unlocking the Power of Diffusion Models in Sequential Recommendation: A Simple and Effective Approach"
(KDD 2025, arXiv 2505.19544); `fastdiff.models.adrec` is its inference. d is dropout, a_t is alphas_cumprod.

For a history s_1 .. s_n with the targets y_j = E[s_{j+1}], one timestep t_j per item, uniform in 0 .. T - 1:

    c      = CAM(LN(d(E[s])))                                      causal transformer
    x_j    = sqrt(a_{t_j}) y_j + sqrt(1 - a_{t_j}) z_j             pads: x = E[0], t = 0
    o      = ADM(c + lambda (x + tau(t)))                          causal transformer, or an MLP item by item

    CE     mean over all real slots of the batch of  -log softmax(o_j . E^T)[s_{j+1}]       all rows of E, the pad's too
    MSE    mean over users of the mean over a user's real slots of  |o_j - y_j|^2 / D       no stop-gradient on y
    loss   (CE + mse_weight MSE) / 2

Three stages: `pretrain` learns E as the item table of a SASRec without positions (`fastdiff.train.sasrec`), `warmup`
everything but E, `full` everything.

What the authors' code does beyond the paper
  - The gradients of the two losses are merged by PCGrad's wrapper. Without projection, their default, it takes the mean
    where both losses reach a weight and the sum elsewhere; both reach every weight, so that is half of either, as
    above. `pcgrad` projects first: g_i - min(0, g_i . g_j) g_j / |g_j|^2 for both i, then the mean.
  - The frozen table is not still. The wrapper hands Adam a gradient of zeros for it, Adam adds the L2 decay and divides
    the sum by its own size: in the warm-up every weight of E moves towards 0 by the learning rate in every step, by
    0.01 in all on ML-100K, 0.1 on Beauty. Default here too (`shrink_frozen`): the published figures have it.
  - `guidance_scale` other than 1 trains with c = 0, in all slots, for 3 users in 10 (`condition_dropout`).
  - `geodesic` puts y on the unit sphere and x_j at cos|v| y_j + sin|v| v / |v|, v the x_j above. The CE's table is as
    it is.
  - real slots attend to pads: `fastdiff.train.layers`.

Choices of ours
  - Warm-up and full are two stages, so Adam's moments begin at zero twice, and the cosine, 500 epochs long, 5 epochs
    later (0.03 % of the learning rate). In the authors' one run those of all weights but E go on.
  - The first validation comes after 5 epochs of `full`.
  - tau is evaluated for the T timesteps that there are, not for every item.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import ADRecConfig, default_generation_config
from fastdiff.errors import InvalidArgument
from fastdiff.models.layers import sinusoidal_embedding
from fastdiff.schedule import ScheduleConfig
from fastdiff.train.data import TrainingData
from fastdiff.train.layers import NORM_EPS, CausalTransformer, Packed, PadRows
from fastdiff.train.recipe import QueryModel, Recipe, Settings, Stage
from fastdiff.train.sasrec import NextItems, SASRecNetwork
from fastdiff.train.softmax import cross_entropy


@dataclass(frozen=True)
class ADRecSettings(Settings):
    """Defaults: the authors' config.yaml. Their seed is 2025.

    hidden_size, max_seq_len, n_heads       D, L, heads of all transformers
    n_encoder_layers, n_decoder_layers      blocks of CAM (and of the first stage's SASRec) and of ADM
    decoder             ADM: "attention" or "mlp"
    num_train_timesteps, beta_schedule      T, a family of `fastdiff.schedule`
    lambda_uncertainty, rescale_timesteps, geodesic   as in `ADRecConfig`
    guidance_scale      of inference; other than 1, the condition is dropped in training
    condition_dropout   share of users whose condition is dropped
    mse_weight          the authors' loss_scale
    pcgrad              project conflicting gradients
    shrink_frozen       the authors' decay of the frozen table; False keeps it as pretrained
    dropout             inside the transformers         emb_dropout  of the history's embeddings
    pretrain_epochs, warmup_epochs, epochs  of the three stages, at most
    weight_decay        L2, inside Adam                 cosine_epochs  of the learning rate, in each stage
    validate_every, patience, watch  as in `Stage`: the authors go on while any of six metrics gets better; no
                        validation in the warm-up
    """

    hidden_size: int = 128
    max_seq_len: int = 50
    n_heads: int = 4
    n_encoder_layers: int = 2
    n_decoder_layers: int = 2
    decoder: str = "attention"
    num_train_timesteps: int = 32
    beta_schedule: str = "trunc_lin"
    lambda_uncertainty: float = 0.001
    rescale_timesteps: bool = True
    geodesic: bool = False
    guidance_scale: float = 1.0
    condition_dropout: float = 0.3
    mse_weight: float = 1.0
    pcgrad: bool = False
    shrink_frozen: bool = True
    dropout: float = 0.1
    emb_dropout: float = 0.3
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    pretrain_epochs: int = 500
    warmup_epochs: int = 5
    epochs: int = 495
    cosine_epochs: int = 500
    validate_every: int = 5
    patience: int = 4
    watch: tuple[str, ...] = ("HR@5", "NDCG@5", "HR@10", "NDCG@10", "HR@20", "NDCG@20")

    def __post_init__(self) -> None:
        if min(self.pretrain_epochs, self.warmup_epochs, self.epochs) < 1:
            raise InvalidArgument(
                "ADRecSettings: pretrain_epochs, warmup_epochs and epochs must be at least 1 "
                f"(got {self.pretrain_epochs}, {self.warmup_epochs}, {self.epochs})"
            )

    def config(self, n_items: int) -> ADRecConfig:
        return ADRecConfig(
            n_items=n_items,
            hidden_size=self.hidden_size,
            max_seq_len=self.max_seq_len,
            schedule=ScheduleConfig(self.beta_schedule, self.num_train_timesteps),
            n_heads=self.n_heads,
            n_encoder_layers=self.n_encoder_layers,
            n_decoder_layers=self.n_decoder_layers,
            decoder=self.decoder,
            lambda_uncertainty=self.lambda_uncertainty,
            rescale_timesteps=self.rescale_timesteps,
            geodesic=self.geodesic,
        )


# --- the network ------------------------------------------------------------------------------------------------------


class _Denoiser(nn.Module):
    """ADM and tau."""

    def __init__(self, config: ADRecConfig, dropout: float) -> None:
        super().__init__()
        dim = config.hidden_size
        self.decoder: nn.Module
        if config.decoder == "mlp":
            layers = (nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim), nn.LayerNorm(dim))
            self.decoder = nn.Sequential(*layers)
        else:
            self.decoder = CausalTransformer(dim, config.n_heads, config.n_decoder_layers, dropout)
        self.time_embed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))


class _Diffusion(nn.Module):
    def __init__(self, config: ADRecConfig, dropout: float) -> None:
        super().__init__()
        self.net = _Denoiser(config, dropout)
        self.ag_encoder = CausalTransformer(config.hidden_size, config.n_heads, config.n_encoder_layers, dropout)


class ADRecNetwork(nn.Module):
    """The network under the authors' names, over packed histories (`fastdiff.train.layers`)."""

    sinusoids: Tensor

    def __init__(self, config: ADRecConfig, dropout: float, emb_dropout: float) -> None:
        super().__init__()
        dim, steps = config.hidden_size, config.schedule.num_train_timesteps
        self.config = config
        self.item_embedding = nn.Embedding(config.n_rows, dim, padding_idx=config.pad_id)
        self.embed_dropout = nn.Dropout(emb_dropout)
        self.hist_norm = nn.LayerNorm(dim, NORM_EPS)
        self.diffu = _Diffusion(config, dropout)
        fed = torch.arange(steps) * (1000.0 / steps if config.rescale_timesteps else 1.0)
        self.register_buffer("sinusoids", sinusoidal_embedding(fed, dim, "cos_sin", "half"), persistent=False)

    def encode(self, batch: Packed, table: Tensor) -> tuple[Tensor, PadRows]:
        """c [N, D] and what it is at pads."""
        rows = self.hist_norm(self.embed_dropout(F.embedding(batch.items, table)))
        pads = PadRows(self.hist_norm(self._pad(table)).view(1, 1, -1))
        out: tuple[Tensor, PadRows] = self.diffu.ag_encoder(rows, batch, pads)
        return out

    def denoise(self, c: Tensor, pads: PadRows, x_t: Tensor, t: Tensor, batch: Packed, table: Tensor) -> Tensor:
        """o [N, D] from c [N, D], x_t [N, D] and timesteps t [N]."""
        net, lambda_ = self.diffu.net, self.config.lambda_uncertainty
        tau: Tensor = net.time_embed(self.sinusoids.to(c.dtype))
        u: Tensor = c + lambda_ * (x_t + F.embedding(t, tau))
        if isinstance(net.decoder, CausalTransformer):
            pad = lambda_ * (self.target(self._pad(table)) + tau[0])
            u, _ = net.decoder(u, batch, PadRows(pads.hidden + pad, pads.kind))
        else:
            u = net.decoder(u)
        return u

    def target(self, embeddings: Tensor) -> Tensor:
        """y [.., D] of embeddings [.., D]."""
        return F.normalize(embeddings, p=2.0, dim=-1) if self.config.geodesic else embeddings

    def _pad(self, table: Tensor) -> Tensor:
        """[D]. The pad's row is a parameter, and learns from the loss's catalogue alone."""
        return table[self.config.pad_id].detach()


def diffuse(x_start: Tensor, alphas_cumprod: Tensor, noise: Tensor, geodesic: bool) -> Tensor:
    """x_t [N, D] of x_start [N, D] under noise [N, D]; alphas_cumprod [N], that of each row's timestep."""
    a = alphas_cumprod.unsqueeze(1)
    x_t = a.sqrt() * x_start + (1 - a).sqrt() * noise
    if not geodesic:
        return x_t
    norm = x_t.norm(dim=1, keepdim=True)
    moved: Tensor = norm.cos() * x_start + norm.sin() * x_t / (norm + 1e-8)
    return moved


def drop_condition(c: Tensor, pads: PadRows, dropped: Tensor, batch: Packed) -> tuple[Tensor, PadRows]:
    """c = 0 in all slots, pads too, of users with dropped [B] (bool, in packed order)."""
    kinds = torch.cat([pads.hidden, torch.zeros_like(pads.hidden)])
    return c.masked_fill(batch.per_row(dropped).unsqueeze(1), 0.0), PadRows(kinds, dropped.long())


def project_conflicting(one: Tensor, two: Tensor) -> Tensor:
    """PCGrad (Yu et al. 2020) of two gradients [W]: each loses its part against the other; their sum."""
    dot = one @ two
    if dot >= 0:
        return one + two
    return (one - dot / (two @ two) * two) + (two - dot / (one @ one) * one)


# --- the recipe -------------------------------------------------------------------------------------------------------


class ADRec(Recipe):
    """See the module's docstring."""

    method = "adrec"
    Settings = ADRecSettings
    settings: ADRecSettings
    alphas_cumprod: Tensor

    def __init__(self, settings: ADRecSettings, data: TrainingData) -> None:
        super().__init__(settings, data)
        s = settings
        self.config = s.config(data.n_items)
        self.examples = NextItems.of(data, s.max_seq_len)
        self.network = ADRecNetwork(self.config, s.dropout, s.emb_dropout)
        self.pretrained = SASRecNetwork(
            data.n_items,
            s.hidden_size,
            s.max_seq_len,
            s.n_heads,
            s.n_encoder_layers,
            s.dropout,
            s.emb_dropout,
            positions=False,
        )
        self.register_buffer("alphas_cumprod", self.config.schedule.build().alphas_cumprod.float(), persistent=False)

    def stages(self) -> Sequence[Stage]:
        s = self.settings

        def stage(name: str, epochs: int, validate_every: int) -> Stage:
            return Stage(
                name,
                epochs,
                s.batch_size,
                s.learning_rate,
                weight_decay=s.weight_decay,
                cosine_epochs=s.cosine_epochs,
                validate_every=validate_every,
                patience=s.patience,
                watch=s.watch,
            )

        return [
            stage("pretrain", s.pretrain_epochs, s.validate_every),
            stage("warmup", s.warmup_epochs, 0),
            stage("full", s.epochs, s.validate_every),
        ]

    def n_examples(self, stage: Stage) -> int:
        return len(self.examples)

    def enter(self, stage: Stage) -> None:
        if stage.name == "warmup":
            with torch.no_grad():
                self.network.item_embedding.weight.copy_(self.pretrained.item_embedding.weight)

    def trained(self, stage: Stage) -> Iterable[nn.Parameter]:
        if stage.name == "pretrain":
            return self.pretrained.parameters()
        table = self.network.item_embedding.weight
        if stage.name == "warmup" and not self.settings.shrink_frozen:
            return [parameter for parameter in self.network.parameters() if parameter is not table]
        return self.network.parameters()

    def losses(self, stage: Stage, examples: Tensor) -> dict[str, Tensor]:
        batch, targets = self.examples.batch(examples)
        batch, targets = batch.to(self.device), targets.to(self.device)
        if stage.name == "pretrain":
            rows, _ = self.pretrained(batch)
            return {"ce": cross_entropy(rows, self.pretrained.item_embedding.weight, targets)}
        table = self.network.item_embedding.weight
        timesteps = torch.randint(0, self.settings.num_train_timesteps, targets.shape, device=self.device)
        noise = torch.randn(len(targets), table.shape[1], device=self.device)
        dropped = None
        if self.settings.guidance_scale != 1.0:
            dropped = torch.rand(len(batch.lengths), device=self.device) < self.settings.condition_dropout
        return self.terms(
            table.detach() if stage.name == "warmup" else table, batch, targets, timesteps, noise, dropped
        )

    def terms(
        self, table: Tensor, batch: Packed, targets: Tensor, timesteps: Tensor, noise: Tensor, dropped: Tensor | None
    ) -> dict[str, Tensor]:
        """Half of CE and of MSE.

        table  [n_rows, D]      targets, timesteps  [N]      noise  [N, D]      dropped  [B] bool, in packed order
        """
        network = self.network
        y = network.target(F.embedding(targets, table))
        x_t = diffuse(y, self.alphas_cumprod[timesteps], noise, self.config.geodesic)
        c, pads = network.encode(batch, table)
        if dropped is not None:
            c, pads = drop_condition(c, pads, dropped, batch)
        o = network.denoise(c, pads, x_t, timesteps, batch, table)

        share = batch.per_row(batch.lengths.to(o.dtype).reciprocal()) / len(batch.lengths)  # in the mean over users
        mse = ((o - y).square().mean(1) * share).sum()
        return {"ce": 0.5 * cross_entropy(o, table, targets), "mse": 0.5 * self.settings.mse_weight * mse}

    def backward(self, stage: Stage, losses: dict[str, Tensor]) -> None:
        if stage.name == "pretrain" or not self.settings.pcgrad:
            super().backward(stage, losses)
        else:
            self._backward_projected(losses)
        if stage.name == "warmup" and self.settings.shrink_frozen:
            table = self.network.item_embedding.weight
            table.grad = torch.zeros_like(table)

    def _backward_projected(self, losses: dict[str, Tensor]) -> None:
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        sizes = [weight.numel() for weight in weights]
        flat = []
        for loss in losses.values():
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            flat.append(torch.cat([gradient.flatten() for gradient in gradients]))
        merged = project_conflicting(*flat)
        for weight, gradient in zip(weights, torch.split(merged, sizes), strict=True):
            weight.grad = gradient.view_as(weight)

    def model(self, stage: Stage) -> Checkpoint | QueryModel:
        if stage.name == "pretrain":
            return self.pretrained.query_model()
        generation = default_generation_config(self.config, self.settings.guidance_scale)
        return self.checkpoint(self.config, generation, self.network)
