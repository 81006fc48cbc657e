"""Histories: what C++ packs is what Python defines, and what it does not take is left to Python's own messages."""

from __future__ import annotations

import copy
import enum
import itertools
import pickle
from collections import deque
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import item_ids
from fastdiff.catalog import ItemCatalog
from fastdiff.config import ModelConfig
from fastdiff.errors import InvalidArgument, InvalidHistory
from fastdiff.histories import pack_in_python, parse_histories
from fastdiff.noise import history_row_key
from fastdiff.ops.user_lists import UserLists
from tests.builders import small_config, small_engine

needs_c = pytest.mark.skipif(item_ids._C is None, reason="fastdiff._C was not built")

N, DIM = 50, 16
BIG = (1 << 62) + 3
ID_KINDS: dict[str, list[Any] | None] = {
    "rows": None,
    "dense": [100 + (7 * i) % N for i in range(N)],
    "from 0": list(range(N)),
    "sparse": [-BIG, *(3 * i * i for i in range(1, N - 1)), BIG],
    "str": [f"sku-{i}" for i in range(N)],
}
CONFIGS = ("dreamrec", "adrec", "cddrec")  # pad row at the end; pad row 0; pad row 0 that may stand inside
CHANGES = ("new", "removed", "added", "given again")


@cache
def catalogue(method: str, kind: str, change: str) -> tuple[ItemCatalog, ModelConfig, tuple[Any, ...]]:
    """A catalogue, its model's config, and all ids that histories may hold."""
    config = small_config(method)
    table = torch.randn(config.n_rows, DIM, generator=torch.Generator().manual_seed(0))
    catalog = ItemCatalog.from_table(table, config.special_rows, ID_KINDS[kind], config.metric)
    ids: tuple[Any, ...] = catalog.item_ids
    if change in ("removed", "given again"):
        catalog = catalog.remove(ids[3:5])
    if change == "given again":
        catalog = catalog.add(ids[3:4], torch.ones(1, DIM))
    if change == "added":
        new = ["new", "sku"] if kind == "str" else [config.n_rows, 999]
        catalog, ids = catalog.add(new, torch.ones(2, DIM)), (*ids, *new)
    return catalog, config, ids


class Colour(enum.IntEnum):
    RED = 7


def odd_items(config: ModelConfig) -> list[Any]:
    """What may stand in a list beside known ids: pads, special rows, unknown ids, and things that are no ids."""
    unknown = [777, -5, config.n_rows, (1 << 63) - 1, -(1 << 63), 1 << 63, 1 << 70, "gone", ""]
    others = [True, False, np.True_, 1.5, None, b"7", Colour.RED, [3], np.float32(7), np.str_("sku-3"), np.int8(-1)]
    return [-1, -1, config.pad_id, config.pad_id, *config.special_rows, *unknown, *others, np.uint64((1 << 63) + 5)]


def as_given(history: list[Any], form: str) -> Any:
    """The same history in another container, where that can hold it."""
    if form == "tuple":
        return tuple(history)
    if form == "numpy integers":
        return [np.int32(item) if type(item) is int and abs(item) < 1 << 31 else item for item in history]
    if form == "deque":
        return deque(history)
    if not all(type(item) is int and -(1 << 63) <= item < 1 << 63 for item in history):
        return history
    if form == "tensor":
        return torch.tensor(history, dtype=torch.int64)
    if form == "every second":
        return np.repeat(np.array(history, dtype=np.int64), 2)[::2]
    if form in ("int8", "int16", "int32", "uint8", "uint64", ">i8"):
        dtype = np.dtype(form)
        bounds = np.iinfo(dtype)
        return np.array(history, dtype=dtype) if all(bounds.min <= i <= bounds.max for i in history) else history
    return history


FORMS = ("list", "list", "list", "tuple", "numpy integers", "deque", "tensor", "every second", "int8", "int32", "uint8")
FORMS += ("uint64", ">i8")


@st.composite
def list_cases(draw: st.DrawFn) -> tuple[ItemCatalog, ModelConfig, Any]:
    method, kind = draw(st.sampled_from(CONFIGS)), draw(st.sampled_from(list(ID_KINDS)))
    catalog, config, ids = catalogue(method, kind, draw(st.sampled_from(CHANGES)))
    known, pads = st.sampled_from(ids), st.sampled_from([-1, config.pad_id])
    item = known if draw(st.booleans()) else st.one_of(*[known] * 4, st.sampled_from(odd_items(config)))
    history = st.builds(
        lambda before, items, after: before + items + after,
        st.lists(pads, max_size=2) if draw(st.booleans()) else st.just([]),
        st.lists(item, max_size=14),
        st.lists(pads, max_size=2) if draw(st.booleans()) else st.just([]),
    )
    histories = draw(st.lists(history, max_size=5))
    forms = [draw(st.sampled_from(FORMS)) for _ in histories]
    given = [as_given(each, form) for each, form in zip(histories, forms, strict=True)]
    return catalog, config, draw(st.sampled_from([list, tuple]))(given)


@st.composite
def padded_cases(draw: st.DrawFn) -> tuple[ItemCatalog, ModelConfig, Any]:
    method, kind = draw(st.sampled_from(CONFIGS)), draw(st.sampled_from(["rows", "dense", "from 0", "str"]))
    catalog, config, ids = catalogue(method, kind, draw(st.sampled_from(CHANGES)))
    width = draw(st.integers(0, 12))
    rare = st.sampled_from([-1, config.pad_id, 777])
    item = st.sampled_from(ids if kind != "str" else range(N))
    item = item if draw(st.booleans()) else st.one_of(*[item] * 6, rare)
    pad = st.sampled_from([-1, config.pad_id]) if draw(st.booleans()) else st.just(config.pad_id)
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.integers(0, width))
        before = draw(st.one_of(st.sampled_from([0, width - n]), st.integers(0, width - n)))
        items, pads = [draw(item) for _ in range(n)], [draw(pad) for _ in range(width - n)]
        rows.append(pads[:before] + items + pads[before:])
    array = np.array(rows, dtype=np.int64).reshape(len(rows), width)
    form = draw(st.sampled_from(["plain", "int32", "fortran", "sliced", "tensor", "int16 tensor", ">i8"]))
    given: Any = {
        "plain": array,
        "int32": array.astype(np.int32),
        "fortran": np.asfortranarray(array),
        "sliced": np.repeat(np.repeat(array, 2, axis=0), 3, axis=1)[::2, ::3],
        "tensor": torch.from_numpy(array),
        "int16 tensor": torch.from_numpy(array.astype(np.int16)),
        ">i8": array.astype(">i8"),
    }[form]
    return catalog, config, given


def check_same(catalog: ItemCatalog, config: ModelConfig, histories: Any) -> None:
    """`parse_histories` gives what the definition gives, or raises what it raises."""
    plain = histories.numpy() if isinstance(histories, torch.Tensor) else histories
    refused = None
    try:
        expected = pack_in_python(plain, catalog, config)
    except InvalidHistory as error:
        refused = str(error)
    if refused is not None:
        with pytest.raises(InvalidHistory) as caught:
            parse_histories(histories, catalog, config)
        assert str(caught.value) == refused
        return
    parsed = parse_histories(histories, catalog, config)
    found = (parsed.window.items, parsed.window.lengths, parsed.seen.values, parsed.seen.offsets)
    for ours, theirs in zip(found, expected[:4], strict=True):
        assert ours.dtype == torch.int64
        assert ours.shape == theirs.shape
        assert ours.tolist() == theirs.tolist()
    assert torch.equal(parsed.row_key, history_row_key(parsed.window.items, parsed.window.lengths))


@given(list_cases())
@settings(max_examples=400)
def test_lists_are_packed_as_python_defines(case: tuple[ItemCatalog, ModelConfig, Any]) -> None:
    check_same(*case)


@given(padded_cases())
@settings(max_examples=300)
def test_padded_arrays_are_packed_as_python_defines(case: tuple[ItemCatalog, ModelConfig, Any]) -> None:
    check_same(*case)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["rows", "from 0", "sparse"])
def test_every_short_row_with_pads(method: str, kind: str) -> None:
    """All rows of up to five of: -1, the pad id, an item."""
    catalog, config, ids = catalogue(method, kind, "new")
    for n in range(6):
        for row in itertools.product((-1, config.pad_id, ids[7]), repeat=n):
            check_same(catalog, config, [list(row)])
            check_same(catalog, config, np.array([row], dtype=np.int64).reshape(1, n))


def packed(catalog: ItemCatalog, config: ModelConfig, histories: Any) -> Any:
    assert catalog.index is not None
    return catalog.index.pack(histories, config.pad_id, config.pad_inside, config.max_seq_len)


@needs_c
@pytest.mark.parametrize("kind", [kind for kind in ID_KINDS if kind != "str"])
def test_cpp_takes_what_callers_usually_hold(kind: str) -> None:
    catalog, config, ids = catalogue("dreamrec", kind, "removed")
    a, b, c = ids[2], ids[3], ids[40]  # ids[3] was removed, and histories may still hold it
    for histories in (
        [],
        [[]],
        [[a, b], [], [c]],
        ((a, b), (), (c,)),
        [np.array([a, b]), np.array([]), np.array([c])],
        [[np.int64(a), b]],
        [[-1, a, b, -1], [config.pad_id]],
        np.array([[a, b, -1], [-1, -1, c]]),
        np.array([[a, b], [c, c]])[:, ::-1],
        np.zeros((3, 0), dtype=np.int32),
    ):
        assert packed(catalog, config, histories) is not None
        check_same(catalog, config, histories)


@needs_c
def test_cpp_takes_ranges_small_integers_and_strings() -> None:
    catalog, config, _ = catalogue("adrec", "rows", "new")
    for histories in ([range(1, 9, 3)], [np.array([3, 4], dtype=np.uint8)], [np.array([3], dtype=np.int16)]):
        assert packed(catalog, config, histories) is not None
        check_same(catalog, config, histories)
    catalog, config, _ = catalogue("adrec", "str", "added")
    assert packed(catalog, config, [["sku-3", "new"], (), ["sku-49"]]) is not None


@needs_c
@pytest.mark.parametrize(
    "histories",
    [
        None,
        7,
        "345",
        range(3),
        {3: [4]},
        [3],
        ["345"],
        [[3, True]],
        [[np.True_]],
        [[3.0]],
        [[Colour.RED]],
        [[None]],
        [["3"]],
        [[3], [1 << 70]],
        [[3], [-(1 << 70)]],
        [[np.uint64(1 << 63)]],
        [[99120]],
        [[N]],  # the pad row of this model is an id that marks padding, but not the row behind it
        [[3, -1, 4]],
        [deque([3])],
        [np.array([3.0])],
        [np.array([True])],
        [np.array(["3"])],
        [np.array([[3]])],
        [np.array([3], dtype=">i8")],
        [np.array([3], dtype=object)],
        [np.ma.array([3], mask=[True])],
        [torch.tensor([3])],
        np.array([3]),
        np.array([[[3]]]),
        np.array([[3, -1, 4]]),
        np.array([[3.0]]),
        np.array([[True]]),
        np.array([[1 << 63]], dtype=np.uint64),
    ],
)
def test_cpp_leaves_all_else_to_python(histories: Any) -> None:
    config = small_config("dreamrec", n_items=N - 1)
    catalog = ItemCatalog.from_table(torch.zeros(N, DIM), config.special_rows)
    assert packed(catalog, config, histories) is None


@needs_c
def test_cpp_refuses_integers_in_a_catalogue_of_strings() -> None:
    catalog, config, _ = catalogue("adrec", "str", "new")
    for histories in ([[3]], [["sku-3", 3]], [["gone"]], [[np.str_("sku-3")]], [[-1]], np.array([[-1]])):
        assert packed(catalog, config, histories) is None


@needs_c
def test_integer_ids_wherever_they_lie() -> None:
    """Dense, even, clustered and extreme ids: each is found, and no number beside it."""
    rng = np.random.default_rng(0)
    low, high = -(1 << 63), (1 << 63) - 1
    tables = [
        [5],
        [low, high],
        [low, low + 1, 0, high - 1, high],
        [*range(100), 10**15],
        [-(10**15), *range(100)],
        sorted({int(2**power) for power in np.linspace(1, 62, 80)}),
        np.unique(rng.integers(low, high, 1000, endpoint=True)).tolist(),
        np.unique(rng.integers(0, 2000, 1000)).tolist(),
    ]
    for ids in tables:
        rows = rng.permutation(len(ids))
        index = item_ids._C.ItemIndex.of_integers(np.array(ids), rows)
        (found, offsets) = index.lists([ids])
        assert found.tolist() == rows.tolist()
        assert offsets.tolist() == [0, len(ids)]
        known = set(ids)
        for beside in {i + step for i in ids for step in (-1, 1)} - known:
            assert index.lists([[beside]]) is None


@needs_c
def test_an_index_checks_what_it_is_made_of() -> None:
    make, flat = item_ids._C.ItemIndex.of_integers, np.arange(3)
    for ids, rows, message in (
        (np.array([1, 1, 2]), flat, "ascend"),
        (np.array([2, 1, 3]), flat, "ascend"),
        (flat, np.array([0, -1, 2]), "negative"),
        (flat, flat[:2], "one length"),
        (flat[None], flat[None], "flat"),
    ):
        with pytest.raises(ValueError, match=message):
            make(ids, rows)
    for ids in (flat.astype(np.int32), np.arange(6)[::2], [1, 2, 3]):
        with pytest.raises(TypeError):
            make(ids, flat)
    for row in (-1, 2**70, "0", None, 1.0):
        with pytest.raises(ValueError, match="rows must be integers"):
            item_ids._C.ItemIndex.of_strings({"a": row}).lists([["a"]])


@needs_c
def test_a_window_is_no_negative_number() -> None:
    index = item_ids._C.ItemIndex.of_rows(9, [0])
    with pytest.raises(ValueError, match="max_seq_len must not be negative"):
        index.pack([[1, 2, 3]], pad_id=0, pad_inside=False, max_seq_len=-1)


def test_without_the_extension_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = [[3, 7, 7, 20], [], np.array([5, -1]), torch.arange(10, 22)]
    lists = {"exclude_items": [9, 11], "user_exclude_items": [[1], [], (2, 3), []]}
    expected = small_engine("adrec").generate(histories, seed=1, **lists)
    monkeypatch.setattr(item_ids, "_C", None)
    engine = small_engine("adrec")
    assert engine.catalog.index is None
    output = engine.generate(histories, seed=1, **lists)
    assert torch.equal(output.item_ids, expected.item_ids)
    assert torch.equal(output.scores, expected.scores)
    with pytest.raises(InvalidHistory, match="holds item id 99120, the catalogue has ids 1"):
        engine.generate([[3, 99120]])
    with pytest.raises(InvalidArgument, match=r"user_exclude_items\[1\] holds item id 99"):
        engine.generate([[3], [4]], user_exclude_items=[[3], [99]])


@needs_c
def test_a_used_catalogue_can_be_copied_and_pickled() -> None:
    catalog, config, ids = catalogue("dreamrec", "sparse", "added")
    assert catalog.index is not None
    for twin in (copy.deepcopy(catalog), pickle.loads(pickle.dumps(catalog))):
        assert packed(twin, config, [ids])[2].tolist() == packed(catalog, config, [ids])[2].tolist()


# --- lists of items without padding -----------------------------------------------------------------------------------


@given(kind=st.sampled_from(list(ID_KINDS)), data=st.data())
@settings(max_examples=100)
def test_lists_of_filters_are_read_as_python_reads_them(kind: str, data: st.DataObject) -> None:
    catalog, config, ids = catalogue("cddrec", kind, "given again")
    item = st.one_of(*[st.sampled_from(ids)] * 8, st.sampled_from(odd_items(config)))
    forms = st.sampled_from(["list", "tuple", "int32", "tensor", "uint64", "numpy integers"])
    lists = [as_given(items, data.draw(forms)) for items in data.draw(st.lists(st.lists(item, max_size=6), max_size=4))]
    read = None if catalog.index is None else catalog.index.lists(lists)
    if read is not None:
        assert [catalog.known(items).tolist() for items in lists] == [
            part.tolist() for part in np.split(read[0], read[1][1:-1])
        ][: len(lists)]


@needs_c
def test_filters_of_known_items_are_read_by_cpp() -> None:
    for kind in ID_KINDS:
        catalog, config, ids = catalogue("cddrec", kind, "removed")
        rows, offsets = catalog.index.lists([list(ids[:5]), [], tuple(ids[7:9])])  # type: ignore[union-attr]
        assert rows.tolist() == catalog.known([*ids[:5], *ids[7:9]]).tolist()
        assert offsets.tolist() == [0, 5, 5, 7]
        for wrong in ([[-1]], [[config.pad_id + 1000]], [ids[0]], [["gone"]], ids[0]):
            assert catalog.index.lists(wrong) is None  # type: ignore[union-attr]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.lists(st.integers(0, 9), max_size=4)), max_size=5)
)
def test_a_union_holds_both_lists_of_each_user(pairs: list[tuple[list[int], list[int]]]) -> None:
    both = UserLists.from_lists([a for a, _ in pairs]).union(UserLists.from_lists([b for _, b in pairs]))
    expected = UserLists.from_lists([a + b for a, b in pairs])
    assert both.values.tolist() == expected.values.tolist()
    assert both.offsets.tolist() == expected.offsets.tolist()
