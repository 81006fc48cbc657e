"""Blocks that several models share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.errors import InvalidArgument
from fastdiff.models.layers import RaggedRows, attend, merge_heads, sinusoidal_embedding, split_heads
from tests.tolerances import assert_agree


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin"])
@pytest.mark.parametrize(("spacing", "count"), [("half", 4), ("half_minus_one", 3)])
def test_sinusoids(order: str, spacing: str, count: int) -> None:
    """tau(t)_k = sin or cos of t 10000^(-k / count)."""
    embedding = sinusoidal_embedding(torch.tensor([0.0, 31.25, 7.0]), 8, order, spacing)
    halves = {"sin": math.sin, "cos": math.cos}
    for row, t in enumerate([0.0, 31.25, 7.0]):
        expected = [halves[name](t * 10000 ** (-k / count)) for name in order.split("_") for k in range(4)]
        assert_agree(embedding[row], torch.tensor(expected), torch.float32)
    assert embedding.dtype == torch.float32


def test_the_smallest_sinusoid_has_one_frequency() -> None:
    for spacing in ("half", "half_minus_one"):
        embedding = sinusoidal_embedding(torch.tensor([2]), 2, "sin_cos", spacing)
        assert_agree(embedding, torch.tensor([[math.sin(2.0), math.cos(2.0)]]), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, "sin_cos", "half"), r"dim must be an even number of at least 2 \(got 7\)"),
        ((8, "cos", "half"), r"order must be 'sin_cos' or 'cos_sin' \(got 'cos'\)"),
        ((8, "sin_cos", "third"), r"spacing must be 'half' or 'half_minus_one' \(got 'third'\)"),
    ],
)
def test_bad_sinusoids(arguments: tuple[int, str, str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        sinusoidal_embedding(torch.zeros(1), *arguments)


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 3), st.integers(1, 3))
def test_ragged_rows(lengths: list[int], spare: int, times: int) -> None:
    """Packing undoes padding, the rectangle holds zeros outside, and `last` is the last row of each sequence."""
    width = max(lengths, default=0) + spare
    sequences = [torch.randn(length, 3) for length in lengths] * times
    rows = RaggedRows.of(torch.tensor(lengths, dtype=torch.int64), width).repeat(times)
    packed = torch.cat([torch.zeros(0, 3), *sequences])
    padded = rows.pad(packed)

    assert padded.shape == (len(lengths) * times, width, 3)
    assert torch.equal(rows.pack(padded), packed)
    otherwise = torch.tensor([7.0, 8.0, 9.0])
    last = rows.last(packed, otherwise)
    for row, sequence in enumerate(sequences):
        assert torch.equal(padded[row, : len(sequence)], sequence)
        assert not padded[row, len(sequence) :].any()
        assert torch.equal(last[row], sequence[-1] if len(sequence) else otherwise)


def test_attend_is_softmax_attention_head_by_head() -> None:
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    query, key, value = (split_heads(part, 4) for part in (x[0], x[1], x[2]))
    bias = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    bias[:, :, :, 4] = -torch.inf
    weights = torch.softmax(query @ key.transpose(-1, -2) + bias, dim=-1)
    assert_agree(attend(query, key, value, bias), merge_heads(weights @ value), torch.float64)
    assert torch.equal(merge_heads(query), x[0])
