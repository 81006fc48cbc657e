"""Lists of rows of the item table, one per user: what each user has seen, may not be shown, or may only be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.staging import upload


@dataclass(frozen=True, eq=False)
class UserLists:
    """One list of rows per user, end to end: user b has values[offsets[b] : offsets[b + 1]].

    values   [total] int64      offsets  [B + 1] int64, from 0 to total, never falling
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("values", self.values), ("offsets", self.offsets)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.ndim != 1:
                raise InvalidArgument(
                    f"UserLists: {name} must be a flat int64 tensor (got {describe(tensor)}); "
                    "UserLists.from_lists builds both from lists"
                )
        if self.values.device != self.offsets.device:
            raise InvalidArgument(
                "UserLists: values and offsets must be on one device "
                f"(got {self.values.device} and {self.offsets.device}); move them"
            )
        total, offsets = self.values.numel(), self.offsets
        ends_meet = offsets.numel() > 0 and int(offsets[0]) == 0 and int(offsets[-1]) == total
        if not ends_meet or bool((offsets.diff() < 0).any()):
            raise InvalidArgument(
                f"UserLists: offsets must start at 0, never fall, and end at the number of values, {total} "
                f"(got {offsets[:8].tolist()}{'...' if offsets.numel() > 8 else ''})"
            )

    @classmethod
    def trusted(cls, values: Tensor, offsets: Tensor) -> UserLists:
        """From tensors that are known to be right, because this package made them: nothing is checked."""
        lists = cls.__new__(cls)
        facts = lists.__dict__
        facts["values"], facts["offsets"] = values, offsets
        return lists

    @classmethod
    def from_lists(cls, lists: Sequence[Any]) -> UserLists:
        """From one sequence, array or tensor of row numbers per user, on the CPU."""
        parts = [torch.as_tensor(rows).cpu() for rows in lists]
        for user, part in enumerate(parts):
            if part.ndim != 1 or (part.numel() and (part.is_floating_point() or part.dtype == torch.bool)):
                raise InvalidArgument(
                    f"UserLists: lists[{user}] must be a flat list of integers (got {describe(part)})"
                )
        lengths = torch.tensor([0, *(part.numel() for part in parts)], dtype=torch.int64)
        values = torch.cat(parts).to(torch.int64) if parts else torch.zeros(0, dtype=torch.int64)
        return cls.trusted(values, lengths.cumsum(0))

    @property
    def n_users(self) -> int:
        return self.offsets.numel() - 1

    def users(self) -> Tensor:
        """[total] int64: whose list each value stands in."""
        users = torch.arange(self.n_users, device=self.values.device)
        return users.repeat_interleave(self.offsets.diff(), output_size=self.values.numel())

    def repeat(self, times: int) -> UserLists:
        """The lists of B x times queries: each user's list `times` times in a row."""
        if times == 1:
            return self
        users = torch.arange(self.n_users, device=self.values.device)
        return self.select(users.repeat_interleave(times), times * self.values.numel())

    def select(self, users: Tensor, total: int | None = None) -> UserLists:
        """The lists of the users named (int64), in that order; a user may be named more than once.

        total  how many values there will be, where that is known: a CUDA device is then not waited for
        """
        lengths = self.offsets.diff()[users]
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        shift = (self.offsets[users] - offsets[:-1]).repeat_interleave(lengths, output_size=total)
        return UserLists.trusted(self.values[torch.arange(shift.numel(), device=shift.device) + shift], offsets)

    def union(self, other: UserLists) -> UserLists:
        """Both lists of each user, one after the other; rows in both stand twice."""
        if self.n_users != other.n_users:
            raise InvalidArgument(
                f"UserLists.union: both must hold lists of the same users (got {self.n_users} and {other.n_users})"
            )
        other = other.to(self.values.device)
        # a value moves on by what the other lists hold before it
        values = torch.cat([self.values, other.values])
        place = torch.arange(self.values.numel(), device=values.device)
        place = torch.cat([place, torch.arange(other.values.numel(), device=values.device)])
        place += torch.cat([other.offsets[self.users()], self.offsets[1:][other.users()]])
        return UserLists.trusted(torch.empty_like(values).index_copy_(0, place, values), self.offsets + other.offsets)

    def below(self, n_rows: int) -> UserLists:
        """The rows under `n_rows` of each list."""
        kept = self.values < n_rows
        if bool(kept.all()):
            return self
        lengths = torch.bincount(self.users()[kept], minlength=self.n_users)
        return UserLists.trusted(self.values[kept], F.pad(lengths.cumsum(0), (1, 0)))

    def to(self, device: torch.device | str) -> UserLists:
        if self.values.device == (torch.device(device) if isinstance(device, str) else device):
            return self
        if self.values.is_cpu:
            return UserLists.trusted(*upload([self.values, self.offsets], torch.device(device)))
        return UserLists.trusted(self.values.to(device), self.offsets.to(device))


class ChunkedLists:
    """The same pairs sorted once by row, so that each chunk of a scan over the table finds its own."""

    def __init__(self, lists: UserLists | None, chunks: Sequence[tuple[int, int]]) -> None:
        self.empty = lists is None or lists.values.numel() == 0
        if lists is None or self.empty:
            return
        self.rows, order = lists.values.sort()
        self.users = lists.users()[order]
        self.starts = [lo for lo, _ in chunks]
        bounds = torch.searchsorted(self.rows, torch.tensor(self.starts, device=self.rows.device))
        self.bounds = [*bounds.tolist(), self.rows.numel()]

    def fill(self, scores: Tensor, chunk: int, value: float) -> None:
        """Write `value` at the pairs of chunk number `chunk`, whose scores are [B, rows of the chunk]."""
        if self.empty or self.bounds[chunk] == self.bounds[chunk + 1]:
            return
        part = slice(self.bounds[chunk], self.bounds[chunk + 1])
        scores[self.users[part], self.rows[part] - self.starts[chunk]] = value


def describe(value: object) -> str:
    """A tensor's shape and dtype, or the type of anything else, for a message."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {dtype_name(value.dtype)}"
    return type(value).__name__


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
