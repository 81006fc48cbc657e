"""What a captured call reads: histories, keys and seed in one piece, for a bucket of sizes.

Buckets. Users are rounded up to 1, 2, 3, 4, 6, 8, 12, ..: up to a third of the rows are padding, cold users whose rows
are cut off. Slots, the places for each user's history, are 16, 32, 64, .. up to the model's window, the window, and
powers of two beyond it where the seen items of longer histories are to be filtered. users x slots is the room for
tokens: kernels launch programs for all of it, and those that find no token return at once. What is copied up is
8 bytes for each slot, at most 1 MiB: larger batches keep a GPU busy enough, and are not captured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.arguments import NoiseRequest, make_sample_index, philox_noise
from fastdiff.config import ModelConfig
from fastdiff.device_histories import as_lists, window_of
from fastdiff.histories import ParsedHistories
from fastdiff.models.base import Histories
from fastdiff.ops.cpu.philox_normals import signed
from fastdiff.pipeline import Pipeline, Ranked
from fastdiff.staging import ALIGNED

MOST_USERS = 1 << 12
MOST_SLOTS = 1 << 17
FEWEST_SLOTS = 16

# --- sizes ------------------------------------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """The sizes of a captured call: rows of histories, and places in each."""

    users: int
    slots: int

    @classmethod
    def of(cls, n_users: int, longest: int, window: int) -> Bucket:
        """The smallest that holds `n_users` histories of at most `longest` items."""
        slots = max(FEWEST_SLOTS, _power_of_2(longest))
        return cls(_rounded(n_users), min(slots, window) if longest <= window else slots)

    @property
    def fits(self) -> bool:
        return self.users <= MOST_USERS and self.users * self.slots <= MOST_SLOTS

    @property
    def numbers(self) -> int:
        """How many int64 an input holds."""
        return self._starts[-1]

    @property
    def _starts(self) -> list[int]:
        starts = [0]
        for size in (self.users * self.slots, self.users, self.users, 1):
            starts.append(starts[-1] + -(-size // ALIGNED) * ALIGNED)
        return starts

    def parts(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """An input's rows [users, slots], lengths [users], row keys [users] and seed [1], views of int64 numbers."""
        rows, lengths, row_key, seed, _ = self._starts
        return (
            flat[rows : rows + self.users * self.slots].view(self.users, self.slots),
            flat[lengths : lengths + self.users],
            flat[row_key : row_key + self.users],
            flat[seed : seed + 1],
        )


MOST_NUMBERS = MOST_SLOTS + 2 * MOST_USERS + 4 * ALIGNED


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _rounded(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, .. that is at least n."""
    power = _power_of_2(n)
    return power // 4 * 3 if 4 * n <= 3 * power and power > 2 else power


# --- what goes in -----------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The users of one call, ready to be copied up in one piece.

    flat  int64, on the host, pinned where there is a device: see `Bucket.parts`. Rows of users that are none are pads
    """

    flat: Tensor
    bucket: Bucket
    n_users: int
    filters_seen: bool
    seed: int


def pack_inputs(
    histories: ParsedHistories, noise: NoiseRequest, filters_seen: bool, config: ModelConfig, device: torch.device
) -> Inputs | None:
    """None where they are too many for a graph. Whole histories go up only where that is more than the window, and the
    seen items are filtered."""
    window, seen, most = histories.window, histories.seen, config.max_seq_len
    n_users, longest = histories.n_users, window.items.shape[1]
    lengths = seen.offsets.diff()
    whole = filters_seen and int(lengths.max()) > most
    bucket = Bucket.of(n_users, int(lengths.max()) if whole else longest, most)
    if not bucket.fits:
        return None
    seed, row_key = noise.keys(histories)
    flat = torch.zeros(bucket.numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    rows, places, keys, seeds = bucket.parts(flat)
    rows.fill_(config.pad_id)
    if whole:
        rows[:n_users][torch.arange(bucket.slots) < lengths[:, None]] = seen.values
        places[:n_users] = lengths
    else:
        rows[:n_users, :longest] = window.items
        places[:n_users] = window.lengths
    keys[:n_users] = row_key
    seeds.fill_(signed(seed))
    return Inputs(flat, bucket, n_users, filters_seen, seed)


def run_padded(pipeline: Pipeline, flat: Tensor, bucket: Bucket, filters_seen: bool) -> Ranked:
    """The pipeline on an input that is on its device: for all rows of the bucket."""
    rows, lengths, row_key, seed = bucket.parts(flat)
    model, n_samples = pipeline.model, pipeline.settings.num_samples
    longer = bucket.slots > model.config.max_seq_len
    window = window_of(rows, lengths, model.config) if longer else Histories(rows, lengths)
    noise = philox_noise(model, seed, row_key, n_samples, make_sample_index(bucket.users, n_samples, flat.device))
    return pipeline(window, noise, {"user_exclude": as_lists(rows) if filters_seen else None})
