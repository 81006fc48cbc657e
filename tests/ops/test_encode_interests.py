"""encode_interests on every backend that can run here, against one user after another in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdiff.ops.encode_interests import (
    InterestAttention,
    InterestExtractor,
    encode_interests,
    encode_interests_ref,
)
from tests.devices import place_op, places
from tests.tolerances import FLOOR, assert_agree, relative_error

CPU_MISSING = "cpu" not in encode_interests.available("cpu")
WINDOW, PAD, ROWS = 7, 0, 40
LENGTHS = [0, 1, 2, 3, 5, 6, 7, 7, 0, 4]


@pytest.fixture(params=places(encode_interests))
def encode(request):
    return place_op(encode_interests, request.param)


def make(dim: int, interests: int = 3, hidden: int | None = None) -> tuple[Tensor, InterestExtractor]:
    """A table and a learned extractor in float64."""
    torch.manual_seed(dim * 100 + interests)
    hidden = 4 * dim if hidden is None else hidden
    up = (torch.randn(hidden, dim).double() / dim**0.5, torch.randn(hidden).double() * 0.3)
    down = (2 * torch.randn(interests, hidden).double() / hidden**0.5, torch.randn(interests).double() * 0.3)
    attention = InterestAttention(torch.randn(WINDOW, dim).double(), up, down)
    return torch.randn(ROWS, dim).double(), InterestExtractor(interests, PAD, attention)


def cast(extractor: InterestExtractor, dtype: torch.dtype, positions_in_values: bool = False) -> InterestExtractor:
    attention = extractor.attention
    assert attention is not None
    up, down = (tuple(part.to(dtype) for part in layer) for layer in (attention.up, attention.down))
    return replace(extractor, attention=InterestAttention(attention.positions.to(dtype), up, down, positions_in_values))


def histories(n: int = WINDOW) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(LENGTHS).clamp(max=n)
    items = torch.randint(1, ROWS, (len(LENGTHS), n))
    items[3, 1] = items[6, 0] = items[7, 6] = PAD  # inside a history, first and last
    items[2, :2] = PAD  # a history of pads alone
    return items.masked_fill(torch.arange(n) >= lengths[:, None], PAD), lengths


def interests_of(items: Tensor, lengths: Tensor, table: Tensor, extractor: InterestExtractor) -> Tensor:
    """One user, one interest, one item after another."""
    attention, result = extractor.attention, []
    for user, length in zip(items.tolist(), lengths.tolist(), strict=True):
        places = [place for place in range(length) if user[place] != PAD]
        g = torch.zeros(extractor.n_interests, table.shape[1]).double()
        if attention is None:
            for k in range(extractor.n_interests):
                place = length - extractor.n_interests + k
                if place in places:
                    g[k] = table[user[place]].double()
        elif places:
            items_of, positions = (
                table[[user[place] for place in places]].double(),
                attention.positions.double()[places],
            )
            (w_1, b_1), (w_2, b_2) = ((w.double(), b.double()) for w, b in (attention.up, attention.down))
            logits = torch.tanh((items_of + positions) @ w_1.T + b_1) @ w_2.T + b_2
            values = items_of + positions if attention.positions_in_values else items_of
            for k in range(extractor.n_interests):
                weights = torch.exp(logits[:, k] - logits[:, k].max())
                g[k] = sum(weight * value for weight, value in zip(weights / weights.sum(), values, strict=True))
        result.append(g)
    return torch.stack(result)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 33, 50, 64])
@pytest.mark.parametrize("interests", [1, 4, 17])
@pytest.mark.parametrize("kind", ["values", "positions in values", "last items"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_formula_user_by_user(encode, dim, interests, kind, dtype):
    encode.needs(dtype)
    table, extractor = make(dim, interests)
    table, extractor = table.to(dtype), cast(extractor, dtype, kind == "positions in values")
    extractor = replace(extractor, attention=None) if kind == "last items" else extractor
    items, lengths = histories()
    ours, truth = encode(items, lengths, table, extractor), interests_of(items, lengths, table, extractor)
    assert ours.dtype == dtype
    if kind == "last items":
        assert torch.equal(ours.double(), truth)
    else:
        twin = relative_error(encode_interests_ref(items, lengths, table, extractor), truth)
        assert relative_error(ours, truth) <= 2 * twin + FLOOR[dtype]
    for cold in (0, 2, 8):
        assert torch.equal(ours[cold], torch.zeros_like(ours[cold]))


def test_logits_far_apart_neither_overflow_nor_mix(encode):
    table, extractor = make(8)
    attention = extractor.attention
    sharp = replace(attention, down=(attention.down[0] * 1e4, attention.down[1]))
    items, lengths = histories()
    extractor = cast(replace(extractor, attention=sharp), torch.float32)
    truth = interests_of(items, lengths, table.float(), extractor)
    assert_agree(encode(items, lengths, table.float(), extractor), truth, torch.float32)


def test_logits_of_tens_whose_differences_matter_keep_their_digits(encode):
    """As training makes them: each is a sum of 256 terms that mostly agree, alike for all items."""
    table, extractor = make(64)
    table[1:] += 2 * table[1].sign()
    attention = extractor.attention
    agreed = torch.sign(attention.up[0] @ table[1].sign())
    large = replace(attention, down=(torch.rand(3, 256).double() * agreed, attention.down[1]))
    extractor, table = cast(replace(extractor, attention=large), torch.float32), table.float()
    items, lengths = (torch.cat([part] * 20) for part in histories())
    items = torch.where(items == PAD, PAD, torch.randint(1, ROWS, items.shape))
    truth = interests_of(items, lengths, table, extractor)
    twin = relative_error(encode_interests_ref(items, lengths, table, extractor), truth)
    assert relative_error(encode(items, lengths, table, extractor), truth) <= 2 * twin + FLOOR[torch.float32]


def test_no_users_and_no_places(encode):
    table, extractor = make(8)
    for each in (cast(extractor, torch.float32), replace(extractor, attention=None)):
        none = torch.zeros(0, 3, dtype=torch.int64)
        assert encode(none, none[:, 0], table.float(), each).shape == (0, 3, 8)
        cold = encode(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), table.float(), each)
        assert torch.equal(cold, torch.zeros(3, 3, 8))


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
@pytest.mark.parametrize("dim", [20, 64])
@pytest.mark.parametrize("interests", [4, 19])
def test_a_user_has_the_same_bits_in_any_batch_width_and_number_of_threads(dim, interests):
    encode = encode_interests.bind("cpu", "cpu")
    table, extractor = make(dim, interests)
    table, extractor = table.float(), cast(extractor, torch.float32, positions_in_values=True)
    items, lengths = (torch.cat([part] * 20) for part in histories())
    whole = encode(items, lengths, table, extractor)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (slice(0, 200), slice(0, 1), slice(4, 5), slice(6, 8), slice(50, 131)):
            assert torch.equal(encode(items[rows], lengths[rows], table, extractor), whole[rows])
    assert torch.equal(encode(items[:3, :2], lengths[:3], table, extractor), whole[:3])


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_what_is_no_row_of_the_table_is_refused():
    encode = encode_interests.bind("cpu", "cpu")
    table, extractor = make(8)
    for each in (cast(extractor, torch.float32), replace(extractor, attention=None)):
        for bad in (-1, ROWS, 2**40):
            items = torch.tensor([[1, bad, 2]])
            assert encode(items, torch.tensor([1]), table.float(), each).isfinite().all()  # beyond the length: not read
            with pytest.raises(RuntimeError, match=r"encode_interests: items must be rows of the table, 0 .. 39"):
                encode(items, torch.tensor([3]), table.float(), each)
        for length in (-1, 4):
            with pytest.raises(RuntimeError, match=r"lengths in 0 \.\. 3"):
                encode(torch.tensor([[1, 1, 2]]), torch.tensor([length]), table.float(), each)
    long, learned = torch.ones(1, WINDOW + 1, dtype=torch.int64), cast(extractor, torch.float32)
    with pytest.raises(RuntimeError, match=r"lengths in 0 \.\. 7"):  # longer than the window
        encode(long, torch.tensor([WINDOW + 1]), table.float(), learned)


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_opcheck():
    from fastdiff.ops.cpu.encode_interests import _pack

    encode_interests.bind("cpu", "cpu")
    table, extractor = make(8)
    table = table.float()
    items, lengths = histories()
    transposed, sliced = items.T.contiguous().T, torch.cat([items, items], dim=1)[:, : items.shape[1]]
    for each in (cast(extractor, torch.float32), replace(extractor, attention=None)):
        weights, window, hidden, positions_in_values = _pack(each)
        for given in (items, transposed, sliced):
            for rows in (table, table.T.contiguous().T):
                arguments = (given, lengths, rows, weights, window, hidden, 3, PAD, positions_in_values)
                torch.library.opcheck(torch.ops.fastdiff.encode_interests.default, arguments)


def test_other_weights_are_other_results(encode):
    """What a backend keeps of one extractor is never used for another."""
    table, extractor = make(8)
    items, lengths = histories()
    extractor = cast(extractor, torch.float32)
    attention = extractor.attention
    for changed in (
        replace(attention, positions=attention.positions * 2),
        replace(attention, up=(attention.up[0] * 2, attention.up[1])),
        replace(attention, up=(attention.up[0], attention.up[1] + 1)),
        replace(attention, down=(attention.down[0] * 2, attention.down[1])),
        replace(attention, positions_in_values=True),
        None,
    ):
        other = replace(extractor, attention=changed)
        truth = interests_of(items, lengths, table.float(), other)
        assert_agree(encode(items, lengths, table.float(), other), truth, torch.float32)
