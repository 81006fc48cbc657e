"""What score_topk's answer is: the score, the order, and the k best of pairs that are scored by the definition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdiff.ops.user_lists import ChunkedLists, UserLists

NO_KEY = torch.iinfo(torch.int64).min
"""The key of no row at all; it comes after every other."""
_LOW_WORD = 0xFFFFFFFF


# --- the score --------------------------------------------------------------------------------------------------------


def sum_in_order(left: Tensor, right: Tensor) -> Tensor:
    """((l_0 r_0 + l_1 r_1) + l_2 r_2) + ... over the last axis, in float64; broadcasts."""
    if left.device.type == "cpu":
        # torch.sum goes in an order of its own; on the CPU a running sum is one plain loop, and the faster one too
        return (left.double() * right.double()).cumsum(-1)[..., -1]
    # elsewhere a running sum is a tree, so the loop is written out; a product of two float32 is exact in float64, so it
    # does not matter whether it is fused with the sum
    left, right = left.double(), right.double()
    total = left[..., 0] * right[..., 0]
    for i in range(1, left.shape[-1]):
        total = torch.addcmul(total, left[..., i], right[..., i])
    return total


def exact_scores(query: Tensor, item_emb: Tensor) -> Tensor:
    """float32 of `sum_in_order`, rounded once; a zero is +0."""
    return sum_in_order(query, item_emb).float() + 0.0


def pair_scores(query: Tensor, item_emb: Tensor, users: Tensor, rows: Tensor) -> Tensor:
    """[P] float32: the score of each (user, row) pair, a bounded number of pairs at a time."""
    query = query.double()  # once, rather than for each of a user's pairs
    scores = [
        exact_scores(query.index_select(0, users[lo:hi]), item_emb.index_select(0, rows[lo:hi]))
        for lo, hi in slices(users.numel(), step(query))
    ]
    return torch.cat(scores) if scores else torch.zeros(0, device=query.device)


# --- the order --------------------------------------------------------------------------------------------------------


def to_keys(scores: Tensor, rows: Tensor) -> Tensor:
    """One int64 per (score, row) whose descending order is: score descending, then row ascending. No NaN, no -0."""
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # a negative float's bits count downwards
    return (ordered.long() << 32) | (_LOW_WORD - rows)


def rows_of(keys: Tensor) -> Tensor:
    return _LOW_WORD - (keys & _LOW_WORD)


def from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(rows int64, scores float32), -1 and -inf where there is no key."""
    none = keys == NO_KEY
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return rows_of(keys).masked_fill_(none, -1), scores.masked_fill_(none, -torch.inf)


# --- the k best -------------------------------------------------------------------------------------------------------


def best_of_pairs(users: Tensor, rows: Tensor, scores: Tensor, n_users: int, k: int) -> Tensor:
    """[n_users, k] keys from (user, row, score) triples in any order, each pair once."""
    counts = torch.bincount(users, minlength=n_users)
    width = max(k, int(counts.max()))
    if n_users > 1 and n_users * width > max(1 << 22, n_users * k):  # one long list would widen the rest
        half = n_users // 2
        low = users < half
        high = ~low
        return torch.cat(
            [
                best_of_pairs(users[low], rows[low], scores[low], half, k),
                best_of_pairs(users[high] - half, rows[high], scores[high], n_users - half, k),
            ]
        )
    users, order = users.sort()
    place = torch.arange(users.numel(), device=users.device) - (counts.cumsum(0) - counts)[users]
    keys = torch.full((n_users, width), NO_KEY, dtype=torch.int64, device=users.device)
    keys[users, place] = to_keys(scores, rows)[order]
    return keys.topk(k, dim=1).values


def topk_by_definition(
    query: Tensor, item_emb: Tensor, k: int, allowed: Tensor | None, exclude: UserLists | None
) -> Tensor:
    """[B, k] keys, k <= N: every row scored by the definition, a bounded number at a time."""
    n_users, n_rows = query.shape[0], item_emb.shape[0]
    best = torch.full((n_users, k), NO_KEY, dtype=torch.int64, device=query.device)
    chunks = list(slices(n_rows, step(query) // n_users))
    excluded = ChunkedLists(exclude, chunks)
    for i, (lo, hi) in enumerate(chunks):
        rows = torch.arange(lo, hi, device=query.device)
        keys = to_keys(exact_scores(query[:, None], item_emb[lo:hi]), rows)
        if allowed is not None:
            keys.masked_fill_(~allowed[lo:hi], NO_KEY)
        excluded.fill(keys, i, NO_KEY)
        best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
    return best


# --- sizes ------------------------------------------------------------------------------------------------------------


def budget(device: torch.device) -> int:
    """How many numbers one step of a scan holds: what the CPU's caches hold, or what keeps an accelerator busy."""
    return 1 << 19 if device.type == "cpu" else 1 << 23


def step(query: Tensor) -> int:
    """How many vectors as wide as the query are scored by the definition at a time."""
    return budget(query.device) // (8 * query.shape[1])


def slices(total: int, size: int) -> Iterator[tuple[int, int]]:
    size = max(1, size)
    return ((lo, min(lo + size, total)) for lo in range(0, total, size))
