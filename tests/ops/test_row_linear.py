"""row_linear on every backend that can run here."""

import pytest
import torch
from torch import Tensor

from fastdiff.ops.row_linear import LinearWeights, row_linear
from tests.devices import place_op, places
from tests.tolerances import FLOOR, relative_error

CPU_MISSING = "cpu" not in row_linear.available("cpu")
SHAPES = [(1, 1, 1), (3, 7, 5), (33, 64, 64), (100, 130, 50), (0, 8, 4), (70, 5, 16), (2, 300, 129)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "transposed": lambda x: x.T.contiguous().T,
}


@pytest.fixture(params=places(row_linear))
def linear(request):
    return place_op(row_linear, request.param)


def made(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n_out, n_in), torch.randn(n_out)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_product(linear, shape, layout, dtype):
    linear.needs(dtype)
    rows, n_in, n_out = shape
    x = LAYOUTS[layout](torch.randn(rows, n_in).to(dtype))
    weight, bias = (part.to(dtype) for part in made(n_in, n_out))
    ours = linear(x, LinearWeights(LAYOUTS[layout](weight), bias))
    truth = x.double() @ weight.double().T + bias.double()
    assert ours.shape == (rows, n_out)
    assert ours.dtype == dtype
    twin = relative_error(x @ weight.T + bias, truth)
    assert relative_error(ours, truth) <= 2 * twin + FLOOR[dtype]


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 64), (50, 33)])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(n_in, n_out):
    linear = row_linear.bind("cpu", "cpu")
    x, layer = torch.randn(3001, n_in), LinearWeights(*made(n_in, n_out))
    whole = linear(x, layer)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (slice(0, 3001), slice(7, 8), slice(100, 103), slice(2000, 2077)):
            assert torch.equal(linear(x[rows], layer), whole[rows])


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    from fastdiff.ops.cpu.row_linear import _pack

    row_linear.bind("cpu", "cpu")
    packed = _pack(LinearWeights(*made(7, 5)))
    torch.library.opcheck(torch.ops.fastdiff.row_linear.default, (LAYOUTS[layout](torch.randn(4, 7)), packed, 5))


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_what_does_not_fit_is_named():
    linear = row_linear.bind("cpu", "cpu")
    with pytest.raises(RuntimeError, match=r"row_linear: weights must have shape \[64\] \(got \[48\]\)"):
        linear(torch.randn(2, 3), LinearWeights(*made(2, 5)))


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_workers_treat_subnormals_as_the_caller_does():
    linear = row_linear.bind("cpu", "cpu")
    x, layer = torch.full((100_000, 64), 1e-39), LinearWeights(torch.ones(16, 64), torch.zeros(16))
    torch.set_num_threads(4)
    counted = linear(x, layer)  # the workers start here
    assert (counted.view(torch.int32) > 0).all()
    try:
        assert torch.set_flush_denormal(True)
        flushed = [linear(x, layer) for _ in range(3)]
    finally:
        torch.set_flush_denormal(False)
    assert not any(y.any() for y in flushed)
    assert torch.equal(linear(x, layer), counted)
