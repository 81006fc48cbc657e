"""encode_causal_history and prepare_causal_prefix against transformers over all slots, every pad written out."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.ops.causal_transformer import BlockWeights, Pads
from fastdiff.ops.cpu.packing import pack_vector
from fastdiff.ops.cpu.transformer import packed_blocks
from fastdiff.ops.denoise_attention_loop import CausalPrefix
from fastdiff.ops.encode_causal_history import encode_causal_history
from fastdiff.ops.prepare_causal_prefix import prepare_causal_prefix
from tests.devices import place_op, places
from tests.tolerances import AGREE, FLOOR, assert_agree, relative_error

PLACES = places(encode_causal_history, prepare_causal_prefix)
IN_TRITON = pytest.mark.skipif("triton" not in PLACES, reason="Triton needs a CUDA device, or TRITON_INTERPRET=1")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = 9  # of the item table; row 0 is the pad


# --- a random problem -------------------------------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    scale = 0.3 if len(shape) == 1 else 0.8 / math.sqrt(shape[-1])
    return scale * torch.randn(*shape, dtype=torch.float64)


def random_block(dim: int, heads: int) -> BlockWeights:
    return BlockWeights(
        qkv_weight=normal(3 * dim, dim),
        qkv_bias=normal(3 * dim),
        out_weight=normal(dim, dim),
        out_bias=normal(dim),
        norm_1=(1 + normal(dim), normal(dim)),
        up_weight=normal(2 * dim, dim),
        up_bias=normal(2 * dim),
        down_weight=normal(dim, 2 * dim),
        down_bias=normal(dim),
        norm_2=(1 + normal(dim), normal(dim)),
        n_heads=heads,
    )


def problem(
    lengths: list[int], *, window: int, dim: int = 8, heads: int = 2, n_blocks: int = 2, seed: int = 0
) -> dict[str, Any]:
    """float64 tensors of both ops by name."""
    torch.manual_seed(seed)
    table = torch.randn(ROWS, dim, dtype=torch.float64)
    blocks = tuple(random_block(dim, heads) for _ in range(n_blocks))
    norm = (1 + normal(dim), normal(dim), 1e-12)
    return {
        "items": torch.randint(1, ROWS, (len(lengths), max(lengths, default=0))),
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "table": table,
        "norm": norm,
        "blocks": blocks,
        "window": window,
        "time": normal(dim),
        "condition": torch.randn(sum(lengths), dim, dtype=torch.float64),
        "last": torch.randn(len(lengths), dim, dtype=torch.float64),
    }


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(cast(item, dtype) for item in value)
    if isinstance(value, (BlockWeights, Pads, CausalPrefix)):
        return replace(value, **{name: cast(getattr(value, name), dtype) for name in value.__dataclass_fields__})
    return value


def rounded(p: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The problem whose float64 numbers `dtype` can hold, so that all dtypes mean the same one."""
    return {name: cast(cast(value, dtype), torch.float64) for name, value in p.items()}


def encode(place: str, p: dict[str, Any], only_last: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias, eps = p["norm"]
    pad = F.layer_norm(p["table"][:1], p["table"].shape[1:], weight, bias, eps)
    arguments = (p["items"], p["lengths"], p["table"], p["norm"], p["blocks"], Pads.of(p["blocks"], pad), p["window"])
    op = place_op(encode_causal_history, place)
    op.needs(dtype)
    rows, last = op(*cast(arguments, dtype), only_last)
    assert rows.dtype == last.dtype == dtype
    assert rows.shape[0] >= (0 if only_last else int(p["lengths"].sum()))
    return rows[: int(p["lengths"].sum())], last


def prepare(place: str, p: dict[str, Any], normalize: bool, guided: bool, dtype: torch.dtype) -> CausalPrefix:
    arguments = (p["condition"], p["last"], p["items"], p["lengths"], p["table"], 0.7, normalize, p["time"])
    more = (*cast((p["blocks"], Pads.of(p["blocks"], pad_inputs(p, normalize))), dtype), p["window"], guided)
    op = place_op(prepare_causal_prefix, place)
    op.needs(dtype)
    prefix: CausalPrefix = op(*cast(arguments, dtype), *more)
    slots = int(prefix.lengths.sum())
    assert prefix.keys_values.shape[2] >= slots
    return replace(prefix, keys_values=prefix.keys_values[:, :, :slots])


def pad_inputs(p: dict[str, Any], normalize: bool) -> Tensor:
    pad = F.normalize(p["table"][0], dim=-1) if normalize else p["table"][0]
    pad = 0.7 * pad + p["time"]
    return torch.stack([pad + 1.5, pad])  # a pad's condition is some vector; any will do


# --- the formula: one user, all slots of the window -------------------------------------------------------------------


def over_all_slots(blocks: tuple[BlockWeights, ...], hidden: Tensor, pads: int) -> tuple[Tensor, list[Tensor]]:
    """hidden [window, D], pads first: a pad's logits are all equal. Also each block's keys and values [window, 2 D]."""
    slots, dim = hidden.shape
    later = torch.full((slots, slots), -torch.inf, dtype=hidden.dtype).triu(1)
    kept = []
    for block in blocks:
        heads = block.n_heads
        query, key, value = block.project(hidden).view(slots, 3, heads, dim // heads).permute(1, 2, 0, 3)
        logits = query @ key.transpose(1, 2)
        logits[:, :pads] = 0.0
        gathered = torch.softmax(logits + later, dim=-1) @ value
        kept.append(block.keys_values(hidden))
        hidden = block.finish(hidden, gathered.transpose(0, 1).reshape(slots, dim))
    return hidden, kept


def encoded_by_hand(p: dict[str, Any]) -> tuple[Tensor, Tensor]:
    rows, last = [], []
    weight, bias, eps = p["norm"]
    for items, n in zip(p["items"], p["lengths"].tolist(), strict=True):
        slots = torch.cat([torch.zeros(p["window"] - n, dtype=torch.int64), items[:n]])
        hidden = F.layer_norm(p["table"][slots], p["table"].shape[1:], weight, bias, eps)
        output, _ = over_all_slots(p["blocks"], hidden, p["window"] - n)
        rows.append(output[p["window"] - n :])
        last.append(output[-1])
    return torch.cat(rows), torch.stack(last)


def prefix_by_hand(p: dict[str, Any], normalize: bool, branch: int) -> Tensor:
    """[n_blocks, N, 2 D]"""
    dim, starts = p["table"].shape[1], [0, *p["lengths"].cumsum(0).tolist()]
    users = []
    for user, n in enumerate(p["lengths"].tolist()):
        target = p["table"][p["items"][user, 1:n]]
        own = 0.7 * (F.normalize(target, dim=-1) if normalize else target) + p["time"]
        if branch == 0:
            own = own + p["condition"][starts[user] : starts[user] + max(n - 1, 0)]
        pads = p["window"] - max(n, 1)
        hidden = torch.cat([pad_inputs(p, normalize)[branch].expand(pads, dim), own])
        _, kept = over_all_slots(p["blocks"], hidden, pads)
        users.append(torch.stack(kept)[:, pads:])
    return torch.cat(users, dim=1)


# --- tests ------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    window = draw(st.sampled_from([1, 2, 7, 20, 40]))
    heads = draw(st.sampled_from([1, 2, 4]))
    return problem(
        draw(st.lists(st.integers(0, window), min_size=1, max_size=9)),
        window=window,
        dim=heads * draw(st.sampled_from([1, 3, 8, 18])),
        heads=heads,
        n_blocks=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 100)),
    )


def rule(ours: Tensor, twin: Tensor, truth: Tensor, floor: float) -> None:
    assert relative_error(ours, truth) <= 2 * relative_error(twin, truth) + floor


def encoding_is_its_formula(place: str, p: dict[str, Any], only_last: bool, dtype: torch.dtype) -> None:
    rows, last = encoded_by_hand(p)
    twin_rows, twin_last = encoded_by_hand({name: cast(value, dtype) for name, value in p.items()})
    ours_rows, ours_last = encode(place, p, only_last, dtype)
    floor = AGREE.get(dtype, FLOOR[dtype])
    rule(ours_last, twin_last, last, floor)
    if only_last:
        assert ours_rows.shape == (0, rows.shape[1])
    else:
        rule(ours_rows, twin_rows, rows, floor)


def preparing_is_its_formula(place: str, p: dict[str, Any], normalize: bool, guided: bool, dtype: torch.dtype) -> None:
    narrow = {name: cast(value, dtype) for name, value in p.items()}
    floor = AGREE.get(dtype, FLOOR[dtype])
    ours = prepare(place, p, normalize, guided, dtype)
    passes = 2 if guided else 1
    for branch in range(passes):
        truth = prefix_by_hand(p, normalize, branch)
        rule(ours.keys_values[:, branch], prefix_by_hand(narrow, normalize, branch), truth, floor)
    assert ours.keys_values.shape[1] == ours.pad.shape[1] == ours.cond.shape[0] == passes
    assert torch.equal(ours.lengths, (p["lengths"] - 1).clamp(min=0))
    pads = (p["window"] - p["lengths"].clamp(min=1)).double()
    rule(ours.log_pads.double().exp(), pads.log().to(dtype).double().exp(), pads, floor)
    assert torch.equal(ours.cond[0], narrow["last"])
    assert not guided or not bool(ours.cond[1].any())
    empty = p["lengths"] == 0
    assert torch.equal(ours.uniform, empty) if ours.uniform is not None else not bool(empty.any())


@pytest.mark.parametrize("place", [place for place in PLACES if place != "triton"])
@given(p=problems(), only_last=st.booleans(), threads=st.sampled_from([1, 3]))
def test_encoding_is_its_formula(place: str, p: dict[str, Any], only_last: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    encoding_is_its_formula(place, p, only_last, torch.float32)
    if place.startswith("torch"):
        last = encoded_by_hand(p)[1]
        assert_agree(encode(place, p, only_last, torch.float64)[1], last, torch.float64)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "triton"])
@given(p=problems(), normalize=st.booleans(), guided=st.booleans(), threads=st.sampled_from([1, 3]))
def test_preparing_is_its_formula(place: str, p: dict[str, Any], normalize: bool, guided: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    preparing_is_its_formula(place, p, normalize, guided, torch.float32)
    if place.startswith("torch"):
        exact = prepare(place, p, normalize, guided, torch.float64)
        assert_agree(exact.keys_values[:, 0], prefix_by_hand(p, normalize, 0), torch.float64)


# Every draw of the sizes above would be another kernel to compile, or seconds to interpret: a few of them instead.
SETTINGS_IN_TRITON: list[dict[str, Any]] = [
    {"lengths": [3], "window": 3, "dim": 16, "heads": 1, "n_blocks": 1},
    {"lengths": [7, 0, 5, 1], "window": 7, "dim": 9, "heads": 3, "n_blocks": 2},
    {"lengths": [0, 0], "window": 4, "dim": 8, "heads": 2, "n_blocks": 2},
    {"lengths": [2, 37, 1, 19, 40], "window": 40, "dim": 72, "heads": 4, "n_blocks": 3},
]


@IN_TRITON
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("only_last", [False, True])
@pytest.mark.parametrize("setting", SETTINGS_IN_TRITON, ids=lambda setting: str(setting["lengths"]))
def test_encoding_is_its_formula_in_triton(dtype: torch.dtype, only_last: bool, setting: dict[str, Any]) -> None:
    encoding_is_its_formula("triton", rounded(problem(**setting), dtype), only_last, dtype)


@IN_TRITON
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("normalize", "guided"), [(False, True), (True, False)])
@pytest.mark.parametrize("setting", SETTINGS_IN_TRITON, ids=lambda setting: str(setting["lengths"]))
def test_preparing_is_its_formula_in_triton(
    dtype: torch.dtype, normalize: bool, guided: bool, setting: dict[str, Any]
) -> None:
    preparing_is_its_formula("triton", rounded(problem(**setting), dtype), normalize, guided, dtype)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "cpu"])
def test_rows_beyond_the_last_are_not_read(place: str) -> None:
    p = problem([3, 0, 5, 1], window=5)
    nothing = torch.full((11, 8), torch.nan, dtype=torch.float64)
    roomy = p | {"condition": torch.cat([p["condition"], nothing])}
    expected = prepare(place, p, False, True, torch.float32).keys_values
    assert_agree(prepare(place, roomy, False, True, torch.float32).keys_values, expected, torch.float32)


@IN_TRITON
def test_in_triton_a_row_is_the_same_in_any_batch() -> None:
    lengths, order = [7, 0, 20, 1, 5], [2, 0]
    p = problem(lengths, window=20, dim=36)
    rows, last = encode("triton", p, False, torch.float32)
    kept = prepare("triton", p, False, True, torch.float32).keys_values
    starts = [sum(lengths[:i]) for i in range(6)]
    slots = [sum(max(n - 1, 0) for n in lengths[:i]) for i in range(6)]
    some = dict(p, items=p["items"][order], lengths=p["lengths"][order], last=p["last"][order])
    some["condition"] = torch.cat([p["condition"][starts[i] : starts[i + 1]] for i in order])
    part, ends = encode("triton", some, False, torch.float32)
    assert_agree(ends, last[order], torch.float32)
    assert_agree(part, torch.cat([rows[starts[i] : starts[i + 1]] for i in order]), torch.float32)
    part = prepare("triton", some, False, True, torch.float32).keys_values
    assert_agree(part, torch.cat([kept[:, :, slots[i] : slots[i + 1]] for i in order], dim=2), torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_a_real_size(place: str) -> None:
    p = problem([50, 1, 37, 0, 6], window=50, dim=128, heads=4)
    rows, last = encoded_by_hand(p)
    single = {name: cast(value, torch.float32) for name, value in p.items()}
    ours, twin = encode(place, p, False, torch.float32), encoded_by_hand(single)
    rule(ours[0], twin[0], rows, FLOOR[torch.float32])
    rule(ours[1], twin[1], last, FLOOR[torch.float32])
    prefix = prepare(place, p, False, True, torch.float32).keys_values
    for branch in (0, 1):
        twin_keys = prefix_by_hand(single, False, branch)
        rule(prefix[:, branch], twin_keys, prefix_by_hand(p, False, branch), FLOOR[torch.float32])


@pytest.mark.parametrize("place", PLACES)
def test_nobody(place: str) -> None:
    p = problem([], window=5)
    p["items"] = torch.zeros(0, 0, dtype=torch.int64)
    rows, last = encode(place, p, False, torch.float32)
    assert rows.shape == last.shape == (0, 8)
    assert prepare(place, p, False, True, torch.float32).keys_values.shape == (2, 2, 0, 16)


@pytest.mark.parametrize("place", PLACES)
def test_layouts(place: str, nan_empty: None) -> None:
    p = problem([3, 0, 5, 1], window=5)
    strided = dict(p)
    for name in ("items", "table", "condition", "last"):
        strided[name] = p[name].T.contiguous().T
    strided["lengths"] = torch.stack([p["lengths"], p["lengths"]], dim=1)[:, 0]
    pairs = (encode(place, problem_, False, torch.float32) for problem_ in (strided, p))
    for ours, plain in zip(*pairs, strict=True):
        assert_agree(ours, plain, torch.float32)
    ours, plain = (prepare(place, problem_, False, True, torch.float32) for problem_ in (strided, p))
    assert_agree(ours.keys_values, plain.keys_values, torch.float32)


# --- what only the C++ ops promise ------------------------------------------------------------------------------------

built = pytest.mark.skipif("cpu" not in PLACES, reason="the C++ ops are not built")
LENGTHS = [7, 0, 50, 1, 16, 15, 14, 30, 2, 3, 5, 49, 50, 17]


@built
@pytest.mark.parametrize("guided", [False, True])
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_number_of_threads(guided: bool) -> None:
    p = problem(LENGTHS, window=50, dim=36)
    starts = [0, *p["lengths"].cumsum(0).tolist()]
    slots = [0, *(p["lengths"] - 1).clamp(min=0).cumsum(0).tolist()]
    rows, last = encode("cpu", p, False, torch.float32)
    kept = prepare("cpu", p, False, guided, torch.float32).keys_values
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for order in ([2], [3], [1], [11, 0], [13, 2, 1, 5], list(range(len(LENGTHS)))[::-1]):
            some = dict(p, items=p["items"][order], lengths=p["lengths"][order], last=p["last"][order])
            some["condition"] = torch.cat([p["condition"][starts[i] : starts[i + 1]] for i in order])
            for only_last in (False, True):
                part, ends = encode("cpu", some, only_last, torch.float32)
                assert torch.equal(ends, last[order])
                if not only_last:
                    assert torch.equal(part, torch.cat([rows[starts[i] : starts[i + 1]] for i in order]))
            part = prepare("cpu", some, False, guided, torch.float32).keys_values
            assert torch.equal(part, torch.cat([kept[:, :, slots[i] : slots[i + 1]] for i in order], dim=2))


@built
@pytest.mark.parametrize("item", [-1, ROWS])
def test_items_beyond_the_table_are_refused(item: int) -> None:
    p = problem([2, 3], window=5)
    p["items"][1, 2] = item
    with pytest.raises(RuntimeError, match=rf"items must be rows of the table of {ROWS} \(got {item}\)"):
        encode("cpu", p, False, torch.float32)


@built
def test_histories_beyond_the_window_are_refused() -> None:
    p = problem([2, 3], window=5) | {"window": 2}
    with pytest.raises(RuntimeError, match=r"encode_causal_history: lengths must be at most the window, 2 \(got 3\)"):
        encode("cpu", p, False, torch.float32)
    with pytest.raises(RuntimeError, match=r"prepare_causal_prefix: lengths must be at most the window, 2 \(got 3\)"):
        prepare("cpu", p, False, True, torch.float32)


@built
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(strided: bool) -> None:
    encode_causal_history.bind("cpu", "cpu")
    p = {name: cast(value, torch.float32) for name, value in problem([2, 0, 3], window=4).items()}
    weight, bias, eps = p["norm"]
    blocks, shape = packed_blocks(p["blocks"]), (16, 2, 1e-12)
    pads = cast(Pads.of(p["blocks"], pad_inputs(p, False)), torch.float32)
    items, table = p["items"], p["table"]
    if strided:
        items, table = items.T.contiguous().T, torch.cat([table, table], dim=1)[:, :8]
    vectors = (pack_vector(weight), pack_vector(bias))
    one = (pads.keys_values[:, :1], pads.output[:1])
    for only_last in (False, True):
        torch.library.opcheck(
            torch.ops.fastdiff.encode_causal_history.default,
            (items, p["lengths"], table, *vectors, eps, blocks, *shape, *one, 4, only_last),
        )
    torch.library.opcheck(
        torch.ops.fastdiff.prepare_causal_prefix.default,
        (p["condition"], items, p["lengths"], table, 0.5, True, p["time"], blocks, *shape, pads.keys_values, 4, True),
    )
