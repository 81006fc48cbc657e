"""TA-Rec as its paper states inference (Mao et al., NeurIPS 2025, Algorithm 3); its own code is not public.

The network is DreamRec's, recomputed in full as published there. One call of the denoiser maps noise to the clean
embedding: x_0 = f(x_T, g, T), where "T" is index T - 1 of a chain that counts from 0, and no noise is added after it.
The algorithm's box has no guidance; with w other than 0 it is DreamRec's (1 + w) f(x, g, t) - w f(x, null, t).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.published.dreamrec import DreamRec


class TARec(DreamRec):
    """DreamRec's network with the one-step sampler."""

    @torch.no_grad()
    def one_step(self, h: Tensor, timestep: int, w: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """x_0 `[B, D]` for guidance vectors `h [B, D]`; `noise [B, D]` is x_T."""
        x = torch.randn_like(h) if noise is None else noise
        t = torch.full((h.shape[0],), timestep, device=h.device, dtype=torch.long)
        x_start: Tensor = self(x, h, t)
        if w != 0.0:
            x_start = (1 + w) * x_start - w * self.forward_uncon(x, t)
        return x_start

    @torch.no_grad()
    def recommend(
        self, states: Tensor, len_states: Tensor, timestep: int, w: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """Scores `[B, item_num + 1]` of all rows of the item table."""
        x = self.one_step(self.condition(states, len_states), timestep, w, noise)
        return torch.matmul(x, self.item_embeddings.weight.transpose(0, 1))
