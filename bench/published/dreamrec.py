"""DreamRec as its authors run it (Yang et al., NeurIPS 2023): the algorithm of their public code, at its cost.

The network recomputes everything at every step and calls the denoiser twice per step, whatever the guidance weight;
the diffusion gathers three coefficients per step from tables on the CPU and draws noise of full size. Parameter and
attribute names are the authors', so their checkpoints load with `load_state_dict`.

It differs from their code in three ways, none of which changes a number that their code can produce in `eval()` mode:
dropout is left out (it is the identity there; their own evaluation forgets `eval()`), the width is not fixed to 64,
and a batch of one user works. Noise may be given, in the order in which the sampler consumes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASKED = -(2**32) + 1

Denoiser = Callable[..., Tensor]


def beta_table(beta_schedule: str, timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The four schedules of the code, `[T]` float32: "linear", "exp", "cosine", "sqrt"."""
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, timesteps)
    if beta_schedule == "exp":
        low, high = 0.1, 10
        grid = torch.linspace(1, 2 * timesteps + 1, timesteps)
        return 1 - torch.exp(-low / timesteps - grid * 0.5 * (high - low) / (timesteps * timesteps))
    if beta_schedule == "cosine":
        grid = torch.linspace(0, timesteps, timesteps + 1)
        abar = torch.cos(((grid / timesteps) + 0.008) / (1 + 0.008) * torch.pi * 0.5) ** 2
        abar = abar / abar[0]
        return torch.clip(1 - (abar[1:] / abar[:-1]), 0.0001, 0.9999)
    if beta_schedule == "sqrt":
        abar_at = [1 - math.sqrt(i / timesteps + 0.0001) for i in range(timesteps + 1)]
        ratios = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(abar_at)]
        return torch.tensor(ratios, dtype=torch.float64).float()
    raise ValueError(f"beta_table: beta_schedule must be linear, exp, cosine or sqrt (got {beta_schedule!r})")


class Diffusion:
    """Ancestral sampling guided by (1 + w) f(x, h, t) - w f(x, null, t); tables in float32 on the CPU."""

    def __init__(
        self,
        timesteps: int,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        w: float = 2.0,
        beta_schedule: str = "exp",
    ) -> None:
        self.timesteps, self.w = timesteps, w
        self.betas = beta_table(beta_schedule, timesteps, beta_start, beta_end)
        alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(alphas, dim=0)
        abar_prev = F.pad(self.alphas_cumprod[:-1], (1, 0), value=1.0)
        rest = 1.0 - self.alphas_cumprod
        self.posterior_mean_coef1 = self.betas * torch.sqrt(abar_prev) / rest
        self.posterior_mean_coef2 = (1.0 - abar_prev) * torch.sqrt(alphas) / rest
        self.posterior_variance = self.betas * (1.0 - abar_prev) / rest

    @torch.no_grad()
    def sample(self, conditional: Denoiser, unconditional: Denoiser, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_0 `[B, D]` for conditions `h [B, D]`; `noise [T, B, D]` holds x_T, then one draw per step but the last."""
        x = torch.randn_like(h) if noise is None else noise[0]
        for n in reversed(range(self.timesteps)):
            t = torch.full((h.shape[0],), n, device=h.device, dtype=torch.long)
            draw = None if noise is None or n == 0 else noise[self.timesteps - n]
            x = self._step(conditional, unconditional, x, h, t, n, draw)
        return x

    def _step(
        self,
        conditional: Denoiser,
        unconditional: Denoiser,
        x: Tensor,
        h: Tensor,
        t: Tensor,
        n: int,
        draw: Tensor | None,
    ) -> Tensor:
        x_start = (1 + self.w) * conditional(x, h, t) - self.w * unconditional(x, t)
        mean = _gather(self.posterior_mean_coef1, t) * x_start + _gather(self.posterior_mean_coef2, t) * x
        if n == 0:
            return mean
        variance = _gather(self.posterior_variance, t)
        return mean + torch.sqrt(variance) * (torch.randn_like(x) if draw is None else draw)


def _gather(table: Tensor, t: Tensor) -> Tensor:
    """One coefficient per row `[B, 1]`, by way of the CPU where the tables live."""
    return table.gather(-1, t.cpu()).reshape(-1, 1).to(t.device)


class DreamRec(nn.Module):
    """The encoder of histories and the denoiser. Histories are right-padded with `item_num` to `state_size` places.

    states [B, state_size] int64, len_states [B] int64; an empty history is all pads with length 1, as in the datasets.
    """

    def __init__(self, hidden_size: int, item_num: int, state_size: int, diffuser_type: str = "mlp1") -> None:
        super().__init__()
        self.hidden_size, self.item_num, self.state_size = hidden_size, item_num, state_size
        self.diffuser_type = diffuser_type
        self.item_embeddings = nn.Embedding(item_num + 1, hidden_size)
        self.none_embedding = nn.Embedding(1, hidden_size)
        self.positional_embeddings = nn.Embedding(state_size, hidden_size)
        self.ln_1 = nn.LayerNorm(hidden_size)
        self.ln_2 = nn.LayerNorm(hidden_size)
        self.ln_3 = nn.LayerNorm(hidden_size)
        self.mh_attn = MultiHeadAttention(hidden_size)
        self.feed_forward = PositionwiseFeedForward(hidden_size)
        self.s_fc = nn.Linear(hidden_size, item_num)
        self.step_mlp = nn.Sequential(
            SinusoidalEmbedding(hidden_size),
            nn.Linear(hidden_size, hidden_size * 2),
            nn.GELU(),
            nn.Linear(hidden_size * 2, hidden_size),
        )
        self.emb_mlp = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, hidden_size * 2))
        self.diff_mlp = _two_layers(hidden_size)
        if diffuser_type == "mlp1":
            self.diffuser = nn.Sequential(nn.Linear(hidden_size * 3, hidden_size))
        elif diffuser_type == "mlp2":
            self.diffuser = _two_layers(hidden_size)
        else:
            raise ValueError(f"DreamRec: diffuser_type must be mlp1 or mlp2 (got {diffuser_type!r})")

    def forward(self, x: Tensor, h: Tensor, step: Tensor) -> Tensor:
        """The conditional denoiser: x_0 `[B, D]` from x_t `[B, D]`, h `[B, D]` and step `[B]`."""
        return self.diffuser(torch.cat((x, h, self._time(step, x.dtype)), dim=1))

    def forward_uncon(self, x: Tensor, step: Tensor) -> Tensor:
        """The unconditional denoiser: the learned null token in the place of h."""
        null = self.none_embedding(torch.tensor([0], device=x.device))
        null = torch.cat([null.view(1, self.hidden_size)] * x.shape[0], dim=0)
        return self.diffuser(torch.cat((x, null, self._time(step, x.dtype)), dim=1))

    def _time(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        sinusoid, *layers = self.step_mlp
        tau = sinusoid(step).to(dtype)
        for layer in layers:
            tau = layer(tau)
        return tau

    def condition(self, states: Tensor, len_states: Tensor) -> Tensor:
        """h `[B, D]`: every row of the transformer is computed, one is kept."""
        seq = self.item_embeddings(states)
        seq = seq + self.positional_embeddings(torch.arange(self.state_size, device=states.device))
        mask = torch.ne(states, self.item_num).to(seq.dtype).unsqueeze(-1)
        seq = seq * mask
        attended = self.mh_attn(self.ln_1(seq), seq)
        out = self.feed_forward(self.ln_2(attended)) * mask
        out = self.ln_3(out)
        return torch.stack([out[b, len_states[b] - 1, :] for b in range(out.shape[0])], dim=0)

    @torch.no_grad()
    def predict(self, states: Tensor, len_states: Tensor, diffusion: Diffusion, noise: Tensor | None = None) -> Tensor:
        """Scores `[B, item_num + 1]` of all rows of the item table, the pad row included."""
        x = diffusion.sample(self.forward, self.forward_uncon, self.condition(states, len_states), noise)
        return torch.matmul(x, self.item_embeddings.weight.transpose(0, 1))


class SinusoidalEmbedding(nn.Module):
    """sin then cos of t 10000^(-k / (dim/2 - 1)), in float32 whatever the weights are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        rate = math.log(10000) / max(half - 1, 1)
        frequencies = torch.exp(torch.arange(half, device=time.device) * -rate).float()
        angles = time[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class MultiHeadAttention(nn.Module):
    """One head without an output projection; keys and queries whose features sum to exactly zero are masked."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.linear_q = nn.Linear(hidden_size, hidden_size)
        self.linear_k = nn.Linear(hidden_size, hidden_size)
        self.linear_v = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries, keys [B, L, D] -> [B, L, D], the queries added."""
        q, k, v = self.linear_q(queries), self.linear_k(keys), self.linear_v(keys)
        logits = torch.bmm(q, k.transpose(1, 2)) / self.hidden_size**0.5
        key_mask = torch.sign(torch.abs(keys.sum(dim=-1))).unsqueeze(1).repeat(1, queries.shape[1], 1)
        masked = torch.ones_like(logits) * _MASKED
        logits = torch.where(torch.eq(key_mask, 0), masked, logits)
        causal = torch.tril(torch.ones_like(logits[0])).unsqueeze(0).repeat(logits.shape[0], 1, 1)
        logits = torch.where(torch.eq(causal, 0), masked, logits)
        weights = torch.softmax(logits, dim=-1)
        query_mask = torch.sign(torch.abs(queries.sum(dim=-1))).unsqueeze(-1).repeat(1, 1, keys.shape[1])
        return torch.bmm(weights * query_mask, v) + queries


class PositionwiseFeedForward(nn.Module):
    """LayerNorm(W_2 relu(W_1 x) + x), the two layers as 1x1 convolutions."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.w_1 = nn.Conv1d(hidden_size, hidden_size, 1)
        self.w_2 = nn.Conv1d(hidden_size, hidden_size, 1)
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        output = self.w_2(F.relu(self.w_1(x.transpose(1, 2)))).transpose(1, 2)
        return self.layer_norm(output + x)


def _two_layers(hidden_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_size * 3, hidden_size * 2), nn.GELU(), nn.Linear(hidden_size * 2, hidden_size)
    )
