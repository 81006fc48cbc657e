"""Noise: Philox against its published vectors, its law, and what a draw depends on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.noise import (
    GeneratorNoise,
    GivenNoise,
    PhiloxNoise,
    StartNoise,
    history_row_key,
    philox_normal,
    request_row_key,
)
from fastdiff.ops.philox_normals import philox4x32

CPU = torch.device("cpu")


def normals(seed: int, row_key: list[int], sample: list[int], draw: int, dim: int) -> Tensor:
    keys, samples = (torch.tensor(values, dtype=torch.int64) for values in (row_key, sample))
    return philox_normal(seed, keys, samples, draw, dim)


# --- the integers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox4x32(words, (low, high))] == expected.split()


def test_the_layout_of_counter_and_key_is_what_the_module_says():
    seed, row_key, sample, draw, dim = 0x1122334455667788, -0x0123456789ABCDEF, 5, 9, 11
    block, unsigned = dim // 4, row_key & (2**64 - 1)
    counter = tuple(
        torch.tensor([word]) for word in (unsigned & 0xFFFFFFFF, unsigned >> 32, draw, sample << 16 | block)
    )
    words = [int(word) for word in philox4x32(counter, (0x55667788, 0x11223344))]
    # dim 11 is the fourth of its block: the second of the pair (w2, w3)
    u, v = ((words[2] >> 8) + 1) * 2.0**-24, (words[3] >> 8) * 2.0**-24
    expected = math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v)
    ours = normals(seed, [row_key], [sample], draw, dim + 1)[0, dim]
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(expected, rel=1e-5, abs=1e-6)


# --- the law ----------------------------------------------------------------------------------------------------------


def test_draws_are_standard_normal():
    x = torch.cat([normals(7, list(range(400)), [0] * 400, draw, 50) for draw in range(5)]).double()
    count = x.numel()
    assert torch.isfinite(x).all()
    # each sample moment within four of its standard deviations
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 4 * math.sqrt(variance / count), power
    # Kolmogorov-Smirnov at the 1 in 10^4 level
    ordered = x.flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    grid = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((grid[1:] - cdf).abs(), (grid[:-1] - cdf).abs()).max()
    assert float(distance) < 2.23 / math.sqrt(count)


def test_neighbours_are_uncorrelated():
    """Rows, dims, draws, samples and seeds that differ by one."""
    keys = list(range(1000, 1400))
    base = normals(3, keys, [0] * 400, 1, 32).double()
    neighbours = {
        "dim": base.roll(1, dims=1),
        "row": base.roll(1, dims=0),
        "draw": normals(3, keys, [0] * 400, 2, 32).double(),
        "sample": normals(3, keys, [1] * 400, 1, 32).double(),
        "seed": normals(4, keys, [0] * 400, 1, 32).double(),
        "seed, high word": normals(3 + 2**32, keys, [0] * 400, 1, 32).double(),
        "key, high word": normals(3, [key + 2**32 for key in keys], [0] * 400, 1, 32).double(),
    }
    for name, other in neighbours.items():
        assert abs(float((base * other).mean())) < 4.5 / math.sqrt(base.numel()), name


# --- what a draw depends on -------------------------------------------------------------------------------------------


@given(
    keys=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6),
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 2000),
    dim=st.integers(1, 9),
)
def test_a_row_does_not_depend_on_its_batch_nor_on_its_width(keys, seed, draw, dim):
    sample = [i % 3 for i in range(len(keys))]
    together = normals(seed, keys, sample, draw, dim)
    assert together.shape == (len(keys), dim)
    for row, key in enumerate(keys):
        assert torch.equal(normals(seed, [key], [sample[row]], draw, dim)[0], together[row])
    assert torch.equal(normals(seed, keys, sample, draw, dim + 3)[:, :dim], together)
    backwards = normals(seed, keys[::-1], sample[::-1], draw, dim)
    assert torch.equal(backwards.flip(0), together)


@given(order=st.lists(st.integers(0, 40), max_size=20), rows=st.sampled_from([0, 1, 3000]))
def test_draws_may_be_asked_for_in_any_order(order, rows):
    keys, sample = torch.arange(rows), torch.arange(rows) % 5
    noise = PhiloxNoise(5, keys, sample, 6, torch.float64)
    for index in [*range(10), *order, 12, 13, 14, 20]:
        expected = philox_normal(5, keys, sample, index, 6).double()
        assert torch.equal(noise.draw(index), expected)


def test_given_draws_are_handed_out_by_number():
    noise = torch.randn(3, 2, 4)
    given_noise = GivenNoise(noise)
    start = StartNoise(torch.zeros(2, 4), given_noise)
    assert torch.equal(given_noise.draw(2), noise[2])
    assert start.draw(0).abs().max() == 0
    assert torch.equal(start.draw(1), noise[1])


def test_one_generator_draws_in_the_order_of_the_sampler():
    noise = GeneratorNoise(torch.Generator().manual_seed(3), 2, 3, 4, torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    for index in range(3):
        expected = torch.randn(6, 4, generator=generator)
        assert torch.equal(noise.draw(index), expected)
        assert torch.equal(noise.draw(index), expected)  # asked for again, not drawn again


def test_a_generator_per_user_gives_the_user_alone():
    users = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = GeneratorNoise(users, 2, 3, 4, torch.float32, CPU).draw(0)
    alone = GeneratorNoise([torch.Generator().manual_seed(2)], 1, 3, 4, torch.float32, CPU).draw(0)
    assert torch.equal(together[3:], alone)


def test_no_users_draw_nothing():
    for generator in (torch.Generator(), []):
        assert GeneratorNoise(generator, 0, 2, 4, torch.float64, CPU).draw(0).shape == (0, 4)
    assert normals(0, [], [], 0, 4).shape == (0, 4)


# --- row keys ---------------------------------------------------------------------------------------------------------


def splitmix_hash(items: list[int]) -> int:
    """The module's definition in plain integers."""
    golden, modulus = 0x9E3779B97F4A7C15, 2**64

    def mix(h: int) -> int:
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % modulus
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB % modulus
        return h ^ (h >> 31)

    total = sum(mix((item + (place + 1) * golden) % modulus) for place, item in enumerate(items))
    h = mix((golden + len(items) + total) % modulus)
    return h - modulus if h >= modulus // 2 else h


@given(
    items=st.lists(st.integers(0, 2**40), max_size=6),
    pads=st.integers(0, 4),
    pad=st.integers(-1, 2**40),
)
def test_the_hash_of_a_history_is_as_defined_and_blind_to_padding(items, pads, pad):
    row = torch.tensor([items + [pad] * pads], dtype=torch.int64).reshape(1, -1)
    key = history_row_key(row, torch.tensor([len(items)]))
    assert key.tolist() == [splitmix_hash(items)]


def test_histories_that_differ_have_different_hashes():
    histories = [[], [0], [0, 0], [1, 2], [2, 1], [1], [2], [1, 2, 3], [3, 2, 1]]
    items = torch.zeros(len(histories), 3, dtype=torch.int64)
    for row, history in enumerate(histories):
        items[row, : len(history)] = torch.tensor(history, dtype=torch.int64)
    keys = history_row_key(items, torch.tensor([len(history) for history in histories]))
    assert len(set(keys.tolist())) == len(histories)


def test_request_ids_are_the_keys_and_wrap_at_64_bits():
    ids = [0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
    wrapped = [0, 1, -1, 2**63 - 1, -(2**63), -1, -(2**63)]
    assert request_row_key(ids, 7).tolist() == wrapped
    assert request_row_key(torch.tensor([4, 5]), 2).tolist() == [4, 5]
    assert request_row_key([], 0).shape == (0,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 3], r"request_ids must hold one integer per history, 2 of them \(got 3\)"),
        ([1, "b"], r"request_ids\[1\] must be an integer of 64 bits \(got 'b'\); hash a string id"),
        ([1.5, 2], r"request_ids\[0\] must be an integer of 64 bits \(got 1.5\)"),
        ([1, True], r"request_ids\[1\] must be an integer of 64 bits \(got True\)"),
        ([2**64, 2], r"request_ids\[0\] must be an integer of 64 bits \(got 18446744073709551616\)"),
    ],
)
def test_request_ids_that_are_no_keys_are_named(ids, message):
    with pytest.raises(InvalidArgument, match=message):
        request_row_key(ids, 2)
