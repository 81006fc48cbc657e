"""ADRec as its authors publish it: every step runs the whole decoder over all L slots and draws noise for all of them.

Paper: "Unlocking the Power of Diffusion Models in Sequential Recommendation: A Simple and Effective Approach"
(KDD 2025, arXiv 2505.19544); their code is github.com/Nemo-1024/ADRec. Re-expressed here, operation for operation, as
the yardstick of tests and benchmarks: parameter names and the attributes that hold settings are theirs, so their state
dicts load, and `fastdiff.accelerate` sees what a live module of theirs shows it.

Beyond their code: it runs in any floating dtype (where they cast to float32, it casts to the model's dtype; sinusoids
stay float32), histories of 0 and 1 items and chains of one step work, and the numbers of heads and blocks, which they
fix at 4 and 2, can be given.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULTS: dict[str, Any] = {
    "hidden_size": 128,
    "max_len": 50,
    "item_num": 1000,
    "diffusion_steps": 32,
    "noise_schedule": "trunc_lin",
    "beta_a": 0.3,
    "beta_b": 10,
    "rescale_timesteps": True,
    "lambda_uncertainty": 0.001,
    "dif_decoder": "att",
    "is_causal": True,
    "cfg_scale": 1,
    "geodesic": False,
    "independent": True,
    "dif_blocks": 2,
}
"""The authors' config.yaml, as far as inference reads it."""


# --- schedules --------------------------------------------------------------------------------------------------------


def betas_of(args: SimpleNamespace) -> np.ndarray:
    """The betas [T] float64 of `args.noise_schedule`."""
    name, steps = args.noise_schedule, args.diffusion_steps
    scale = 1000 / steps
    if name == "linear":
        return torch.linspace(scale * 0.0001, scale * 0.02, steps, dtype=torch.float64).numpy()
    if name == "trunc_lin":
        end = scale * 0.02 + 0.01
        return np.linspace(scale * 0.0001 + 0.01, end if end <= 1 else scale * 0.001 + 0.01, steps)
    if name == "pw_lin":
        low = scale * 0.0001
        return np.concatenate([np.linspace(low + 0.01, low, 10), np.linspace(low, scale * 0.02, steps - 10)])
    if name == "cosine":
        return _from_alpha_bar(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, steps)
    if name == "sqrt":
        return _from_alpha_bar(lambda t: 1 - np.sqrt(t + 0.0001), steps)
    if name == "trunc_cos":

        def alpha_bar(t: float) -> float:
            return np.cos((t + 0.1) / 1.1 * np.pi / 2) ** 2

        return np.array([min(1 - alpha_bar(0), 0.999), *_from_alpha_bar(alpha_bar, steps)[: steps - 1]])
    if name == "beta":
        from scipy.stats import beta

        alphas_cumprod = beta.ppf(1 - np.linspace(0, 1, steps + 1), args.beta_a, args.beta_b)
        return 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    raise ValueError(f"ADRec has no noise schedule {name!r}")


def _from_alpha_bar(alpha_bar: Any, steps: int) -> np.ndarray:
    grid = [i / steps for i in range(steps + 1)]
    return np.array([min(1 - alpha_bar(b) / alpha_bar(a), 0.999) for a, b in pairwise(grid)])


def gather(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a float64 table at t [B, L], rounded to the dtype of `like` [B, L, D] and shaped like it."""
    return torch.from_numpy(table).to(t.device)[t].to(like.dtype)[..., None].expand(like.shape)


# --- the transformer --------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """LayerNorm with its epsilon inside the root, biased variance, written out."""

    def __init__(self, width: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + self.eps)) + self.bias


class Sublayer(nn.Module):
    """LN(x + f(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)

    def forward(self, x: Tensor, function: Any) -> Tensor:
        return self.norm(x + function(x))


class FeedForward(nn.Module):
    """D -> 4 D -> D with the tanh form of GELU, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, 4 * width)
        self.w_2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.w_1(x)
        gate = torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3)))
        return self.w_2(0.5 * h * (1 + gate))


class Attention(nn.Module):
    """Multi-head self-attention; the padding mask replaces the scores of masked QUERY rows, not of masked keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.linear_layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.w_layer = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, is_causal: bool) -> Tensor:
        users, slots = x.shape[:2]
        q, k, v = (
            layer(x).view(users, slots, self.heads, self.head_width).transpose(1, 2) for layer in self.linear_layers
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.head_width)
        query_mask = mask.view(users, 1, slots, 1).repeat(1, self.heads, 1, slots)
        scores = scores.masked_fill(query_mask == 0, -1e9)
        if is_causal:
            later = torch.triu(torch.full((slots, slots), float("-inf"), device=x.device), diagonal=1)
            scores += later[None, None].repeat(users, self.heads, 1, 1)
        mixed = torch.matmul(torch.softmax(scores, dim=-1), v)
        return self.w_layer(mixed.transpose(1, 2).contiguous().view(users, slots, -1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)
        self.input_sublayer = Sublayer(width)
        self.output_sublayer = Sublayer(width)
        self.is_causal = is_causal

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.input_sublayer(x, lambda h: self.attention(h, mask, self.is_causal))
        return self.output_sublayer(x, self.feed_forward)


class Transformer(nn.Module):
    def __init__(self, args: SimpleNamespace, heads: int, blocks: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(args.hidden_size, heads, args.is_causal) for _ in range(blocks)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x, mask)
        return x


# --- the diffusion ----------------------------------------------------------------------------------------------------


class DenoisedModel(nn.Module):
    """x0_hat = decoder(c + lambda (x_t + tau(t))), for every slot."""

    def __init__(self, args: SimpleNamespace, heads: int, blocks: int) -> None:
        super().__init__()
        width = args.hidden_size
        self.hidden_size = width
        if args.dif_decoder == "mlp":
            self.decoder: nn.Module = nn.Sequential(
                nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width), nn.LayerNorm(width)
            )
        else:
            self.decoder = Transformer(args, heads, blocks)
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.lambda_uncertainty = args.lambda_uncertainty

    def timestep_embedding(self, t: Tensor) -> Tensor:
        """cos first, then sin, frequencies 10000^(-k / half); float32."""
        half = self.hidden_size // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.unsqueeze(-1).float() * frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    def forward(self, c: Tensor, x_t: Tensor, t: Tensor, mask: Tensor, condition: bool = True) -> Tensor:
        if not condition:
            c = torch.zeros_like(c)
        tau = self.time_embed(self.timestep_embedding(t).to(x_t.dtype))
        h = c + self.lambda_uncertainty * (x_t + tau)
        return self.decoder(h) if isinstance(self.decoder, nn.Sequential) else self.decoder(h, mask)

    def forward_cfg(self, c: Tensor, x_t: Tensor, t: Tensor, mask: Tensor, cfg_scale: float) -> Tensor:
        cond = self.forward(c, x_t, t, mask)
        uncond = self.forward(c, x_t, t, mask, condition=False)
        return uncond + cfg_scale * (cond - uncond)


class Diffusion(nn.Module):
    """The chain over the last slot; the slots before it hold the clean history at t = 0."""

    def __init__(self, args: SimpleNamespace, heads: int, encoder_blocks: int, decoder_blocks: int) -> None:
        super().__init__()
        self.betas = np.array(betas_of(args), dtype=np.float64)
        alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        remaining = 1.0 - self.alphas_cumprod
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / remaining
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / remaining
        self.posterior_variance = self.betas * (1.0 - self.alphas_cumprod_prev) / remaining
        self.num_timesteps = len(self.betas)
        self.rescale_timesteps = args.rescale_timesteps
        self.cfg_scale = args.cfg_scale
        self.geodesic = args.geodesic
        self.net = DenoisedModel(args, heads, decoder_blocks)
        self.ag_encoder = Transformer(args, heads, encoder_blocks)

    def predict(self, c: Tensor, x_t: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """x0_hat [B, L, D] at the timesteps t [B, L], guidance included."""
        fed = t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t
        if self.cfg_scale == 1.0:
            return self.net(c, x_t, fed, mask)
        return self.net.forward_cfg(c, x_t, fed, mask, self.cfg_scale)

    def p_sample(self, c: Tensor, x_t: Tensor, t: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        x_0 = self.predict(c, x_t, t, mask)
        # the entry at t = 0 is multiplied by 0; a chain of one step has no posterior_variance[1] to put there
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        variance = np.append(first, self.betas[1:])
        log_variance = gather(np.log(variance), t, x_t)
        mean = gather(self.posterior_mean_coef1, t, x_t) * x_0 + gather(self.posterior_mean_coef2, t, x_t) * x_t
        not_last = (t != 0).to(x_t.dtype).unsqueeze(-1)
        x_prev = mean + not_last * torch.exp(0.5 * log_variance) * noise
        return F.normalize(x_prev, p=2, dim=-1) if self.geodesic else x_prev

    def denoise_sample(self, hist: Tensor, target: Tensor, mask: Tensor, draws: Draws) -> Tensor:
        c = self.ag_encoder(hist, mask)
        x_t = draws(0, target)
        users, slots = target.shape[:2]
        for step, i in enumerate(reversed(range(self.num_timesteps))):
            t = torch.tensor([0] * (slots - 1) + [i], device=hist.device).unsqueeze(0).repeat(users, 1)
            x_t = torch.concat([target[:, :-1], x_t[:, -1:]], dim=1)
            x_t = self.p_sample(c, x_t, t, mask, draws(1 + step, target))
        return x_t


class Draws:
    """Where noise comes from: `torch.randn` for all B x L slots, or given draws [T + 1, B, D] of the last slot."""

    def __init__(self, last_slot: Tensor | None = None) -> None:
        self.last_slot = last_slot

    def __call__(self, index: int, like: Tensor) -> Tensor:
        if self.last_slot is None:
            return torch.randn_like(like)
        noise = torch.zeros_like(like)
        noise[:, -1] = self.last_slot[index]
        return noise


class PublishedADRec(nn.Module):
    """The authors' whole model. `settings` are their config entries; what is left out is their default (`DEFAULTS`)."""

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        *,
        heads: int = 4,
        encoder_blocks: int = 2,
        decoder_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.args = SimpleNamespace(**{**DEFAULTS, **(settings or {})})
        self.item_num = self.args.item_num
        self.geodesic = self.args.geodesic
        self.item_embedding = nn.Embedding(self.item_num + 1, self.args.hidden_size, padding_idx=0)
        self.hist_norm = LayerNorm(self.args.hidden_size)
        self.diffu = Diffusion(self.args, heads, encoder_blocks, decoder_blocks)

    def inputs(self, history: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(history stream, target stream, mask) of left-padded histories [B, L].

        The target at slot j is the item at slot j + 1; pad slots hold the pad row, and so does the last slot, whose
        content is noise during sampling.
        """
        following = torch.cat([history[:, 1:], torch.zeros_like(history[:, :1])], dim=1)
        target = self.item_embedding(torch.where(history > 0, following, torch.zeros_like(following)))
        if self.geodesic:
            target = F.normalize(target, p=2, dim=-1)
        return self.hist_norm(self.item_embedding(history)), target, (history > 0).to(target.dtype)

    @torch.no_grad()
    def forward(self, history: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_0 [B, D] of left-padded histories [B, L]; `noise` as in `Draws`."""
        hist, target, mask = self.inputs(history)
        return self.diffu.denoise_sample(hist, target, mask, Draws(noise))[:, -1]

    def scores(self, x_0: Tensor) -> Tensor:
        """[B, N + 1]: dot products with every row of the item table, the pad row included."""
        return x_0 @ self.item_embedding.weight.T
