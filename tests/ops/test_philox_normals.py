"""philox_normals on every backend that can run here: the layout of its counters, values, what they depend on."""

import math

import pytest
import torch
from torch import Tensor

from fastdiff.ops.philox_normals import philox4x32, philox_normals, philox_normals_ref
from tests.devices import place_op, places
from tests.tolerances import FLOOR, relative_error

KEYS = [0, 1, -1, 0x0123456789ABCDEF, -0x0123456789ABCDEF, 2**63 - 1, -(2**63)]
CPU_MISSING = "cpu" not in philox_normals.available("cpu")


@pytest.fixture(params=places(philox_normals))
def normals(request):
    return place_op(philox_normals, request.param)


def rows(n: int) -> tuple[Tensor, Tensor]:
    """Row keys with all their bits in use, and samples."""
    keys = torch.tensor((KEYS * (n // len(KEYS) + 1))[:n], dtype=torch.int64) + torch.arange(n)
    return keys, torch.arange(n, dtype=torch.int64) * 7919 % (1 << 16)


@pytest.mark.parametrize("seed", [0, 1, 0x1122334455667788, 2**64 - 1, -3])
def test_each_normal_is_that_of_its_counter(normals, seed):
    """Words worked out one by one, transformed in float64."""
    keys, samples = rows(5)
    first, n, dim = 2**31 - 1, 3, 71
    ours = normals(seed, keys, samples, first, n, dim)
    assert ours.shape == (n, 5, dim)
    assert ours.dtype == torch.float32
    words_of_seed = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    for draw, row, at in [
        (0, 0, 0),
        (1, 1, 1),
        (2, 2, 2),
        (0, 3, 3),
        (1, 4, 4),
        (2, 1, 35),
        (0, 4, 62),
        (1, 0, 64),
        (2, 3, 70),
    ]:
        key = int(keys[row]) & (2**64 - 1)
        counter = (key & 0xFFFFFFFF, key >> 32, first + draw, int(samples[row]) << 16 | at // 4)
        words = [int(word) for word in philox4x32(tuple(torch.tensor([c]) for c in counter), words_of_seed)]
        a, b = words[2 * (at % 4 // 2) :][:2]
        radius = math.sqrt(-2 * math.log(((a >> 8) + 1) * 2.0**-24))
        angle = 2 * math.pi * (b >> 8) * 2.0**-24
        expected = radius * (math.sin(angle) if at % 2 else math.cos(angle))
        assert float(ours[draw, row, at]) == pytest.approx(expected, rel=2e-6, abs=4e-6)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 50, 63, 64, 65, 100, 128, 130])
def test_backends_agree(normals, dim):
    keys, samples = rows(9)
    truth = philox_normals_ref(99, keys, samples, 3, 4, dim)
    assert relative_error(normals(99, keys, samples, 3, 4, dim), truth.double()) <= FLOOR[torch.float32]


def test_a_million_normals_agree_and_are_standard(normals):
    keys, samples = rows(160)
    ours = normals(5, keys, samples, 0, 100, 64).double()
    assert relative_error(ours, philox_normals_ref(5, keys, samples, 0, 100, 64).double()) <= FLOOR[torch.float32]
    assert abs(float(ours.mean())) < 4 / 1000
    assert abs(float(ours.var()) - 1) < 4 * math.sqrt(2) / 1000


@pytest.mark.parametrize(("n", "count", "dim"), [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_nothing_is_drawn_where_nothing_is_asked_for(normals, n, count, dim):
    keys, samples = rows(n)
    assert normals(1, keys, samples, 0, count, dim).shape == (count, n, dim)


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_a_normal_has_the_same_bits_in_any_batch_width_stretch_and_number_of_threads():
    normals = philox_normals.bind("cpu", "cpu")
    keys, samples = rows(700)
    whole = normals(3, keys, samples, 0, 40, 50)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        part = slice(123, 130)
        assert torch.equal(normals(3, keys[part], samples[part], 17, 5, 50), whole[17:22, part])
        assert torch.equal(normals(3, keys, samples, 0, 40, 50), whole)
    assert torch.equal(normals(3, keys, samples, 2, 1, 130)[..., :50], whole[2:3])


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_opcheck():
    philox_normals.bind("cpu", "cpu")
    keys, samples = rows(12)
    for key, sample in ((keys, samples), (keys[::2], samples[1::2]), (keys.view(6, 2)[:, 0], samples[:6])):
        torch.library.opcheck(torch.ops.fastdiff.philox_normals.default, (7, key, sample, 0, 3, 10))


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_what_cannot_be_drawn_is_named():
    normals = philox_normals.bind("cpu", "cpu")
    keys, samples = rows(3)
    with pytest.raises(RuntimeError, match="philox_normals: row_key must be int64"):
        normals(1, keys.float(), samples, 0, 1, 4)
    with pytest.raises(RuntimeError, match="philox_normals: sample must have shape"):
        normals(1, keys, samples[:2], 0, 1, 4)
    with pytest.raises(RuntimeError, match="philox_normals: draws must be numbered"):
        normals(1, keys, samples, -1, 1, 4)
    with pytest.raises(RuntimeError, match="philox_normals: draws must be numbered"):
        normals(1, keys, samples, 2**63 - 1, 1, 4)  # the sum of the two does not fit in 64 bits


@pytest.mark.parametrize("seed", [0, 5, -1, (1 << 63) - 1, -(1 << 63), 0x123456789ABCDEF])
@pytest.mark.parametrize("place", places(philox_normals))
def test_a_seed_may_be_a_tensor(place, seed):
    keys, sample = torch.tensor([3, -7, 1 << 40]), torch.tensor([0, 1, 9])
    op = place_op(philox_normals, place)
    assert torch.equal(op(torch.tensor([seed]), keys, sample, 2, 3, 6), op(seed, keys, sample, 2, 3, 6))
