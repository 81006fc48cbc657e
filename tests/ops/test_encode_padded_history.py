"""encode_padded_history: every backend against float64, and a user's bits whatever the batch and the threads."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.ops.cpu import library
from fastdiff.ops.encode_padded_history import PaddedEncoder, encode_padded_history
from fastdiff.ops.padded_transformer import Layer, PaddedBlock
from tests.devices import needs_gpu, place_op, places
from tests.tolerances import FLOOR, relative_error

# (dim, heads, hidden, layers, window, activation)
SIZES = [(1, 1, 3, 1, 1, "relu"), (6, 3, 5, 2, 4, "gelu"), (20, 2, 37, 3, 7, "relu"), (128, 2, 512, 1, 20, "gelu")]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def linear(width_out: int, width_in: int) -> Layer:
    return drawn(width_out, width_in) * width_in**-0.5, 0.3 * drawn(width_out)


def norm(dim: int) -> Layer:
    return 1 + 0.3 * drawn(dim), 0.3 * drawn(dim)


def drawn_encoder(dim: int, heads: int, hidden: int, layers: int, window: int, activation: str) -> PaddedEncoder:
    """In float64, with attention far from even."""
    blocks = tuple(
        PaddedBlock(
            query=(2 * drawn(dim, dim), drawn(dim)),
            key=linear(dim, dim),
            value=linear(dim, dim),
            out=linear(dim, dim),
            norm_1=norm(dim),
            up=linear(hidden, dim),
            down=linear(dim, hidden),
            norm_2=norm(dim),
            n_heads=heads,
            activation=activation,
        )
        for _ in range(layers)
    )
    return PaddedEncoder(drawn(window, dim), norm(dim), blocks, 0, drawn(1, dim))


def in_float32(encoder: PaddedEncoder) -> PaddedEncoder:
    narrow: PaddedEncoder = converted(encoder, torch.float32)
    return narrow


def converted(value: Any, dtype: torch.dtype) -> Any:
    """A value with every floating tensor in it, also inside of tuples and dataclasses, in a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(converted(part, dtype) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: converted(getattr(value, one.name), dtype) for one in fields(value)})
    return value


def drawn_histories(users: int, window: int) -> tuple[Tensor, Tensor]:
    """Of every length, with pads inside and at the end, and what is no row of the table beyond a history's end."""
    lengths = torch.arange(users) % (window + 1)
    items = torch.randint(1, 30, (users, window)).masked_fill(torch.rand(users, window) < 0.2, 0)
    if users > 2:
        items[window % users] = 0  # pads alone
    return items.masked_fill(torch.arange(window) >= lengths[:, None], 1 << 40), lengths


@pytest.mark.parametrize("place", places(encode_padded_history))
@pytest.mark.parametrize("users", [0, 1, 2, 7, 33, pytest.param(300, marks=needs_gpu)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_backend_is_as_good_as_torch(
    place: str, users: int, sizes: tuple[int, int, int, int, int, str], nan_empty: None
) -> None:
    wide, (items, lengths) = drawn_encoder(*sizes), drawn_histories(users, sizes[4])
    table = drawn(30, sizes[0])
    encoder = in_float32(wide)
    op = place_op(encode_padded_history, place)
    got = op(items, lengths, table.float(), encoder)
    assert got.shape == (users, sizes[0])
    assert got.is_contiguous()
    if users == 0:
        return
    truth = encode_padded_history.reference(items, lengths, table, wide)
    torch_error = relative_error(encode_padded_history.reference(items, lengths, table.float(), encoder), truth)
    assert relative_error(got, truth) <= 2 * torch_error + FLOOR[torch.float32]


@pytest.mark.parametrize("place", [place for place in places(encode_padded_history) if place != "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_half_precision(
    place: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int, str], nan_empty: None
) -> None:
    op = place_op(encode_padded_history, place)
    op.needs(dtype)
    # the truth is that of the rounded weights
    encoder, table = converted((drawn_encoder(*sizes), drawn(30, sizes[0])), dtype)
    items, lengths = drawn_histories(12, sizes[4])
    got = op(items, lengths, table, encoder)
    assert got.dtype == dtype
    wide, wide_table = converted((encoder, table), torch.float64)
    truth = encode_padded_history.reference(items, lengths, wide_table, wide)
    torch_error = relative_error(encode_padded_history.reference(items, lengths, table, encoder), truth)
    assert relative_error(got, truth) <= 2 * torch_error + FLOOR[dtype]


@pytest.mark.parametrize("place", places(encode_padded_history))
def test_views_and_wide_rectangles(place: str) -> None:
    encoder = in_float32(drawn_encoder(20, 2, 37, 2, 7, "gelu"))
    items, lengths = drawn_histories(9, 7)
    table = torch.randn(30, 20)
    op = place_op(encode_padded_history, place)
    expected = op(items, lengths, table, encoder)
    wider = torch.full((9, 40), 1 << 40)
    wider[:, 1:15:2] = items
    wide_table = torch.randn(20, 60)
    wide_table[:, ::2] = table.T
    assert torch.equal(op(wider[:, 1:15:2], lengths, wide_table[:, ::2].T, encoder), expected)


@pytest.mark.skipif(library.why_not() is not None, reason="the C++ ops are not built")
def test_a_user_has_the_same_bits_in_any_batch_and_on_any_threads() -> None:
    op = encode_padded_history.bind("cpu", "cpu")
    for sizes in SIZES:
        encoder = in_float32(drawn_encoder(*sizes))
        items, lengths = drawn_histories(40, sizes[4])
        table = torch.randn(30, sizes[0])
        alone = torch.cat([op(items[i : i + 1], lengths[i : i + 1], table, encoder) for i in range(40)])
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            assert torch.equal(op(items, lengths, table, encoder), alone)
            assert torch.equal(op(items[3:20], lengths[3:20], table, encoder), alone[3:20])


@pytest.mark.skipif(library.why_not() is not None, reason="the C++ ops are not built")
def test_what_lies_outside_is_refused() -> None:
    encoder = in_float32(drawn_encoder(6, 3, 5, 1, 4, "gelu"))
    op, table = encode_padded_history.bind("cpu", "cpu"), torch.randn(30, 6)
    items = torch.tensor([[1, 2, 30, 4]])
    with pytest.raises(RuntimeError, match=r"encode_padded_history: items must be rows 0\.\.29 \(got 30\)"):
        op(items, torch.tensor([4]), table, encoder)
    with pytest.raises(RuntimeError, match=r"encode_padded_history: lengths must be in 0\.\.4 \(got 5\)"):
        op(items, torch.tensor([5]), table, encoder)
    with pytest.raises(RuntimeError, match=r"encode_padded_history: lengths must be in 0\.\.4 \(got -1\)"):
        op(items, torch.tensor([-1]), table, encoder)


@pytest.mark.skipif(library.why_not() is not None, reason="the C++ ops are not built")
@pytest.mark.parametrize("users", [0, 3])
def test_opcheck(users: int) -> None:
    from fastdiff.ops.cpu.encode_padded_history import _pack

    encoder = in_float32(drawn_encoder(6, 3, 5, 2, 4, "gelu"))
    items, lengths = drawn_histories(users, 4)
    weight, bias, blocks = _pack(encoder)
    table = torch.randn(6, 30).T  # transposed
    torch.library.opcheck(
        torch.ops.fastdiff.encode_padded_history.default,
        (items, lengths, table, encoder.positions, weight, bias, blocks, 5, 3, True, 1e-12, 0, encoder.empty),
    )
