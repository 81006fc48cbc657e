"""The causal transformer of ADRec and of its authors' SASRec, trained without computing a pad twice.

A block is post-norm, with dropout (d) where the authors have it:

    h = LN(x + d(W_o [d(softmax(q k^T / sqrt(D / H))) v] + b_o))        out = LN(h + d(W_2 d(gelu_tanh(W_1 h)) + b_2))

Padding. Histories are padded on the left to L slots, and the authors' mask replaces the logits of masked QUERIES: real
slots attend to all pads before them, and a pad attends evenly to the pads up to itself. No pad sees a history, so pads
hold the same vectors for all users, and cost L rows per batch where slots have positions, one row where they do not:
all pads of a user are then one key with log(number of pads) added to its logit. Without dropout this is the padded
network to rounding, in value and in gradient. With dropout the attention's own is the same in law (a key that stands
for c pads survives as Binomial(c, 1 - p) / (c (1 - p)), the mean of theirs); the pads' hidden vectors alone are
computed without dropout, where the authors draw one for every pad slot.

Users of equal length are neighbours in a batch, so a batch is packed rows [N, D] that attention sees as one dense block
[users, length] per length: nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.ops.causal_transformer import merge_heads, split_heads
from fastdiff.train.data import Numbers, windows

NORM_EPS = 1e-12


@dataclass(frozen=True)
class Group:
    """Users of one length, neighbours in the packed order, the first of them at place `first`."""

    first: int
    n_users: int
    length: int

    @property
    def n_rows(self) -> int:
        return self.n_users * self.length

    @property
    def users(self) -> slice:
        return slice(self.first, self.first + self.n_users)


@dataclass(frozen=True)
class Packed:
    """Histories of a batch, shortest first, one after another.

    items    [N] rows of the item table
    order    [B], the user of the batch that is at each place of the packed order
    lengths  [B] in packed order
    groups   users of equal length; empty histories are in none
    window   L
    """

    items: Tensor
    order: Tensor
    lengths: Tensor
    groups: Sequence[Group]
    window: int

    @classmethod
    def of(cls, table: Tensor, lengths: Tensor) -> Packed:
        """From left-padded histories [B, L] and their lengths [B], both on the CPU."""
        order = torch.argsort(lengths, stable=True)
        ordered = lengths[order]
        groups, parts, first = [], [], 0
        for length, n_users in enumerate(torch.bincount(ordered).tolist()):
            if length and n_users:
                groups.append(Group(first, n_users, length))
                parts.append(table[order[groups[-1].users], table.shape[1] - length :].flatten())
            first += n_users
        items = torch.cat(parts) if parts else table.new_zeros(0)
        return cls(items, order, ordered, groups, table.shape[1])

    @classmethod
    def of_histories(cls, histories: Sequence[Sequence[int] | Numbers], window: int) -> Packed:
        """From histories of item numbers, oldest first; an item's row is its number + 1, the pad's row 0."""
        return cls.of(
            *windows([torch.as_tensor(h, dtype=torch.int64).numpy() + 1 for h in histories], window, 0, "left")
        )

    def to(self, device: torch.device) -> Packed:
        items, order, lengths = (x.to(device) for x in (self.items, self.order, self.lengths))
        return Packed(items, order, lengths, self.groups, self.window)

    @property
    def slots(self) -> Tensor:
        """[N], the slot of each row in its window, 0 .. L - 1."""
        parts = [torch.arange(self.window - g.length, self.window).repeat(g.n_users) for g in self.groups]
        return torch.cat(parts).to(self.items.device) if parts else self.items

    def per_row(self, values: Tensor) -> Tensor:
        """[N, ..] of values [B, ..] in packed order."""
        return values.repeat_interleave(self.lengths, dim=0)

    def last(self, rows: Tensor, empty: Tensor) -> Tensor:
        """[B, D] in the batch's own order: the last row of each history of rows [N, D]; `empty` [D] where none is."""
        ends = torch.where(self.lengths > 0, self.lengths.cumsum(0) - 1, len(rows))
        packed = torch.cat([rows, empty.unsqueeze(0)])[ends]
        return torch.empty_like(packed).index_copy(0, self.order, packed)


@dataclass(frozen=True)
class PadRows:
    """What pad slots hold.

    hidden   [V, P, D]: V kinds of users; P = L slots, or 1 where all pads of a user hold one vector
    kind     [B] in packed order, which of the V each user has; None where V is 1
    """

    hidden: Tensor
    kind: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """[V, D], the last slot's: where a history is empty."""
        return self.hidden[:, -1]


class _Attention(nn.Module):
    """Queries, keys and values; a block's heads."""

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.linear_layers = nn.ModuleList([nn.Linear(dim, dim) for _ in range(3)])
        self.w_layer = nn.Linear(dim, dim)
        for layer in (*self.linear_layers, self.w_layer):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, x: Tensor, batch: Packed, pads: PadRows) -> tuple[Tensor, Tensor]:
        """What the rows [N, D] and the pads [V, P, D] gather."""
        query, key, value = (layer(x) for layer in self.linear_layers)
        pad_key, pad_value = (layer(pads.hidden) for layer in self.linear_layers[1:])
        gathered = [x[:0]]
        sizes = [group.n_rows for group in batch.groups]
        # split, not slices: the gradient of a slice is as large as the whole
        parts = zip(*(part.split(sizes) for part in (query, key, value)), strict=True)
        for group, own in zip(batch.groups, parts, strict=True):
            shape = (group.n_users, group.length, x.shape[1])
            q, k, v = (split_heads(part.view(shape), self.n_heads) for part in own)
            n_pads = batch.window - group.length
            n_keys = min(n_pads, pad_key.shape[1])
            kind = None if pads.kind is None else pads.kind[group.users]
            k_pad, v_pad = (
                split_heads(part[:, :n_keys] if kind is None else part[kind, :n_keys], self.n_heads)
                for part in (pad_key, pad_value)
            )
            each = n_pads // n_keys if n_keys else 1
            gathered.append(merge_heads(self._attend(q, k, v, k_pad, v_pad, each)).flatten(0, 1))
        # a pad attends evenly to the pads up to itself
        counts = torch.arange(1, pad_value.shape[1] + 1, device=x.device).unsqueeze(1)
        from_pads = self.w_layer(pad_value.cumsum(1) / counts)
        return self.w_layer(torch.cat(gathered)), from_pads

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, k_pad: Tensor, v_pad: Tensor, each: int) -> Tensor:
        """q, k, v [m, H, n, d], k_pad, v_pad [m or 1, H, p, d], every pad key standing for `each` pads."""
        length, n_keys = q.shape[2], k_pad.shape[2]
        q = q / math.sqrt(q.shape[3])
        later = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        logits = q @ k.transpose(2, 3) + later
        if not n_keys:
            return F.dropout(logits.softmax(3), self.dropout, self.training) @ v
        pad_logits = q @ k_pad.transpose(2, 3) + math.log(each)
        weights = torch.cat([pad_logits, logits], dim=3).softmax(3)
        on_pads, on_items = weights[..., :n_keys], weights[..., n_keys:]
        on_items = F.dropout(on_items, self.dropout, self.training)
        return self._drop_pads(on_pads, each) @ v_pad + on_items @ v

    def _drop_pads(self, weights: Tensor, each: int) -> Tensor:
        """The mean of the dropouts of `each` pads."""
        if each == 1 or not self.training or not self.dropout:
            return F.dropout(weights, self.dropout, self.training)
        kept = torch.full_like(weights, 1 - self.dropout)
        return weights * torch.binomial(torch.full_like(weights, each), kept) / (each * kept)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.w_1, self.w_2):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w_2(self.dropout(F.gelu(self.w_1(x), approximate="tanh")))
        return out


class _Sublayer(nn.Module):
    """LN(x + d(y))"""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.dropout(y))
        return out


class _Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = _Attention(dim, n_heads, dropout)
        self.feed_forward = _FeedForward(dim, dropout)
        self.input_sublayer = _Sublayer(dim, dropout)
        self.output_sublayer = _Sublayer(dim, dropout)

    def forward(self, x: Tensor, batch: Packed, pads: PadRows) -> tuple[Tensor, PadRows]:
        gathered, from_pads = self.attention(x, batch, pads)
        h = self.input_sublayer(x, gathered)
        h_pads = self.input_sublayer.norm(pads.hidden + from_pads)
        return self.output_sublayer(h, self.feed_forward(h)), PadRows(self._finish_pads(h_pads), pads.kind)

    def _finish_pads(self, h: Tensor) -> Tensor:
        ff = self.feed_forward
        out: Tensor = self.output_sublayer.norm(h + ff.w_2(F.gelu(ff.w_1(h), approximate="tanh")))
        return out


class CausalTransformer(nn.Module):
    """Blocks one after another; parameter names are the authors'."""

    def __init__(self, dim: int, n_heads: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([_Block(dim, n_heads, dropout) for _ in range(n_layers)])

    def forward(self, x: Tensor, batch: Packed, pads: PadRows) -> tuple[Tensor, PadRows]:
        """Rows [N, D] of the histories of `batch` and what the pad slots before them hold, through all blocks."""
        for block in self.transformer_blocks:
            x, pads = block(x, batch, pads)
        return x, pads
