"""DimeRec as its paper prints inference (Li et al., WSDM 2025, Algorithm 2); there is no public code.

Everything is inside the loop, as in the box: at each of the T steps the interests are extracted from the whole padded
history, the step embedding is looked up, the MLP reads the concatenation of all three, and noise of full size is drawn,
in the last step too, where its factor is 0. What the box leaves open follows the settings of `DimeRecConfig`.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.config import DimeRecConfig

_MASKED = -(2**32) + 1
_ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class DimeRec(nn.Module):
    """states [B, L] int64 right-padded with row 0, len_states [B] int64 (0 for an empty history)."""

    def __init__(self, config: DimeRecConfig) -> None:
        super().__init__()
        self.config = config
        dim, steps = config.hidden_size, config.schedule.num_train_timesteps
        self.item_embeddings = nn.Embedding(config.n_items + 1, dim)
        self.step_embeddings = nn.Embedding(steps + 1, dim)
        if config.guidance_extractor == "self_attention":
            self.position_embeddings = nn.Embedding(config.max_seq_len, dim)
            self.interest = InterestExtractor(dim, config.n_interests, config.positions_in_values)
        widths = ((config.n_interests + 2) * dim, *config.mlp_widths, dim)
        self.denoiser = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        self.betas = config.schedule.build().betas

    def interests(self, states: Tensor, len_states: Tensor) -> Tensor:
        """g `[B, K, D]`."""
        config = self.config
        places = torch.arange(states.shape[1], device=states.device)
        mask = (places < len_states[:, None]).unsqueeze(-1)
        embedded = self.item_embeddings(states) * mask
        if config.guidance_extractor == "self_attention":
            return self.interest(embedded, self.position_embeddings.weight, mask)
        zeros = embedded.new_zeros(config.n_interests, config.hidden_size)
        rows = [torch.cat([zeros, embedded[b, : len_states[b]]])[-config.n_interests :] for b in range(states.shape[0])]
        return torch.stack(rows)

    def denoise(self, x: Tensor, t: Tensor, interests: Tensor) -> Tensor:
        """x_0 `[B, D]` from x_t `[B, D]` and the steps t `[B]`, counted from 1."""
        parts = {
            "x": x,
            "t": self.step_embeddings(t - 1 + self.config.step_offset),
            "g": interests.flatten(1),
        }
        h = torch.cat([parts[name] for name in self.config.mlp_input_order], dim=1)
        for i, layer in enumerate(self.denoiser):
            h = layer(h if i == 0 else _ACTIVATIONS[self.config.mlp_activation](h))
        return h

    @torch.no_grad()
    def sample(self, states: Tensor, len_states: Tensor, noise: Tensor | None = None) -> Tensor:
        """e_u `[B, D]`; `noise [T + 1, B, D]` holds x_T, then one draw per step."""
        config, users = self.config, states.shape[0]
        alphas = 1.0 - self.betas
        abar = torch.cumprod(alphas, dim=0)
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        variance = self.betas * (1.0 - abar_prev) / (1.0 - abar)
        table = self.item_embeddings.weight

        def draw(number: int) -> Tensor:
            return torch.randn(users, config.hidden_size).to(table) if noise is None else noise[number]

        x = draw(0)
        if config.normalize_start:
            x = _l2_norm(x)
        steps = self.betas.shape[0]
        for t in range(steps, 0, -1):
            if config.normalize == "before":
                x = _l2_norm(x)
            interests = self.interests(states, len_states)
            n = t - 1
            x_start = self.denoise(x, torch.full((users,), t, device=x.device), interests)
            mean = (self.betas[n] * torch.sqrt(abar_prev[n]) / (1.0 - abar[n])) * x_start
            mean = mean + ((1.0 - abar_prev[n]) * torch.sqrt(alphas[n]) / (1.0 - abar[n])) * x
            scale = torch.sqrt(variance[n]) if config.noise_scale == "sqrt" else variance[n]
            x = mean + scale * draw(1 + steps - t)
            if config.normalize == "after":
                x = _l2_norm(x)
        return x

    @torch.no_grad()
    def predict(self, states: Tensor, len_states: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scores `[B, N]` of the real items, rows 1 .. N of the table."""
        items = self.item_embeddings.weight[1:]
        if self.config.normalize_items:
            items = _l2_norm(items)
        return self.sample(states, len_states, noise) @ items.T


class InterestExtractor(nn.Module):
    """ComiRec-SA: g = softmax over places of w_2 tanh(w_1 (H + P)), applied to the values."""

    def __init__(self, dim: int, n_interests: int, positions_in_values: bool) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, 4 * dim)
        self.w_2 = nn.Linear(4 * dim, n_interests)
        self.positions_in_values = positions_in_values

    def forward(self, embedded: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """embedded [B, L, D], positions [L, D], mask [B, L, 1] -> [B, K, D]."""
        placed = embedded + positions
        logits = self.w_2(torch.tanh(self.w_1(placed)))
        logits = torch.where(mask, logits, torch.full_like(logits, _MASKED))
        values = placed * mask if self.positions_in_values else embedded
        return torch.matmul(torch.softmax(logits, dim=1).transpose(1, 2), values)


def _l2_norm(x: Tensor) -> Tensor:
    return F.normalize(x, p=2.0, dim=-1)
