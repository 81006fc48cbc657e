"""sampler_step on every backend that can run here."""

import pytest
import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.sampler_step import sampler_step
from tests.devices import place_op, places
from tests.tolerances import FLOOR, relative_error

SHAPES = [(1, 1), (3, 7), (33, 64), (100, 130), (0, 8)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROWS = [(0.9, 0.3, 0.2), (-1.5, 0.0, 0.7), (1.0, 0.0, 0.0), (0.0, 2.5, 0.0)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "transposed": lambda x: x.T.contiguous().T,
}


@pytest.fixture(params=places(sampler_step))
def step(request):
    return place_op(sampler_step, request.param)


def plain(output: Tensor, x_t: Tensor, noise: Tensor, row: tuple[float, float, float], normalize: bool) -> Tensor:
    c_out, c_xt, c_noise = row
    x_prev = c_out * output + c_xt * x_t + c_noise * noise
    return x_prev / x_prev.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalize else x_prev


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(step, shape, dtype, layout, normalize):
    step.needs(dtype)
    output, x_t, noise = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(3))
    for row in ROWS:
        truth = plain(output.double(), x_t.double(), noise.double(), row, normalize)
        twin = plain(output, x_t, noise, row, normalize)
        ours = step(output, x_t, noise if row[2] else None, *row, normalize)
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert relative_error(ours, truth) <= 2 * relative_error(twin, truth) + FLOOR[dtype], row


def test_terms_whose_factor_is_zero_are_not_read(step):
    x = torch.ones(2, 3)
    unread = torch.full((2, 3), float("nan"))
    assert torch.equal(step(x, unread, unread, 2.0, 0.0, 0.0), 2 * x)


def test_inputs_are_left_as_they_were(step):
    tensors = [torch.randn(4, 5) for _ in range(3)]
    kept = [tensor.clone() for tensor in tensors]
    step(*tensors, 0.5, 0.5, 0.5, True)
    assert all(torch.equal(tensor, before) for tensor, before in zip(tensors, kept, strict=True))


def test_a_zero_row_stays_zero_when_normalised(step):
    zero = torch.zeros(1, 4)
    assert torch.equal(step(zero, zero, None, 1.0, 1.0, 0.0, True), zero)


def test_missing_noise_is_named(step):
    x = torch.ones(2, 3)
    with pytest.raises(InvalidArgument, match=r"noise must be given where c_noise is not 0 \(got None with 0.5\)"):
        step(x, x, None, 1.0, 1.0, 0.5)


@pytest.mark.skipif("cpu" not in sampler_step.available("cpu"), reason="the C++ ops are not built")
def test_a_row_is_the_same_in_any_batch_and_with_any_number_of_threads():
    output, x_t, noise = (torch.randn(3001, 50) for _ in range(3))
    step = sampler_step.bind("cpu", "cpu")
    whole = step(output, x_t, noise, 0.9, 0.3, 0.2, True)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        rows = slice(1234, 1301)
        assert torch.equal(step(output[rows], x_t[rows], noise[rows], 0.9, 0.3, 0.2, True), whole[rows])


@pytest.mark.skipif("cpu" not in sampler_step.available("cpu"), reason="the C++ ops are not built")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    sampler_step.bind("cpu", "cpu")
    tensors = [LAYOUTS[layout](torch.randn(5, 7)) for _ in range(3)]
    torch.library.opcheck(torch.ops.fastdiff.sampler_step.default, (*tensors, 0.5, 0.4, 0.3, True))
