"""What all providers of a case are fed: histories, noise, tables of items; drawn from fixed seeds."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bench.cases import CPU
from fastdiff.config import ModelConfig
from fastdiff.models.base import Histories


def draw_lengths(batch: int, law: str, window: int, generator: torch.Generator) -> Tensor:
    """Lengths of histories `[B]` int64. "full": the window. "uniform": 1 .. window. "beauty": 3 plus a geometric law,
    mean 7, cut to the window, close to Amazon Beauty's."""
    if law == "full":
        return torch.full((batch,), window)
    if law == "uniform":
        return torch.randint(1, window + 1, (batch,), generator=generator)
    if law == "beauty":
        extra = torch.empty(batch).exponential_(1 / 4.5, generator=generator).floor().long()
        return (3 + extra).clamp(max=window)
    raise ValueError(f"draw_lengths: law must be full, beauty or uniform (got {law!r})")


def draw_histories(config: ModelConfig, batch: int, law: str, seed: int = 1) -> Histories:
    """Left-aligned rows of real items, as models take them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = draw_lengths(batch, law, config.max_seq_len, generator)
    low = config.first_item_row
    items = torch.randint(low, low + config.n_items, (batch, int(lengths.max())), generator=generator)
    inside = torch.arange(items.shape[1]) < lengths[:, None]
    return Histories(torch.where(inside, items, config.pad_id), lengths)


def padded(histories: Histories, config: ModelConfig) -> Tensor:
    """`[B, L]` int64 as the authors' data loaders hand it over: padded to the window on the model's own side."""
    window, width = config.max_seq_len, histories.items.shape[1]
    items = torch.full((histories.batch_size, window), config.pad_id)
    places = torch.arange(width).expand_as(histories.items)
    if config.pad_side == "left":
        places = places + window - histories.lengths[:, None]
    inside = torch.arange(width) < histories.lengths[:, None]
    users = torch.arange(histories.batch_size)[:, None].expand_as(places)
    items[users[inside], places[inside]] = histories.items[inside]
    return items


def histories_to(histories: Histories, device: torch.device) -> Histories:
    return Histories(histories.items.to(device), histories.lengths.to(device))


def draw_noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=1)
def draw_items(n_items: int, dim: int, device: torch.device = CPU) -> Tensor:
    """An item table `[N, D]` without structure that pruning could use, drawn on `device` (each kind draws its own
    numbers); the cases of one size share it."""
    return torch.randn(n_items, dim, generator=torch.Generator(device).manual_seed(3), device=device)


def some_of(batch: int, count: int) -> Tensor:
    """`count` of the users of a batch, evenly spread: those whose float64 truth is computed."""
    return torch.arange(0, batch, max(1, batch // count))
