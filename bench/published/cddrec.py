"""CDDRec's inference as its authors' code runs it (PAKDD 2024, arXiv 2304.11433; their code at commit edfe0ff).

The yardstick of tests and benches, written again in our words with the authors' parameter names and attributes, so that
their state dicts load, and with the same work: all S slots through every layer, the decoder on whole (B, S, D) tensors,
and two full normal draws of which one reaches the result. Three things in it surprise:

- the decoder layer is built with `batch_first=False` and fed (B, S, D), so its self-attention runs over the users of
  the batch;
- masks are an additive -10000, so a row without any real key takes a softmax over its raw scores, future slots
  included;
- noise of scale sigma_0 is added at t = 0, the only step that inference runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormalLike = Callable[[Tensor], Tensor]
"""A source of standard normal draws shaped like its argument: `torch.randn_like`, or recorded draws."""

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
MASKED = -10000.0


class LayerNorm(nn.Module):
    """weight * (x - mean) / sqrt(variance + 1e-12) + bias, with the biased variance."""

    def __init__(self, hidden_size: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return self.weight * (centred / torch.sqrt(variance + self.variance_epsilon)) + self.bias


class SelfAttention(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.num_attention_heads = args.num_attention_heads
        self.query = nn.Linear(args.hidden_size, args.hidden_size)
        self.key = nn.Linear(args.hidden_size, args.hidden_size)
        self.value = nn.Linear(args.hidden_size, args.hidden_size)
        self.dense = nn.Linear(args.hidden_size, args.hidden_size)
        self.LayerNorm = LayerNorm(args.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        context = torch.softmax(scores, dim=-1) @ v
        return self.LayerNorm(self.dense(context.transpose(1, 2).flatten(2)) + x)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


class Intermediate(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.dense_1 = nn.Linear(args.hidden_size, args.hidden_size * 4)
        self.dense_2 = nn.Linear(args.hidden_size * 4, args.hidden_size)
        self.activation = ACTIVATIONS[args.hidden_act]
        self.LayerNorm = LayerNorm(args.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense_2(self.activation(self.dense_1(x))) + x)


class Layer(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.attention = SelfAttention(args)
        self.intermediate = Intermediate(args)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.intermediate(self.attention(x, mask))


class Encoder(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        layer = Layer(args)
        self.layer = nn.ModuleList([copy.deepcopy(layer) for _ in range(args.num_hidden_layers)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class CDDRecModel(nn.Module):
    """The whole model. `args` holds the authors' settings as attributes: hidden_size, num_hidden_layers,
    num_attention_heads, hidden_act, max_seq_length, item_size, T, beta_1, beta_T."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        size = args.hidden_size
        self.args = args
        self.time_embeddings = nn.Embedding(args.T, size)
        self.conditional_encoder = Encoder(args)
        self.item_embeddings = nn.Embedding(args.item_size, size, padding_idx=0)
        self.position_embeddings = nn.Embedding(args.max_seq_length, size)
        self.decoder = nn.TransformerDecoderLayer(
            d_model=size, nhead=args.num_attention_heads, dim_feedforward=size, activation=args.hidden_act
        )
        self.LayerNorm = LayerNorm(size)
        self.apply(self._draw_weights)

        self.T, self.beta_1, self.beta_T = args.T, args.beta_1, args.beta_T
        self.betas = torch.linspace(self.beta_1, self.beta_T, self.T, dtype=torch.float32).double()
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # the entry at t = 0, which would be log 0, is that of t = 1 taken through float32
        clipped = torch.cat([self.posterior_variance[1:2].float(), self.posterior_variance[1:]])
        self.posterior_log_variance_clipped = torch.log(clipped)

    def _draw_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)  # the pad row as well: it is never zero
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def add_position_embedding(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        slots = input_ids.shape[1]
        causal = torch.ones(slots, slots, device=input_ids.device).tril()
        allowed = (input_ids > 0).to(causal.dtype)[:, None, None, :] * causal
        mask = (1.0 - allowed.to(self.item_embeddings.weight.dtype)) * MASKED
        positions = torch.arange(slots, device=input_ids.device).expand_as(input_ids)
        return self.LayerNorm(self.item_embeddings(input_ids) + self.position_embeddings(positions)), mask

    @torch.no_grad()
    def inference(self, input_ids: Tensor, normal_like: NormalLike = torch.randn_like) -> Tensor:
        """x `[B, S, D]` for left-padded histories `[B, S]`; the last slot is the query. Draws twice."""
        embedded, mask = self.add_position_embedding(input_ids)
        condition = self.conditional_encoder(embedded, mask)
        x_t = normal_like(condition)
        t = torch.zeros(condition.shape[0], dtype=torch.int64, device=condition.device)
        time = self.time_embeddings(t.unsqueeze(1).expand(condition.shape[:2]))
        return self.p_sample(self.decoder(condition, time), x_t, t, normal_like)

    def p_sample(self, model_output: Tensor, x_t: Tensor, t: Tensor, normal_like: NormalLike) -> Tensor:
        """The output is the mean itself; x_t lends its shape to the draw and nothing else."""
        log_variance = self.posterior_log_variance_clipped.to(t.device)[t].to(x_t.dtype)[:, None, None]
        return model_output + torch.exp(0.5 * log_variance) * normal_like(x_t)


def published_ranking(query: Tensor, item_table: Tensor, seen: Tensor | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores `[B, k]` as the trainer ranks: cosine over all rows, pad and mask included, seen items scored 0.

    query [B, D]   item_table [rows, D]   seen [B, rows] bool or None, items whose score becomes 0 (not minus infinity)
    """
    scores = (F.normalize(query, dim=-1) @ F.normalize(item_table, dim=-1).T).cpu().numpy()
    if seen is not None:
        scores[seen.cpu().numpy()] = 0
    rows = np.argpartition(scores, -k)[:, -k:]
    kept = np.take_along_axis(scores, rows, axis=1)
    order = np.argsort(kept, axis=1)[:, ::-1]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(kept, order, axis=1)
