"""Where a sampler's normal draws come from: given tensors, torch generators, or counter-based Philox.

With Philox a draw depends on what it is for and not on what was drawn before; the layout of its counters is in
`fastdiff.ops.philox_normals`. Draw 0 is x_T, draw 1 + i belongs to step i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.philox_normals import philox_normals_ref

MAX_SAMPLES = 1 << 16

_NORMALS_AT_ONCE = 1 << 18  # a stretch of draws whose temporaries stay in a core's cache


class Noise(ABC):
    """The standard normal draws of one call: draw 0 is x_T, draw 1 + i belongs to step i. Rows are users x samples."""

    @abstractmethod
    def draw(self, index: int) -> Tensor:
        """Draw number `index`, `[R, D]`, in the dtype and on the device of the run; an index has one set of values."""


class GivenNoise(Noise):
    """Draws handed in by the caller: `[S + 1, R, D]`, or `[S, R, D]` where the last step draws none."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def draw(self, index: int) -> Tensor:
        return self.noise[index]


class StartNoise(Noise):
    """x_T handed in `[R, D]`; the draws of the steps come from `rest`."""

    def __init__(self, start: Tensor, rest: Noise) -> None:
        self.start, self.rest = start, rest

    def draw(self, index: int) -> Tensor:
        return self.start if index == 0 else self.rest.draw(index)


class GeneratorNoise(Noise):
    """Draws from torch generators, in the order in which the sampler asks: one for all rows, or one per user.

    A draw is `torch.randn` on the generator's own device, then moved: a CPU generator gives the same values everywhere.
    Unlike Philox, a row's draws depend on the rows before it (one generator) and on the order of the steps.
    """

    def __init__(
        self,
        generator: torch.Generator | Sequence[torch.Generator],
        n_users: int,
        num_samples: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        self.shape = (n_users, num_samples, dim)
        self.dtype, self.device = dtype, device
        self._drawn: tuple[int, Tensor] | None = None

    def draw(self, index: int) -> Tensor:
        if self._drawn is not None and self._drawn[0] == index:
            return self._drawn[1]
        users, samples, dim = self.shape
        if len(self.generators) == 1:
            values = self._randn((users * samples, dim), self.generators[0])
        else:
            rows = [self._randn((samples, dim), generator) for generator in self.generators]
            values = torch.cat(rows) if rows else torch.empty(0, dim, dtype=self.dtype, device=self.device)
        self._drawn = (index, values)
        return values

    def _randn(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=self.dtype).to(self.device)


class PhiloxNoise(Noise):
    """Draws that depend on (seed, row key, sample, draw, dim) only: batch, order, threads and device do not matter.

    A sampler asks for draws 0, 1, 2, ..: they are made in stretches of 1, 2, 4, .. because one draw of a few rows costs
    little more than the hundred small tensor operations that it takes.

    seed     an int of 64 bits; or a tensor [1] int64 on the device, for a captured CUDA graph, which is replayed with
             others
    row_key  [R] int64   sample  [R] int64, the sample index of each row
    normals  the op `philox_normals`, bound to the backend of the run
    """

    def __init__(
        self,
        seed: int | Tensor,
        row_key: Tensor,
        sample: Tensor,
        dim: int,
        dtype: torch.dtype,
        normals: Callable[[int | Tensor, Tensor, Tensor, int, int, int], Tensor] = philox_normals_ref,
    ) -> None:
        self.seed, self.row_key, self.sample = seed, row_key, sample
        self._normals = normals
        self.dim, self.dtype = dim, dtype
        self._made = range(0)
        self._values: Tensor | None = None

    def draw(self, index: int) -> Tensor:
        if self._values is None or index not in self._made:
            follows = index == self._made.stop
            longest = max(1, _NORMALS_AT_ONCE // max(1, self.row_key.shape[0] * self.dim))
            length = min(2 * len(self._made), longest) if follows and index > 0 else 1
            self._made = range(index, index + length)
            values = self._normals(self.seed, self.row_key, self.sample, index, length, self.dim)
            self._values = values.to(self.dtype)
        return self._values[index - self._made.start]


def philox_normal(seed: int, row_key: Tensor, sample: Tensor, draw: int, dim: int) -> Tensor:
    """Standard normals `[R, dim]` float32 for draw number `draw`, by the reference of `philox_normals`."""
    return philox_normals_ref(seed, row_key, sample, draw, 1, dim)[0]


# --- row keys ---------------------------------------------------------------------------------------------------------

# the constants of splitmix64's finaliser (Steele et al. 2014), as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def history_row_key(items: Tensor, lengths: Tensor) -> Tensor:
    """A 64-bit hash per history `[B]` int64: the row key of a call without `request_ids`.

    key = mix(golden + length + sum_{j < length} mix(item_j + (j + 1) golden))

    where mix is splitmix64's finaliser, golden its increment, and sums and products wrap at 64 bits.

    items  [B, L] int64, left-aligned: what stands beyond a row's length does not matter   lengths  [B] int64
    """
    places = torch.arange(items.shape[1], device=items.device)
    mixed = _mix(items + (places + 1) * _GOLDEN).masked_fill_(places >= lengths[:, None], 0)
    return _mix(mixed.sum(dim=1) + lengths + _GOLDEN)


def _mix(h: Tensor) -> Tensor:
    h = (h ^ _shift_right(h, 30)) * _MIX_1
    h = (h ^ _shift_right(h, 27)) * _MIX_2
    return h ^ _shift_right(h, 31)


def _shift_right(h: Tensor, bits: int) -> Tensor:
    """A logical shift: int64's own shift copies the sign bit."""
    return (h >> bits) & ((1 << (64 - bits)) - 1)


def request_row_key(request_ids: Sequence[int] | Tensor, n_users: int) -> Tensor:
    """The caller's own row keys `[B]` int64, one per user; ids from 2^63 to 2^64 - 1 wrap to negative ones.

    int64 ids on a CUDA device are taken as they are, without waiting for it.
    """
    on_device = isinstance(request_ids, Tensor) and request_ids.is_cuda and request_ids.dtype == torch.int64
    if isinstance(request_ids, Tensor) and on_device and request_ids.shape == (n_users,):
        return request_ids
    if not hasattr(request_ids, "__iter__"):
        raise InvalidArgument(
            f"generate: request_ids must hold one integer per history, {n_users} of them "
            f"(got a {type(request_ids).__name__})"
        )
    values = request_ids.tolist() if isinstance(request_ids, Tensor) else list(request_ids)
    if len(values) != n_users:
        raise InvalidArgument(
            f"generate: request_ids must hold one integer per history, {n_users} of them (got {len(values)})"
        )
    for position, value in enumerate(values):
        if isinstance(value, bool) or not hasattr(value, "__index__") or not -(1 << 63) <= value.__index__() < 1 << 64:
            raise InvalidArgument(
                f"generate: request_ids[{position}] must be an integer of 64 bits (got {value!r}); "
                "hash a string id to an integer first"
            )
    signed = [((int(value) + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63) for value in values]
    return torch.tensor(signed, dtype=torch.int64)
