"""sample_affine on every backend that can run here."""

import pytest
import torch

from fastdiff.closed_form import ClosedForm
from fastdiff.noise import GeneratorNoise, GivenNoise, PhiloxNoise
from fastdiff.ops.sample_affine import sample_affine, sample_affine_ref
from tests.devices import place_op, places
from tests.tolerances import AGREE, FLOOR, assert_agree, relative_error

CPU_MISSING = "cpu" not in sample_affine.available("cpu")


@pytest.fixture(params=places(sample_affine))
def sample(request):
    return place_op(sample_affine, request.param)


def made(dim: int, dtype: torch.dtype = torch.float32) -> ClosedForm:
    torch.manual_seed(dim)
    gain, factor = torch.randn(2, dim, dim).to(dtype) / dim**0.5
    return ClosedForm(gain, torch.randn(dim).to(dtype), factor, (factor @ factor.T).double(), 1.0)


def philox(rows: slice, dim: int, dtype: torch.dtype = torch.float32) -> PhiloxNoise:
    keys = torch.arange(5000)[rows]
    return PhiloxNoise(2**64 - 9, keys * keys - 77, keys % 5, dim, dtype)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (25, 64), (60, 50), (0, 8), (49, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", ["none", "shared", "per row"])
def test_equals_the_formula(sample, shape, dtype, guidance):
    sample.needs(dtype)
    rows, dim = shape
    form, cond, z = made(dim, dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    uncond = None if guidance == "none" else torch.randn(rows if guidance == "per row" else 1, dim).to(dtype)
    wide = [part.double() for part in (cond, form.gain, form.offset, z, form.factor)]
    share = wide[0] if uncond is None else uncond.double() + 2.5 * (wide[0] - uncond.double())
    truth = share @ wide[1].T + wide[2] + wide[3] @ wide[4].T
    ours = sample(form, cond, uncond, 2.5, GivenNoise(z[None]))
    twin = relative_error(sample_affine_ref(form, cond, uncond, 2.5, GivenNoise(z[None])), truth)
    assert ours.dtype == dtype
    assert relative_error(ours, truth) <= 2 * twin + FLOOR[dtype]
    drawn = philox(slice(0, rows), dim, dtype)
    given = GivenNoise(drawn.draw(0)[None])
    same = relative_error(sample(form, cond, uncond, 2.5, drawn), sample(form, cond, uncond, 2.5, given))
    assert same <= AGREE.get(dtype, FLOOR[dtype])


def test_a_generator_gives_the_first_draw(sample):
    form, cond = made(6), torch.randn(4, 6)

    def noise() -> GeneratorNoise:
        return GeneratorNoise(torch.Generator().manual_seed(1), 4, 1, 6, torch.float32, torch.device("cpu"))

    ours, twin = sample(form, cond, None, 1.0, noise()), sample_affine_ref(form, cond, None, 1.0, noise())
    assert_agree(ours, twin, torch.float32)


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
@pytest.mark.parametrize("dim", [64, 50])
@pytest.mark.parametrize("guided", [False, True])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(dim, guided):
    sample = sample_affine.bind("cpu", "cpu")
    form, cond = made(dim), torch.randn(1501, dim)
    uncond = torch.randn(1, dim) if guided else None
    whole = sample(form, cond, uncond, 3.0, philox(slice(0, 1501), dim))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (slice(0, 1501), slice(3, 4), slice(100, 129), slice(700, 1400)):
            assert torch.equal(sample(form, cond[rows], uncond, 3.0, philox(rows, dim)), whole[rows])


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
@pytest.mark.parametrize("turn", [lambda x: x, lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, ::2]])
def test_opcheck(turn):
    from fastdiff.ops.cpu.sample_affine import _pack

    sample_affine.bind("cpu", "cpu")
    packed, cond, z = _pack(made(8)), turn(torch.randn(5, 8)), turn(torch.randn(5, 8))
    keys, uncond = torch.arange(10)[::2], turn(torch.randn(5, 8))
    for drawn in ((None, 1.0, packed, z, 0, None, None), (uncond, 3.0, packed, None, 9, keys, keys)):
        torch.library.opcheck(torch.ops.fastdiff.sample_affine.default, (cond, *drawn))


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_an_uncond_of_another_number_of_rows_is_refused():
    sample = sample_affine.bind("cpu", "cpu")
    with pytest.raises(RuntimeError, match="sample_affine: uncond must have 1 or 4 rows \\(got 3\\)"):
        sample(made(6), torch.randn(4, 6), torch.randn(3, 6), 2.0, philox(slice(0, 4), 6))
