"""decode_context: every backend against float64, draws given and made inside, and bits whatever batch and threads."""

from functools import partial

import pytest
import torch
from torch import Tensor

from fastdiff.noise import GivenNoise, Noise, PhiloxNoise
from fastdiff.ops.cpu import library
from fastdiff.ops.decode_context import ContextDecoder, decode_context
from tests.devices import place_op, places
from tests.ops.test_encode_padded_history import converted, drawn, linear, norm
from tests.tolerances import FLOOR, relative_error

CPP = pytest.mark.skipif(library.why_not() is not None, reason="the C++ ops are not built")
SIZES = [(1, 1, "relu"), (6, 3, "gelu"), (20, 2, "relu"), (128, 2, "gelu")]  # dim, heads, activation
BATCHES = ((0, 1, False), (1, 1, True), (7, 3, False), (33, 1, False), (19, 2, True))  # users, samples, normalize
FEW = ((0, 1, False), (1, 1, True), (7, 3, False), (17, 1, True))
"""For kernels that are interpreted."""
PLANS = {
    "one step": [[1.0, 0.0, 0.5]],
    "no noise": [[0.7, 0.0, 0.0]],
    "the last step forgets": [[1.0, 0.2, 0.5], [0.9, 0.0, 0.1]],
    "a step remembers": [[0.3, 0.4, 0.5], [0.9, 0.0, 0.1], [0.8, 0.3, 0.0], [0.9, -0.2, 0.2]],
    "all remember": [[0.3, 0.4, 0.5], [0.9, 0.1, 0.1]],
}


def drawn_decoder(dim: int, heads: int, activation: str, coupled: bool) -> ContextDecoder:
    qkv = (3 * drawn(3 * dim, dim) * dim**-0.5, drawn(3 * dim))
    layers = (linear(dim, dim), norm(dim), linear(dim, dim), linear(dim, dim), norm(dim), norm(dim))
    return ContextDecoder(qkv, *layers, n_heads=heads, coupled=coupled, activation=activation)


def in_float32(decoder: ContextDecoder) -> ContextDecoder:
    narrow: ContextDecoder = converted(decoder, torch.float32)
    return narrow


class Recorded(Noise):
    """Given draws; which of them were asked for."""

    def __init__(self, noise: Tensor) -> None:
        self.noise, self.asked = noise, []

    def draw(self, index: int) -> Tensor:
        self.asked.append(index)
        return self.noise[index]


@pytest.mark.parametrize("place", places(decode_context))
@pytest.mark.parametrize("coupled", [False, True], ids=["alone", "coupled"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_backend_is_as_good_as_torch(
    place: str, coupled: bool, plan: str, sizes: tuple[int, int, str], nan_empty: None
) -> None:
    dim, coef = sizes[0], torch.tensor(PLANS[plan], dtype=torch.float64)
    wide = drawn_decoder(*sizes, coupled)
    op = place_op(decode_context, place)
    for users, samples, normalize in FEW if op.interpreted else BATCHES:
        context, cross = drawn(users, dim), drawn(len(coef), dim)
        draws = drawn(1 + len(coef), users * samples, dim)
        narrow = in_float32(wide)

        run = partial(op, context.float(), narrow, cross.float(), coef, normalize, samples)
        noise = Recorded(draws.float())
        got = run(noise)
        assert got.shape == (users * samples, dim)
        expected = Recorded(draws.float())
        torch_result = decode_context.reference(
            context.float(), narrow, cross.float(), coef, normalize, samples, expected
        )
        assert noise.asked == expected.asked, "draws are asked for in the reference's order"
        if users == 0:
            continue
        truth = decode_context.reference(context, wide, cross, coef, normalize, samples, GivenNoise(draws))
        bound = 2 * relative_error(torch_result, truth) + FLOOR[torch.float32]
        assert relative_error(got, truth) <= bound
        keys = torch.randint(-(1 << 62), 1 << 62, (users * samples,))
        philox = PhiloxNoise(99, keys, torch.arange(users * samples) % samples, dim, torch.float32)
        given = torch.stack([philox.draw(i) for i in range(1 + len(coef))])
        assert relative_error(run(philox), run(GivenNoise(given))) <= FLOOR[torch.float32] + 1e-6


@pytest.mark.parametrize("place", [place for place in places(decode_context) if place != "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("coupled", [False, True], ids=["alone", "coupled"])
@pytest.mark.parametrize("plan", ["one step", "a step remembers"])
def test_half_precision(place: str, dtype: torch.dtype, coupled: bool, plan: str) -> None:
    op = place_op(decode_context, place)
    op.needs(dtype)
    coef = torch.tensor(PLANS[plan], dtype=torch.float64)
    for sizes in SIZES[1:3]:
        given = (drawn_decoder(*sizes, coupled), drawn(12, sizes[0]), drawn(len(coef), sizes[0]))
        # the truth is that of the rounded weights
        decoder, context, cross = converted(given, dtype)
        draws = drawn(1 + len(coef), 24, sizes[0]).to(dtype)
        got = op(context, decoder, cross, coef, True, 2, GivenNoise(draws))
        assert got.dtype == dtype
        wide, wide_context, wide_cross, wide_draws = converted((decoder, context, cross, draws), torch.float64)
        reference = decode_context.reference
        truth = reference(wide_context, wide, wide_cross, coef, True, 2, GivenNoise(wide_draws))
        twin = reference(context, decoder, cross, coef, True, 2, GivenNoise(draws))
        assert relative_error(got, truth) <= 2 * relative_error(twin, truth) + FLOOR[dtype]


@CPP
@pytest.mark.parametrize("coupled", [False, True], ids=["alone", "coupled"])
def test_threads_change_no_bit_and_neither_does_the_batch_of_users_alone(coupled: bool) -> None:
    op = decode_context.bind("cpu", "cpu")
    coef = torch.tensor(PLANS["a step remembers"], dtype=torch.float64)
    for sizes in SIZES:
        decoder = in_float32(drawn_decoder(*sizes, coupled))
        context, cross = torch.randn(40, sizes[0]), torch.randn(4, sizes[0])
        noise = torch.randn(5, 80, sizes[0])
        torch.set_num_threads(1)
        expected = op(context, decoder, cross, coef, False, 2, GivenNoise(noise))
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(op(context, decoder, cross, coef, False, 2, GivenNoise(noise)), expected)
        if not coupled:
            some = [
                op(context[i : i + n], decoder, cross, coef, False, 2, GivenNoise(noise[:, 2 * i : 2 * (i + n)]))
                for i, n in ((0, 1), (1, 2), (3, 7), (10, 30))
            ]
            assert torch.equal(torch.cat(some), expected)


@CPP
@pytest.mark.parametrize("coupled", [False, True], ids=["alone", "coupled"])
def test_opcheck(coupled: bool) -> None:
    from fastdiff.ops.cpu.decode_context import _pack

    weights = _pack(in_float32(drawn_decoder(6, 3, "gelu", coupled)))
    context, cross = torch.randn(6, 5).T, torch.randn(2, 12)[:, ::2]  # transposed, sliced
    coef = torch.tensor([[1.0, 0.0, 0.5], [0.9, 0.1, 0.1]], dtype=torch.float64)
    noise, keys = torch.randn(2, 10, 6), torch.arange(10)
    sizes = (3, coupled, True, 1e-5, cross, coef, False, 2, None)
    op = torch.ops.fastdiff.decode_context.default
    torch.library.opcheck(op, (context, weights, *sizes, 1, noise, 0, None, None))
    torch.library.opcheck(op, (context, weights, *sizes, 1, None, -5, keys, keys % 2))
    with pytest.raises(RuntimeError, match="decode_context: noise must hold a draw for step 1"):
        op(context, weights, *sizes, 1, noise[:1], 0, None, None)
    with pytest.raises(RuntimeError, match=r"decode_context: num_samples must be in 1 \.\. 2\^24 - 1"):
        op(context, weights, *sizes[:-2], 2**63 - 1, None, 1, None, -5, keys, keys % 2)
