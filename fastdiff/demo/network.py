"""TA-Rec as a trainable module under DreamRec's parameter names, and the losses of its two stages (arXiv 2510.17245).

    stage 1   L = L_diff + lambda_c L_TCR + lambda_e L_CE                                          (`pretraining_loss`)
    stage 2   L = L_APA, encoder and item table frozen                                             (`preference_loss`)

    L_diff    E | sg(x) - f(x_t, g, t) |^2                          x = e_target, x_t from the forward process
    L_TCR     E | f(x_t, g, t) - f(x_{t-1}, g, t-1) |^2             temporal consistency; one noise for both
    L_CE      E -log softmax(f(x_t, g, t) . E / sqrt(D))[target]
    L_APA     E -log sigmoid(-lambda_b [ (|x+ - f(x+_t)|^2 - |x+ - f_ref(x+_t)|^2) - (the same of x-) ])
              lambda_b = 1/2 ((1 - t/T) + (1 - cos(x+, x-))), x- a random other item, one noise for x+_t and x-_t

L_CE and the stop-gradient sg are not in the paper: with reconstruction alone a table that is learned along shrinks,
since all embeddings equal to 0 is an optimum. `train.py` says what each of them brings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.config import TARecConfig
from fastdiff.models.layers import sinusoidal_embedding


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)


class _FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w_1 = nn.Conv1d(dim, dim, 1)
        self.w_2 = nn.Conv1d(dim, dim, 1)
        self.layer_norm = nn.LayerNorm(dim)


class _Time(nn.Module):
    """The sinusoids, where DreamRec's `step_mlp` has them: number 0 of the sequence, without weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        return sinusoidal_embedding(timesteps, self.dim, "sin_cos", "half_minus_one")


class TARecNetwork(nn.Module):
    """Encoder and denoiser of `fastdiff.models.tarec`, for whole histories at once: every prefix is a training case."""

    def __init__(self, config: TARecConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.config = config
        self.item_embeddings = nn.Embedding(config.n_rows, dim)
        self.none_embedding = nn.Embedding(1, dim)
        self.positional_embeddings = nn.Embedding(config.max_seq_len, dim)
        self.ln_1, self.ln_2, self.ln_3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mh_attn = _Attention(dim)
        self.feed_forward = _FeedForward(dim)
        self.step_mlp = nn.Sequential(_Time(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        if config.denoiser == "mlp1":
            self.diffuser = nn.Sequential(nn.Linear(3 * dim, dim))
        else:
            self.diffuser = nn.Sequential(nn.Linear(3 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def encode(self, items: Tensor) -> Tensor:
        """g `[B, L + 1, D]` of the prefixes of 0, 1, .. L items of histories `[B, L]`; L at most the model's window."""
        places = torch.arange(items.shape[1], device=items.device)
        e = self.item_embeddings(items) + self.positional_embeddings(places)
        query = self.ln_1(e)
        attention = self.mh_attn
        mixed = F.scaled_dot_product_attention(
            attention.linear_q(query), attention.linear_k(e), attention.linear_v(e), is_causal=True
        )
        z = self.ln_2(query + mixed)
        hidden = self.feed_forward.w_2(F.relu(self.feed_forward.w_1(z.transpose(1, 2)))).transpose(1, 2)
        out = self.ln_3(self.feed_forward.layer_norm(hidden + z))
        cold = self.ln_3.bias.expand(items.shape[0], 1, -1)  # an empty history is a zero row before the last norm
        return torch.cat([cold, out], dim=1)

    def denoise(self, x_t: Tensor, g: Tensor, timesteps: Tensor) -> Tensor:
        """f(x_t, g, t) `[R, D]`."""
        out: Tensor = self.diffuser(torch.cat([x_t, g, self.step_mlp(timesteps)], dim=1))
        return out


@dataclass(frozen=True)
class LossWeights:
    """Weights of stage 1's terms. `drop_guidance` is the share of cases trained with the null token instead of g."""

    consistency: float = 0.4
    ranking: float = 4.0
    drop_guidance: float = 0.1


def add_noise(alphas_cumprod: Tensor, x: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """q(x_t | x): sqrt(abar_t) x + sqrt(1 - abar_t) noise. All `[R, D]`, timesteps `[R]`."""
    abar = alphas_cumprod[timesteps][:, None]
    return abar.sqrt() * x + (1 - abar).sqrt() * noise


def pretraining_loss(network: TARecNetwork, alphas_cumprod: Tensor, items: Tensor, weights: LossWeights) -> Tensor:
    """Stage 1 on sequences `[B, L + 1]`: every item is the target of the prefix before it."""
    g = network.encode(items[:, :-1]).flatten(0, 1)
    targets = items.flatten()
    null = torch.rand(g.shape[0], 1) < weights.drop_guidance
    g = torch.where(null, network.none_embedding.weight, g)

    x = network.item_embeddings(targets).detach()
    noise = torch.randn_like(x)
    t = torch.randint(1, network.config.schedule.num_train_timesteps, (g.shape[0],))
    estimate = network.denoise(add_noise(alphas_cumprod, x, t, noise), g, t)
    earlier = network.denoise(add_noise(alphas_cumprod, x, t - 1, noise), g, t - 1)

    table = network.item_embeddings.weight[: network.config.n_items]
    ranking = F.cross_entropy(estimate @ table.T / math.sqrt(x.shape[1]), targets)
    return F.mse_loss(estimate, x) + weights.consistency * F.mse_loss(estimate, earlier) + weights.ranking * ranking


def preference_loss(
    network: TARecNetwork, reference: TARecNetwork, alphas_cumprod: Tensor, items: Tensor, base: float = 0.5
) -> Tensor:
    """Stage 2 on sequences `[B, L + 1]`: prefer the item chosen over a random other one, more than `reference` does."""
    config, total = network.config, network.config.schedule.num_train_timesteps
    with torch.no_grad():
        g = network.encode(items[:, :-1]).flatten(0, 1)
        targets = items.flatten()
        others = (targets + torch.randint(1, config.n_items, targets.shape)) % config.n_items
        chosen, rejected = network.item_embeddings(targets), network.item_embeddings(others)
        noise = torch.randn_like(chosen)
        t = torch.randint(0, total, targets.shape)
        noisy = [add_noise(alphas_cumprod, x, t, noise) for x in (chosen, rejected)]
        before = [_distance(x, reference.denoise(x_t, g, t)) for x, x_t in zip((chosen, rejected), noisy, strict=True)]
        weight = base * ((1 - t / total) + (1 - F.cosine_similarity(chosen, rejected)))
    after = [_distance(x, network.denoise(x_t, g, t)) for x, x_t in zip((chosen, rejected), noisy, strict=True)]
    margin = (after[0] - before[0]) - (after[1] - before[1])
    return -F.logsigmoid(-weight * margin).mean()


def _distance(x: Tensor, estimate: Tensor) -> Tensor:
    return (x - estimate).square().sum(dim=1)
