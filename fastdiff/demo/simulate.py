"""A catalogue of 600 named items and the exact law by which simulated users choose the next one.

Ten genres hold ten series of six parts each. With `a` the last and `b` the one before of the items seen so far, the
next item x is drawn from

    p(x | history)  proportional to  (1 - RESUME) after_last[a, x] + RESUME after_previous[b, x],    x not seen yet

    after_last      the next part of a's series, or the one after it; the first part of a related series; a favourite
                    of the genre; with the rest of the mass any item at all
    after_previous  the next part of b's series: a user who looked at something else goes back

so the law reads two items back, nobody sees an item twice, and every distribution is explicit: no model can have a
higher expected hit rate at K than the mean mass of the K most probable items, which `best_hit_rate` computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PARTS = 6
SERIES = {
    "mystery": "Harbour Lights|The Ninth Key|Cold Orchard|A Quiet Alibi|The Glass Witness|Low Tide|The Clockmaker"
    "|Seven Lanterns|The Missing Page|Ash Lane",
    "space": "Red Meridian|The Long Orbit|Salt of Titan|Signal Lost|The Ember Fleet|Dust Horizon|Second Sun"
    "|The Silent Array|Perihelion|Gravity's Edge",
    "cooking": "The Copper Pan|Bread at Dawn|Five Spices|A Cook's Year|Market Day|Slow Fire|The Pickle Jar"
    "|Noodle House|Salt and Lemon|The Village Oven",
    "history": "The Amber Road|Walls of Acre|Letters from Lisbon|The Iron Coast|Queens of the Steppe|River of Kings"
    "|The Last Caravel|Bronze and Bone|The Paper Wars|An Age of Canals",
    "nature": "The Heron's Year|Under the Ice|Wild Rivers|The Moss Forest|Night Migration|Reef|The Wolf Valley"
    "|A Hundred Bees|High Pastures|The Tide Pool",
    "comedy": "Mostly Harmful|The Wrong Wedding|Upstairs Neighbours|Plan C|The Goat Inspector|Two Left Feet"
    "|Office Plants|The Lost Luggage Club|Auntie Knows|Minor Royals",
    "fantasy": "The Thorn Crown|Mapmaker's Daughter|The Ninefold Gate|Ravens of Orr|The Hollow Hill|Ink and Flame"
    "|The Salt Witch|Winter's Ledger|The Borrowed Sword|Lanternfall",
    "sport": "The Last Lap|Cold Water|Peloton|The Underdogs|Extra Time|Chalk and Rope|The Long Serve|Home Ice"
    "|Third Corner|Marathon Town",
    "music": "The Night Tuner|Brass Street|Four Strings|The Lost Demo|Choir Practice|Vinyl Summer|The Understudy"
    "|Blue Cadence|Basement Tapes|A Drum for Ada",
    "travel": "Slow Trains|The Island Post|Passes of the Alps|Ferry to Skye|Desert Stations|The Tea Route"
    "|Lighthouse Keepers|Border Towns|The Night Bus|South by Canoe",
}

RESUME = 0.18
NEXT_PART, SKIP_PART, RELATED, FAVOURITES = 0.34, 0.06, 0.28, 0.16
"""Shares of `after_last`; what is left, 0.16, is spread over the whole catalogue."""

RELATED_WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
"""Of the next two series of the genre, the one opposite, and the series of the same place in the next genre."""

FAVOURITE_WEIGHTS = np.array([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) / 21
"""Of the first part of the genre's first, third, fifth, .. series and, last, of the second part of its first one."""


@dataclass(frozen=True)
class Catalogue:
    """Names, and the structure behind them, all `[N]`: item = (genre x series in the genre) x part."""

    names: tuple[str, ...]
    genre: Ints
    series: Ints
    part: Ints

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Law:
    """The law above: `after_last` and `after_previous [N, N]`, and `start [N]` for a user who has seen nothing."""

    start: Floats
    after_last: Floats
    after_previous: Floats

    @property
    def n_items(self) -> int:
        return len(self.start)

    def next_item(self, items: Ints, lengths: Ints | None = None) -> Floats:
        """p(next item | history) `[B, N]`, rows that sum to 1.

        items    [B, n] item numbers, oldest first      lengths  [B], 0..n; None means that all n are there
        """
        n_users, width = items.shape
        lengths = np.full(n_users, width) if lengths is None else lengths
        mass: Floats = np.tile(self.start, (n_users, 1))
        some, two = np.flatnonzero(lengths >= 1), np.flatnonzero(lengths >= 2)
        mass[some] = (1 - RESUME) * self.after_last[items[some, lengths[some] - 1]]
        mass[two] += RESUME * self.after_previous[items[two, lengths[two] - 2]]
        user, place = np.nonzero(np.arange(width) < lengths[:, None])
        mass[user, items[user, place]] = 0.0
        mass /= mass.sum(axis=1, keepdims=True)
        return mass


@cache
def build_catalogue() -> Catalogue:
    titles = [(genre, title) for genre, line in enumerate(SERIES.values()) for title in line.split("|")]
    names = tuple(f"{title}, part {part + 1}" for _, title in titles for part in range(PARTS))
    series, part = np.divmod(np.arange(len(names)), PARTS)
    genre = np.array([genre for genre, _ in titles])[series]
    return Catalogue(names, genre, series, part)


@cache
def build_law() -> Law:
    catalogue = build_catalogue()
    n_items, n_series, in_genre = len(catalogue), len(catalogue) // PARTS, 10
    item = np.arange(n_items)
    series, part = catalogue.series, catalogue.part
    genre, place = series // in_genre, series % in_genre

    # the parts that a series does not have give their mass to the related series
    next_mass = np.where(part + 1 < PARTS, NEXT_PART, 0.0)
    skip_mass = np.where(part + 2 < PARTS, SKIP_PART, 0.0)
    related_mass = RELATED + (NEXT_PART - next_mass) + (SKIP_PART - skip_mass)
    related_series = np.stack(
        [genre * in_genre + (place + offset) % in_genre for offset in (1, 2, in_genre // 2)]
        + [(series + in_genre) % n_series],
        axis=1,
    )
    favourite_items = genre[:, None] * in_genre * PARTS + np.array([0, 2, 4, 6, 8, 0]) * PARTS + [0, 0, 0, 0, 0, 1]

    after_last = np.full((n_items, n_items), (1 - NEXT_PART - SKIP_PART - RELATED - FAVOURITES) / n_items)
    after_last[item[:-1], item[:-1] + 1] += next_mass[:-1]
    after_last[item[:-2], item[:-2] + 2] += skip_mass[:-2]
    np.add.at(after_last, (item[:, None], related_series * PARTS), related_mass[:, None] * RELATED_WEIGHTS)
    np.add.at(after_last, (item[:, None], favourite_items), FAVOURITES * FAVOURITE_WEIGHTS)

    after_previous = np.zeros((n_items, n_items))
    goes_on = part + 1 < PARTS
    after_previous[item[goes_on], item[goes_on] + 1] = 1.0

    popularity = (part == 0) / (1.0 + place)
    return Law(popularity / popularity.sum(), after_last, after_previous)


def simulate_users(law: Law, n_users: int, length: int, seed: int) -> Ints:
    """`[n_users, length]` item numbers: each user's first `length` choices, oldest first."""
    rng = np.random.default_rng(seed)
    blocks = [_simulate(law, min(_BLOCK, n_users - first), length, rng) for first in range(0, n_users, _BLOCK)]
    return np.concatenate(blocks) if blocks else np.zeros((0, length), dtype=np.int64)


_BLOCK = 4096  # users at a time: a block's distributions are 20 MB


def _simulate(law: Law, n_users: int, length: int, rng: np.random.Generator) -> Ints:
    items = np.zeros((n_users, length), dtype=np.int64)
    for place in range(length):
        cumulative = law.next_item(items[:, :place]).cumsum(axis=1)
        # against the row's own end, which rounding leaves a hair off 1, so that the draw always falls inside
        draw = rng.random((n_users, 1)) * cumulative[:, -1:]
        items[:, place] = (cumulative <= draw).sum(axis=1)
    return items


def best_hit_rate(probabilities: Floats, k: int) -> float:
    """The highest expected hit rate at k that a model can reach: mean over users of the mass of the k likeliest items.

    probabilities  [B, N], p(next item | history)
    """
    return float(np.partition(probabilities, -k, axis=1)[:, -k:].sum(axis=1).mean())


def expected_hit_rate(probabilities: Floats, recommended: Ints) -> float:
    """The expected hit rate of given lists: mean over users of the mass of their recommended items `[B, K]`."""
    return float(np.take_along_axis(probabilities, recommended, axis=1).sum(axis=1).mean())
