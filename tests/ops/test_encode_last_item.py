"""encode_last_item on every backend that can run here, against the whole transformer block in float64."""

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.encode_last_item import LastItemBlock, encode_last_item, encode_last_item_ref
from tests.devices import place_op, places
from tests.syncs import no_syncs
from tests.tolerances import AGREE, FLOOR, assert_agree, relative_error

CPU_MISSING = "cpu" not in encode_last_item.available("cpu")
WINDOW, PAD = 7, 0
LENGTHS = [0, 1, 2, 3, 5, 6, 7, 7, 0, 4]


@pytest.fixture(params=places(encode_last_item))
def encode(request):
    return place_op(encode_last_item, request.param)


def make(
    dim: int, dtype: torch.dtype = torch.float64, rows: int = 40
) -> tuple[Tensor, dict[str, Tensor], LastItemBlock]:
    """A table, the layers as the authors have them, and the same folded."""
    torch.manual_seed(dim)
    table = torch.randn(rows, dim).double()
    w = {name: torch.randn(dim, dim).double() / math.sqrt(dim) for name in ("q", "k", "v", "up", "down")}
    w |= {f"{name}_bias": torch.randn(dim).double() * 0.3 for name in ("q", "k", "v", "up", "down")}
    w |= {f"n{i}": 1 + torch.randn(dim).double() * 0.2 for i in range(4)}
    w |= {f"n{i}_bias": torch.randn(dim).double() * 0.2 for i in range(4)}
    w["positions"] = torch.randn(WINDOW, dim).double()
    return table.to(dtype), w, folded(w, dtype)


def folded(w: dict[str, Tensor], dtype: torch.dtype) -> LastItemBlock:
    def pair(name: str) -> tuple[Tensor, Tensor]:
        return w[name].to(dtype), w[f"{name}_bias"].to(dtype)

    qk = tuple(part.to(dtype) for part in LastItemBlock.fold_key((w["q"], w["q_bias"]), w["k"]))
    norms = [pair(f"n{i}") for i in range(4)]
    return LastItemBlock(w["positions"].to(dtype), qk, pair("v"), pair("up"), pair("down"), *norms, PAD)


def whole_block(items: Tensor, lengths: Tensor, table: Tensor, w: dict[str, Tensor]) -> Tensor:
    """One user after another, keys and values formed, all rows computed: the authors' block."""

    def norm(i: int, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"n{i}"], w[f"n{i}_bias"], 1e-5)

    result = []
    for user, length in zip(items, lengths.tolist(), strict=True):
        row = [*user[:length].tolist(), *[PAD] * (WINDOW - length)]
        real = torch.tensor([item != PAD for item in row]).double()[:, None]
        e = (table[row] + w["positions"]) * real
        query = norm(1 - 1, e)
        q, k, v = query @ w["q"].T + w["q_bias"], e @ w["k"].T + w["k_bias"], e @ w["v"].T + w["v_bias"]
        logits = q @ k.T / math.sqrt(e.shape[1])
        hidden = (e.sum(-1) == 0)[None, :] | torch.ones(WINDOW, WINDOW).triu(1).bool()
        weights = torch.softmax(logits.masked_fill(hidden, -(2.0**32) + 1), dim=-1)
        weights = weights * (query.sum(-1) != 0)[:, None]
        z = norm(1, weights @ v + query)
        out = F.linear(F.relu(F.linear(z, w["up"], w["up_bias"])), w["down"], w["down_bias"]) + z
        out = norm(3, norm(2, out) * real)
        result.append(out[max(length - 1, 0)])
    return torch.stack(result)


def histories(rows: int = 40, n: int = WINDOW) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(LENGTHS).clamp(max=n)
    items = torch.randint(1, rows, (len(LENGTHS), n))
    items[3, 1] = items[6, 0] = items[7, 6] = PAD  # inside a history, first and last
    return items.masked_fill(torch.arange(n) >= lengths[:, None], PAD), lengths


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 33, 50, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_last_row_of_the_whole_block(encode, dim, dtype):
    encode.needs(dtype)
    table, w, block = make(dim, dtype)
    items, lengths = histories()
    ours = encode(items, lengths, table, block)
    truth = whole_block(items, lengths, table.double(), {name: value.to(dtype).double() for name, value in w.items()})
    assert ours.dtype == dtype
    twin = relative_error(encode_last_item_ref(items, lengths, table, block), truth)
    assert relative_error(ours, truth) <= 2 * twin + FLOOR[dtype] * (4 if dim < 3 else 1)
    assert torch.equal(ours[0], block.norm_3[1])
    assert torch.equal(ours[8], block.norm_3[1])


def test_masks_strike_where_features_sum_to_exactly_zero(encode):
    """Integer features: sums are exact in any order, so every backend must decide as the authors do."""
    table, w, _ = make(9)
    for name in ("positions",):
        w[name] = torch.randint(-3, 4, w[name].shape).double()
        w[name][:, 0] -= w[name].sum(1)
    table = torch.randint(-3, 4, table.shape).double()
    table[:, 0] += 1 - table.sum(1)
    table[[3, 11], 0] -= 1  # these two sum to 0 at every place
    block = folded(w, torch.float32)
    for history in ([3], [3, 5], [5, 3], [3, 5, 11, 7], [5, 3, 7, 11], [3, 11, 3], [3] * WINDOW, [0, 3, 0]):
        items, lengths = torch.tensor([history]), torch.tensor([len(history)])
        truth = whole_block(items, lengths, table, w)
        assert_agree(encode(items, lengths, table.float(), block), truth, torch.float32)


def test_a_query_whose_norm_sums_to_zero_attends_to_nothing(encode):
    table, w, _ = make(12)
    w["n0"] = torch.zeros(12).double()
    w["n0_bias"] = torch.tensor([1.0, -1.0] + [0.0] * 10).double()
    items, lengths = histories()
    ours = encode(items, lengths, table.float(), folded(w, torch.float32))
    assert_agree(ours, whole_block(items, lengths, table, w), torch.float32)
    w["v_bias"] = w["v_bias"] + 100.0
    assert torch.equal(encode(items, lengths, table.float(), folded(w, torch.float32)), ours)


def test_no_users_and_no_places(encode):
    table, _, block = make(8, torch.float32)
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert encode(none, none[:, 0], table, block).shape == (0, 8)
    cold = encode(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), table, block)
    assert torch.equal(cold, block.norm_3[1].expand(3, 8))


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("outputs", [1, 16, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_head_reads_the_row(encode, outputs, dtype):
    encode.needs(dtype)
    table, w, block = make(20, dtype)
    head = (torch.randn(outputs, 20, dtype=dtype), torch.randn(outputs, dtype=dtype))
    items, lengths = histories()
    ours = encode(items, lengths, table, replace(block, head=head))
    truth = whole_block(items, lengths, table.double(), {name: value.to(dtype).double() for name, value in w.items()})
    assert ours.dtype == dtype
    truth = F.linear(truth, head[0].double(), head[1].double())
    if dtype in AGREE:
        assert_agree(ours, truth, dtype)
    twin = relative_error(encode_last_item_ref(items, lengths, table, replace(block, head=head)), truth)
    assert relative_error(ours, truth) <= 2 * twin + FLOOR[dtype]
    assert encode(items[:0], lengths[:0], table, replace(block, head=head)).shape == (0, outputs)


@pytest.mark.skipif("triton" not in places(encode_last_item), reason="no Triton here")
def test_triton_waits_for_nothing():
    encode = place_op(encode_last_item, "triton")
    table, _, block = make(8, torch.float32)
    block = replace(block, head=(torch.randn(5, 8), torch.randn(5)))
    items, lengths = histories()
    packed_first = encode(items, lengths, table, block)
    with no_syncs():
        ours = encode(items, lengths, table, block)
    assert torch.equal(ours, packed_first)


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
@pytest.mark.parametrize("dim", [20, 64])
def test_a_row_has_the_same_bits_in_any_batch_width_and_number_of_threads(dim):
    encode = encode_last_item.bind("cpu", "cpu")
    table, _, block = make(dim, torch.float32)
    items, lengths = (torch.cat([part] * 20) for part in histories())
    block = replace(block, head=(torch.randn(37, dim), torch.randn(37)))
    whole = encode(items, lengths, table, block)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (slice(0, 200), slice(0, 1), slice(4, 5), slice(6, 8), slice(50, 131)):
            assert torch.equal(encode(items[rows], lengths[rows], table, block), whole[rows])
    assert torch.equal(encode(items[:3, :2], lengths[:3], table, block), whole[:3])


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_what_is_no_row_of_the_table_is_refused():
    encode = encode_last_item.bind("cpu", "cpu")
    table, _, block = make(8, torch.float32)
    for bad in (-1, 40, 2**40):
        items = torch.tensor([[1, bad, 2]])
        assert encode(items, torch.tensor([1]), table, block).isfinite().all()  # beyond the length: not read
        with pytest.raises(RuntimeError, match=r"encode_last_item: items must be rows of the table, 0 .. 39"):
            encode(items, torch.tensor([3]), table, block)
    for length in (-1, 4):
        with pytest.raises(RuntimeError, match=r"lengths in 0 \.\. 3"):
            encode(torch.tensor([[1, 1, 2]]), torch.tensor([length]), table, block)


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_opcheck():
    from fastdiff.ops.cpu.encode_last_item import _pack

    encode_last_item.bind("cpu", "cpu")
    table, _, block = make(8, torch.float32)
    items, lengths = histories()
    transposed, sliced = items.T.contiguous().T, torch.cat([items, items], dim=1)[:, : items.shape[1]]
    for given in (items, transposed, sliced):
        for rows in (table, table.T.contiguous().T):
            for made in (block, replace(block, head=(torch.randn(5, 8), torch.randn(5)))):
                arguments = (given, lengths, rows, *_pack(made), PAD, 1e-5)
                torch.library.opcheck(torch.ops.fastdiff.encode_last_item.default, arguments)


def test_other_weights_are_other_results(encode):
    """What a backend keeps of one block is never used for another."""
    table, _, block = make(8, torch.float32)
    items, lengths = histories()
    for field in fields(block):
        if field.name in ("pad_id", "head", "eps"):
            continue
        value = getattr(block, field.name)
        changed = value + 1 if isinstance(value, Tensor) else (value[0] * 1.5, value[1] + 0.5)
        other = replace(block, **{field.name: changed})
        ours = encode(items, lengths, table, other)
        assert_agree(ours, encode_last_item_ref(items, lengths, table, other), torch.float32, factor=4)
