"""Other views of histories, for contrastive losses: left-padded rows of the item table [b, width], 0 for padding."""

from __future__ import annotations

import torch
from torch import Tensor


def _run(items: Tensor, share: float, shortest: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A random run of floor(share * n) places of each history's n, at least `shortest`: its begin and length [b, 1],
    and the place of each slot in its history [b, width], negative on padding."""
    n = (items != 0).sum(1, keepdim=True)
    length = (share * n.double()).floor().long().clamp(min=shortest)
    begin = (torch.rand(len(items), 1) * (n - length + 1)).long()
    return begin, length, torch.arange(items.shape[1]) - (items.shape[1] - n)


def reorder(items: Tensor, share: float = 0.6) -> Tensor:
    """A random run, shuffled."""
    begin, length, place = _run(items, share)
    inside = (place >= begin) & (place < begin + length)
    keys = torch.where(inside, begin + torch.rand(items.shape) * length, place)
    return items.gather(1, keys.argsort(dim=1, stable=True))


def mask_out(items: Tensor, mask_row: int, share: float = 0.3) -> Tensor:
    """floor(share * n) random items replaced by the mask row."""
    real = items != 0
    n_masked = (share * real.sum(1, keepdim=True).double()).floor()
    rank = torch.where(real, torch.rand(items.shape), 2.0).argsort(dim=1).argsort(dim=1)
    return torch.where(rank < n_masked, mask_row, items)


def crop(items: Tensor, share: float = 0.6) -> Tensor:
    """A random run, of at least one item, in its place; the rest is padding."""
    begin, length, place = _run(items, share, shortest=1)
    inside = (place >= begin) & (place < begin + length)
    return torch.where(inside, items, 0)
