"""ItemCatalog: ids, snapshots, files, and which rows its ranking may show."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.catalog import ItemCatalog
from fastdiff.errors import CatalogError, InvalidArgument
from fastdiff.ops.score_topk import UserLists, score_topk
from tests.tolerances import assert_agree

N, D = 60, 8
SPECIAL = {0: "[PAD]", N + 1: "[MASK]"}
IDS = {
    "row": None,
    "int": [7 * i - 100 for i in range(N)],
    "str": [f"item {i}" for i in range(N)],
}
KINDS = list(IDS)


def make(kind: str = "row", metric: str = "dot", dtype: torch.dtype = torch.float32, **settings: Any) -> ItemCatalog:
    """Rows 0 (pad) and 61 (mask) are special; items are rows 1..60."""
    return ItemCatalog.from_table(torch.randn(N + 2, D, dtype=dtype), SPECIAL, IDS[kind], metric, **settings)


def external(kind: str, *items: int) -> list[Any]:
    """The ids of the items of rows 1 + i."""
    ids = IDS[kind]
    return [item + 1 if ids is None else ids[item] for item in items]


def ranked(catalog: ItemCatalog, query: Tensor, k: int, **settings: Any) -> list[list[int]]:
    return catalog.topk(query, k, **settings).rows.tolist()


def by_hand(scores: Tensor, may: Tensor, k: int) -> list[list[int]]:
    """Rows by (score desc, row asc) where `may`, filled with -1."""
    found = []
    for row_scores, row_may in zip(scores, may, strict=True):
        order = row_scores.sort(descending=True, stable=True).indices
        order = order[row_may[order]][:k].tolist()
        found.append(order + [-1] * (k - len(order)))
    return found


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lookup_and_external_are_inverse(kind: str) -> None:
    catalog = make(kind)
    ids = external(kind, *range(N))
    assert catalog.lookup(ids).tolist() == list(range(1, N + 1))
    assert catalog.item_ids == tuple(ids)
    assert len(catalog) == catalog.n_items == N
    assert catalog.n_rows == N + 2
    rows = torch.tensor([[5, -1, 60], [1, 2, -1]])
    shown = catalog.external(rows)
    none = None if kind == "str" else -1
    assert shown.tolist() == [[*external(kind, 4), none, *external(kind, 59)], [*external(kind, 0, 1), none]]
    assert catalog.external(rows[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    "wrap", [list, tuple, np.array, lambda ids: np.array(ids, dtype=object), lambda ids: np.array(ids)[:]]
)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_come_in_any_container(kind: str, wrap: Callable[[list[Any]], Any]) -> None:
    assert make(kind).rows(wrap(external(kind, 3, 9, 3))).tolist() == [4, 10, 4]


def test_integer_ids_come_in_any_width() -> None:
    catalog = make("row")
    for dtype in (torch.int8, torch.int32, torch.int64):
        assert catalog.lookup(torch.tensor([3, 60], dtype=dtype)).tolist() == [3, 60]
    for dtype in (np.uint8, np.int16, np.uint64):
        assert catalog.lookup(np.array([3, 60], dtype=dtype)).tolist() == [3, 60]
    assert catalog.lookup([np.int64(3), 4]).tolist() == [3, 4]
    assert catalog.lookup(range(2, 4)).tolist() == [2, 3]
    assert catalog.lookup([]).tolist() == []


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_ids_are_minus_one(kind: str) -> None:
    catalog = make(kind)
    assert catalog.lookup([*external(kind, 2), "nobody" if kind == "str" else 10**12]).tolist() == [3, -1]
    assert catalog.lookup(["a"] if kind != "str" else [5]).tolist() == [-1]
    if kind == "row":
        assert catalog.lookup([0, 61, 62, -1, -60]).tolist() == [-1] * 5  # special rows are no items


def test_special_rows_are_shown_by_name_or_number() -> None:
    rows = torch.tensor([[0, 1, 61]])
    assert make("row").external(rows).tolist() == [[0, 1, 61]]
    assert make("int").external(rows).tolist() == [[-1, -100, -1]]
    assert make("str").external(rows).tolist() == [["[PAD]", "item 0", "[MASK]"]]


def test_ids_of_64_bits() -> None:
    ids = [2**63 - 1, -(2**63), 5]
    catalog = ItemCatalog(torch.eye(3), ids)
    assert catalog.lookup(ids).tolist() == [0, 1, 2]
    assert catalog.external(torch.tensor([0, 1, 2])).tolist() == ids


@given(st.lists(st.integers(-50, 50).filter(lambda i: i != -1), min_size=1, unique=True), st.data())
def test_integer_ids_survive_any_sequence_of_changes(ids: list[int], data: st.DataObject) -> None:
    """A dict is the truth."""
    catalog = ItemCatalog(torch.randn(len(ids), 2), ids)
    truth = {item: row for row, item in enumerate(ids)}
    for _ in range(data.draw(st.integers(0, 4))):
        unused = [item for item in range(-60, 60) if item not in truth and item != -1]
        new = data.draw(st.lists(st.sampled_from(unused), unique=True, max_size=5))
        truth |= {item: catalog.n_rows + i for i, item in enumerate(new)}
        catalog = catalog.add(new, torch.randn(len(new), 2))
        if truth:
            gone = data.draw(st.lists(st.sampled_from(sorted(truth)), unique=True, max_size=5))
            catalog = catalog.remove(gone)
            truth = {item: row for item, row in truth.items() if item not in gone}
    every = list(range(-60, 61))
    assert catalog.lookup(every).tolist() == [truth.get(item, -1) for item in every]
    assert catalog.item_ids == tuple(sorted(truth, key=lambda item: truth[item]))
    rows = torch.arange(catalog.n_rows)
    row_ids = {row: item for item, row in truth.items()}
    shown = catalog.external(rows).tolist()
    assert {row: shown[row] for row in row_ids} == row_ids


# --- snapshots --------------------------------------------------------------------------------------------------------

NEW = {"row": [62, 63], "int": [900, 800], "str": ["new", "newer"]}


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_add(kind: str, metric: str) -> None:
    old = make(kind, metric)
    query = torch.randn(3, D)
    before = old.topk(query, 5)
    new = old.add(NEW[kind], 10 * query[:2])
    assert (old.n_items, new.n_items, new.n_rows) == (N, N + 2, N + 4)
    assert new.lookup(NEW[kind]).tolist() == [62, 63]
    assert old.lookup(NEW[kind]).tolist() == [-1, -1]
    assert new.external(torch.tensor([62, 63])).tolist() == NEW[kind]
    assert new.has_row_ids == (kind == "row")
    assert ranked(new, query, 1)[:2] == [[62], [63]]
    assert torch.equal(new.table[:62], old.table)
    after = old.topk(query, 5)
    assert torch.equal(before.rows, after.rows)
    assert torch.equal(before.scores, after.scores)


def test_row_ids_become_integers_where_an_added_id_is_not_its_row() -> None:
    catalog = make("row").add([500], torch.randn(1, D))
    assert not catalog.has_row_ids
    assert catalog.lookup([1, 60, 500, 62, 0]).tolist() == [1, 60, 62, -1, -1]
    assert catalog.external(torch.tensor([0, 1, 62])).tolist() == [-1, 1, 500]


@pytest.mark.parametrize("scan_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_update(kind: str, metric: str, scan_dtype: torch.dtype | None) -> None:
    old = make(kind, metric, scan_dtype=scan_dtype)
    query = torch.randn(2, D)
    table = old.table.clone()
    before = ranked(old, query, 5)
    new = old.update(external(kind, 20, 3), 10 * query)
    assert torch.equal(new.table[[21, 4]], 10 * query)
    assert ranked(new, query, 1) == [[21], [4]]
    assert torch.equal(old.table, table)
    assert ranked(old, query, 5) == before


@pytest.mark.parametrize("kind", KINDS)
def test_remove(kind: str) -> None:
    old = make(kind)
    query = torch.randn(2, D)
    best = ranked(old, query, 2)
    gone = [catalog_id for row in best for catalog_id in old.external(torch.tensor(row[:1])).tolist()]
    new = old.remove(list(dict.fromkeys(gone)))
    assert new.n_rows == old.n_rows
    assert (new.lookup(gone) == -1).all()
    assert (old.lookup(gone) >= 0).all()
    kept = set(range(1, N + 1)) - {row[0] for row in best}
    assert all(set(rows) <= kept for rows in ranked(new, query, N, candidate_rows=None) for rows in [rows[: len(kept)]])
    assert new.topk(query, N).num_valid.tolist() == [len(kept)] * 2
    assert new.known(gone).tolist() == old.lookup(gone).tolist()  # histories may still hold them
    again = new.add(gone[:1], torch.randn(1, D))  # its id is free, for another row
    assert again.lookup(gone[:1]).tolist() == again.known(gone[:1]).tolist() == [N + 2]
    assert ranked(old, query, 2) == best


def test_snapshots_share_what_did_not_change() -> None:
    first = make("int").add([1000], torch.randn(1, D))  # copied once: the model's own table has no room behind it
    second = first.add([2000, 3000], torch.randn(2, D))
    removed = second.remove([1000])
    assert first.table.data_ptr() == second.table.data_ptr() == removed.table.data_ptr()
    assert len(first.table) + 2 == len(second.table)
    assert second.update([1000], torch.zeros(1, D)).table.data_ptr() != second.table.data_ptr()
    assert torch.equal(first.table, second.table[:63])
    own = torch.randn(5, D)
    assert ItemCatalog(own).table.data_ptr() == own.data_ptr()
    assert ItemCatalog(own).remove([3]).table.data_ptr() == own.data_ptr()


def test_two_branches_of_one_snapshot_do_not_mix() -> None:
    base = make("int").add([1000], torch.randn(1, D))
    left = base.add([2000], torch.ones(1, D))
    right = base.add([3000], torch.zeros(1, D))
    assert torch.equal(left.table[-1], torch.ones(D))
    assert torch.equal(right.table[-1], torch.zeros(D))
    assert left.lookup([2000, 3000]).tolist() == [63, -1]
    assert right.lookup([2000, 3000]).tolist() == [-1, 63]


@pytest.mark.parametrize("scan_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_many_changes_equal_a_catalogue_built_at_once(metric: str, scan_dtype: torch.dtype | None) -> None:
    catalog = ItemCatalog(torch.randn(3, D), metric=metric, scan_dtype=scan_dtype)
    for i in range(40):
        catalog = catalog.add([3 + i], torch.randn(1, D) * 10.0 ** (i % 5))
        if i % 7 == 0:
            catalog = catalog.update([i], torch.randn(1, D))
    at_once = ItemCatalog(catalog.table.clone(), metric=metric, scan_dtype=scan_dtype)
    query = torch.randn(4, D)
    one, other = catalog.topk(query, 9), at_once.topk(query, 9)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.scores, other.scores)


def test_changes_within_inference_mode() -> None:
    with torch.inference_mode():
        catalog = make("row").add([62], torch.randn(1, D))
    catalog = catalog.add([63], torch.randn(1, D)).update([62], torch.randn(1, D))
    with torch.inference_mode():
        assert catalog.add([64], torch.randn(1, D)).lookup([64]).tolist() == [64]


def test_readers_are_not_disturbed_by_updates() -> None:
    query = torch.randn(2, D)
    current = [make("row")]
    wrong: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            catalog = current[0]
            first, second = catalog.topk(query, 5), catalog.topk(query, 5)
            if not (torch.equal(first.rows, second.rows) and torch.equal(first.scores, second.scores)):
                wrong.append("a snapshot changed under its reader")
            if int(first.rows.max()) >= catalog.n_rows:
                wrong.append("a snapshot showed a row that it does not have")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(150):
        latest = current[0].add([62 + i], torch.randn(1, D) * (1 + i))
        current[0] = latest.update([1 + i % N], torch.randn(1, D))
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert current[0].n_items == N + 150


# --- ranking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_the_clean_ranking_shows_items_only(metric: str, dtype: torch.dtype) -> None:
    catalog = make("str", metric, dtype)
    query = torch.randn(5, D, dtype=dtype)
    found = catalog.topk(query, 200)
    assert found.num_valid.tolist() == [N] * 5
    assert [sorted(rows) for rows in found.rows[:, :N].tolist()] == [list(range(1, N + 1))] * 5
    assert bool((found.rows[:, N:] == -1).all())
    assert bool((found.scores[:, N:] == -torch.inf).all())
    table, vectors = catalog.table.double(), query.double()
    if metric == "cosine":
        table, vectors = F.normalize(table, dim=1), F.normalize(vectors, dim=1)
    truth = (vectors @ table.T).gather(1, found.rows[:, :N])
    assert_agree(found.scores[:, :N], truth, torch.float32)
    assert catalog.table.dtype == dtype


def test_zero_vectors_have_cosine_zero() -> None:
    catalog = ItemCatalog(torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]), metric="cosine")
    assert catalog.topk(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 3).rows.tolist() == [[1, 0, 2], [0, 1, 2]]


@given(data=st.data())
def test_filters_intersect(data: st.DataObject) -> None:
    catalog, query = make("row"), torch.randn(3, D)
    every = st.lists(st.integers(0, N + 1), max_size=N)
    exclude, candidates = data.draw(st.none() | every), data.draw(st.none() | every)
    lists = st.none() | st.lists(every, min_size=3, max_size=3)
    user_exclude, user_candidates = data.draw(lists), data.draw(lists)
    k = data.draw(st.integers(1, N + 5))
    rows = torch.arange(N + 2)
    may = catalog.is_item.expand(3, -1).clone()
    if exclude is not None:
        may[:, exclude] = False
    if candidates is not None:
        may &= torch.isin(rows, torch.tensor(candidates))
    for user in range(3):
        if user_exclude is not None:
            may[user, user_exclude[user]] = False
        if user_candidates is not None:
            may[user] &= torch.isin(rows, torch.tensor(user_candidates[user]))
    given_filters = {
        "exclude_rows": None if exclude is None else torch.tensor(exclude, dtype=torch.int64),
        "candidate_rows": None if candidates is None else torch.tensor(candidates, dtype=torch.int64),
        "user_exclude": None if user_exclude is None else UserLists.from_lists(user_exclude),
        "user_candidates": None if user_candidates is None else UserLists.from_lists(user_candidates),
    }
    found = catalog.topk(query, k, **given_filters)
    assert found.rows.tolist() == by_hand(query @ catalog.table.T, may, k)
    assert found.num_valid.tolist() == may.sum(1).clamp(max=k).tolist()
    with pytest.MonkeyPatch.context() as patch:  # as for few candidates of a large catalogue on a GPU
        patch.setattr(ItemCatalog, "_worth_gathering", lambda *_: True)
        gathered = catalog.topk(query, k, **given_filters)
    assert torch.equal(gathered.rows, found.rows)
    assert torch.equal(gathered.scores, found.scores)


def test_few_candidates_are_gathered_where_a_gpu_scans_long() -> None:
    catalog = make("row")
    assert not catalog._worth_gathering(0)  # the C++ engine reads them where they lie
    for n_rows, n_candidates, worth in (
        (1 << 22, 1 << 16, True),
        (1 << 22, (1 << 16) + 1, False),
        (1 << 20, 10, False),
    ):
        catalog.n_rows, catalog.dim, catalog.device = n_rows, 64, torch.device("cuda")
        assert catalog._worth_gathering(n_candidates) is worth


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_max_over_samples(metric: str) -> None:
    catalog, query = make("row", metric), torch.randn(4, 5, D)
    seen = UserLists.from_lists([[1, 2], [], list(range(1, 58)), [9]])
    found = catalog.topk(query, 6, user_exclude=seen)
    single = [catalog.topk(query[:, m], N + 2, user_exclude=seen) for m in range(5)]
    best = torch.full((4, N + 2), -torch.inf)
    for top in single:
        valid = top.rows >= 0
        scores = torch.where(valid, top.scores, -torch.inf)
        best = best.scatter_reduce(1, top.rows.clamp(min=0), scores, "amax")
    assert found.rows.tolist() == by_hand(best, best > -torch.inf, 6)
    assert torch.equal(found.scores[0], best[0].sort(descending=True).values[:6])


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_mean_over_samples(metric: str) -> None:
    catalog, query = make("row", metric), torch.randn(4, 5, D)
    found = catalog.topk(query, N, aggregation="mean")
    table = catalog.table.double()
    vectors = query.double()
    if metric == "cosine":
        table, vectors = F.normalize(table, dim=-1), F.normalize(vectors, dim=-1)
    truth = (vectors @ table.T).mean(1)
    assert_agree(found.scores, truth.gather(1, found.rows), torch.float32)
    one = query[:, :1].contiguous()
    for aggregation in ("max", "mean"):
        assert torch.equal(catalog.topk(one, 5, aggregation=aggregation).rows, catalog.topk(query[:, 0], 5).rows)


def test_a_user_gets_the_same_answer_in_any_batch() -> None:
    for metric in ("dot", "cosine"):
        catalog, query = make("row", metric), torch.randn(7, 3, D)
        for aggregation in ("max", "mean"):
            whole = catalog.topk(query, 8, aggregation=aggregation)
            for user in range(7):
                alone = catalog.topk(query[user : user + 1], 8, aggregation=aggregation)
                assert torch.equal(alone.rows[0], whole.rows[user])
                assert torch.equal(alone.scores[0], whole.scores[user])


def test_items_in_another_order_are_the_same_items() -> None:
    table, query = torch.randn(N, D), torch.randn(3, D)
    order = torch.randperm(N)
    ids = np.array(IDS["str"], dtype=object)
    one = ItemCatalog(table, list(ids))
    other = ItemCatalog(table[order], list(ids[order]))
    a, b = one.topk(query, 12), other.topk(query, 12)
    assert one.external(a.rows).tolist() == other.external(b.rows).tolist()
    assert torch.equal(a.scores, b.scores)


def test_the_published_ranking_shows_every_row_of_the_authors_table() -> None:
    catalog = make("row", "cosine").add([62], torch.randn(1, D)).remove([5])
    query = torch.randn(4, D)
    scores = F.normalize(query, dim=1) @ F.normalize(catalog.table, dim=1).T
    assert ranked(catalog, query, 63, published=True) == by_hand(scores, torch.ones(4, 63).bool(), 63)
    assert ranked(catalog, query, 63, published=True, n_published_rows=62) == by_hand(
        scores[:, :62], torch.ones(4, 62).bool(), 63
    )


@pytest.mark.parametrize("n_samples", [1, 3])
def test_published_seen_items_score_zero(n_samples: int) -> None:
    catalog = make("row", "cosine")
    query = torch.randn(4, n_samples, D)
    seen = [[3, 9, 3, 0], [], list(range(N + 2)), [61, 60, 59]]
    scores = (F.normalize(query, dim=2) @ F.normalize(catalog.table, dim=1).T).amax(1)
    for user, rows in enumerate(seen):
        scores[user, rows] = 0.0
    for k in (1, 30, 62, 70):
        found = catalog.topk(query, k, published=True, zeroed=UserLists.from_lists(seen))
        assert found.rows.tolist() == by_hand(scores, torch.ones(4, 62).bool(), k)
        assert found.num_valid.tolist() == [min(k, 62)] * 4
    assert found.scores[2, :62].tolist() == [0.0] * 62


def test_no_users_and_no_items() -> None:
    catalog = make("row")
    for query in (torch.randn(0, D), torch.randn(0, 2, D)):
        assert catalog.topk(query, 3).rows.shape == (0, 3)
        zeroed = UserLists.from_lists([])
        assert catalog.topk(query, 3, published=True, zeroed=zeroed).rows.shape == (0, 3)
    empty = ItemCatalog(torch.zeros(0, D))
    assert empty.topk(torch.randn(2, D), 3).num_valid.tolist() == [0, 0]
    assert empty.add([0], torch.randn(1, D)).topk(torch.randn(2, D), 3).num_valid.tolist() == [1, 1]
    assert empty.describe_ids() == "no items"


def test_a_bound_op_is_used() -> None:
    calls = []
    bound = score_topk.bind("torch", "cpu")
    counting = type(bound)(bound.name, bound.backend, lambda *a: calls.append(a) or bound.function(*a))
    make("row").topk(torch.randn(2, D), 3, topk_op=counting)
    assert len(calls) == 1


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, scan_dtype: torch.dtype | None, tmp_path: Path) -> None:
    catalog = make(kind, "cosine", scan_dtype=scan_dtype).add(NEW[kind], torch.randn(2, D)).remove(external(kind, 4))
    for _ in range(2):  # the second save replaces the first
        catalog.save(tmp_path / "new" / "folder")
    loaded = ItemCatalog.load(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "catalog.json",
        "catalog.safetensors",
    ]
    assert repr(loaded) == repr(catalog)
    assert loaded._vectors.scan.choice is catalog._vectors.scan.choice is scan_dtype
    assert torch.equal(loaded.table, catalog.table)
    assert torch.equal(loaded.is_item, catalog.is_item)
    assert loaded.item_ids == catalog.item_ids
    assert loaded.special_rows == catalog.special_rows
    query = torch.randn(3, D)
    assert ranked(loaded, query, 70) == ranked(catalog, query, 70)
    assert loaded.external(torch.arange(64)).tolist() == catalog.external(torch.arange(64)).tolist()
    again = loaded.add([70] if kind != "str" else ["é"], torch.randn(1, D))
    assert again.n_rows == 65


def truncated(folder: Path) -> None:
    path = folder / "catalog.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "catalog.json"
        facts = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"catalog\.safetensors: cannot be read"),
        (lambda folder: (folder / "catalog.safetensors").unlink(), r"catalog\.safetensors: cannot be read"),
        (lambda folder: (folder / "catalog.json").unlink(), r"catalog\.json: no such file; give a folder that"),
        (lambda folder: (folder / "catalog.json").write_text('{"format": '), r"catalog\.json: cannot be read"),
        (lambda folder: (folder / "catalog.json").write_text("[]"), r"must be of the format .* \(got 'list'\)"),
        (edited(format="another"), r"must be of the format 'fastdiff item catalogue, version 1' \(got 'another'\)"),
        (edited(mark="another"), r"are not of one save"),
        (edited(metric=None), r"catalog\.json: is damaged"),
        (edited(metric="euclid"), r"catalog\.json: is damaged"),
        (edited(scan_dtype="int3"), r"catalog\.json: is damaged"),
        (edited(special_rows=[1]), r"catalog\.json: is damaged"),
    ],
)
def test_damaged_files(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make("int").save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CatalogError, match=message):
        ItemCatalog.load(tmp_path)


def test_a_save_that_fails_leaves_the_former_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = make("str")
    catalog.save(tmp_path)

    def full(path: Path, *rest: Any, **more: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        make("str").save(tmp_path)
    monkeypatch.undo()
    assert torch.equal(ItemCatalog.load(tmp_path).table, catalog.table)
    assert len(list(tmp_path.iterdir())) == 2


# --- errors -----------------------------------------------------------------------------------------------------------

E3 = torch.eye(3)
NAN = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ItemCatalog(E3, [1, 2]), CatalogError, r"item_ids: must hold one id per item, 3 \(got 2\)"),
        (lambda: ItemCatalog(E3, [1, 2, 1]), CatalogError, r"item_ids\[2\]: item id 1 is already at index 0"),
        (lambda: ItemCatalog(E3, list("aba")), CatalogError, r"item_ids\[2\]: item id 'a' is already at index 0"),
        (
            lambda: ItemCatalog(E3, [1, "a", 2]),
            CatalogError,
            r"all integers or all strings \(got 'a' of type str at index 1\)",
        ),
        (lambda: ItemCatalog(E3, ["a", "b", 2]), CatalogError, r"\(got 2 of type int at index 2\)"),
        (lambda: ItemCatalog(E3, [1, 2.0, 3]), CatalogError, r"\(got 2.0 of type float at index 1\)"),
        (lambda: ItemCatalog(E3, [1, True, 3]), CatalogError, r"\(got True of type bool at index 1\)"),
        (lambda: ItemCatalog(E3, torch.tensor([1.0, 2.0, 3.0])), CatalogError, r"\(got dtype float32\)"),
        (lambda: ItemCatalog(E3, torch.ones(3, 1).long()), CatalogError, r"must be flat \(got shape \[3, 1\]\)"),
        (lambda: ItemCatalog(E3, "abc"), CatalogError, r"must be a sequence, array or tensor of ids \(got str\)"),
        (lambda: ItemCatalog(E3, [1, -1, 2]), CatalogError, r"item_ids\[1\]: -1 cannot be an item id"),
        (lambda: ItemCatalog(E3, [1, 2**64, 2]), CatalogError, r"item_ids\[1\]: integers must have 64 bits"),
        (
            lambda: ItemCatalog(E3[0]),
            InvalidArgument,
            r"item_emb: must be a floating tensor \[n, D\] \(got \[3\] float32\)",
        ),
        (lambda: ItemCatalog(E3.long()), InvalidArgument, r"item_emb: must be a floating .* \(got \[3, 3\] int64\)"),
        (lambda: ItemCatalog(E3.long().numpy()), InvalidArgument, r"item_emb: must be a floating .* \(got ndarray\)"),
        (lambda: ItemCatalog(E3[:, :0]), InvalidArgument, r"vectors must have at least 1 number"),
        (lambda: ItemCatalog(NAN), InvalidArgument, r"item_emb\[1\]: holds NaN or infinity"),
        (lambda: ItemCatalog(1.0 / NAN[:, :1]), InvalidArgument, r"item_emb\[0\]: holds NaN or infinity"),
        (
            lambda: ItemCatalog(E3.double() * 1e300),
            InvalidArgument,
            r"item_emb\[0\]: holds a number that float32 cannot",
        ),
        (lambda: ItemCatalog(E3, metric="l2"), InvalidArgument, r"metric must be one of dot, cosine \(got 'l2'\)"),
        (
            lambda: ItemCatalog(E3, scan_dtype=torch.int16),
            InvalidArgument,
            r"scan_dtype: must be None or one of torch.float32, torch.bfloat16, torch.float16, torch.int8 "
            r"\(got torch.int16\)",
        ),
        (
            lambda: ItemCatalog.from_table(E3, {3: "[PAD]"}),
            InvalidArgument,
            r"special_rows must be rows 0..2 \(got 3\)",
        ),
    ],
)
def test_building_errors(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


ONE = torch.randn(1, D)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda c: c.add([-100], ONE),
            CatalogError,
            r"add: item_ids\[0\] is -100, which an item has already; use update",
        ),
        (lambda c: c.add(["x"], ONE), CatalogError, r"add: item_ids: must be integers like .* \(got 'x'\)"),
        (lambda c: c.add([1, 1], ONE), CatalogError, r"add: item_ids\[1\]: item id 1 is already at index 0"),
        (lambda c: c.add([-1], ONE), CatalogError, r"add: item_ids\[0\]: -1 cannot be an item id"),
        (lambda c: c.add([1, 2], ONE), InvalidArgument, r"add: item_emb: must hold one row per id, 2 \(got 1\)"),
        (lambda c: c.add([1], ONE[:, 1:]), InvalidArgument, r"add: item_emb: vectors must have 8 numbers"),
        (lambda c: c.add([1], ONE / 0), InvalidArgument, r"add: item_emb\[0\]: holds NaN or infinity"),
        (
            lambda c: c.update([-99], ONE),
            CatalogError,
            r"update: item_ids\[0\] is -99, which is no item; .* has 60 ids from",
        ),
        (
            lambda c: c.update([-100, -100], ONE),
            CatalogError,
            r"update: item_ids\[1\]: item id -100 is already at index 0",
        ),
        (lambda c: c.update([-100], ONE.long()), InvalidArgument, r"update: item_emb: must be a floating tensor"),
        (
            lambda c: c.remove([-100, 4]),
            CatalogError,
            r"remove: item_ids\[1\] is 4, which is no item; the catalogue has",
        ),
        (lambda c: c.remove([-100, -100]), CatalogError, r"remove: item_ids\[1\]: item id -100 is already at index 0"),
        (lambda c: c.rows([-100, 4]), CatalogError, r"rows: ids\[1\] is 4, which is no item"),
        (lambda c: c.lookup([1.5]), CatalogError, r"lookup: ids: ids must be all integers or all strings \(got 1.5"),
    ],
)
def test_change_errors(change: Callable[[ItemCatalog], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"ItemCatalog\." + message):
        change(make("int"))


def test_added_vectors_must_fit_the_dtype_of_the_table() -> None:
    with pytest.raises(InvalidArgument, match=r"add: item_emb\[0\]: holds NaN or infinity"):
        make("row", dtype=torch.float16).add([62], 1e6 * torch.ones(1, D))


QUERY = torch.randn(2, D)
LISTS = UserLists.from_lists([[1], [2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": QUERY[0]}, r"query must be a floating \[B, D\] or \[B, M, D\] tensor \(got \[8\] float32\)"),
        ({"query": QUERY.long()}, r"query must be a floating .* \(got \[2, 8\] int64\)"),
        ({"query": QUERY.tolist()}, r"query must be a floating .* \(got list\)"),
        ({"query": QUERY[:, :5]}, r"query must hold vectors of 8 numbers, one or more per user \(got shape \[2, 5\]\)"),
        ({"query": QUERY[:, None][:, :0]}, r"query must hold vectors .* \(got shape \[2, 0, 8\]\)"),
        ({"query": QUERY.to("meta")}, r"query must be where the catalogue is, cpu \(got meta\); move it"),
        ({"k": 0}, r"k must be an integer of at least 1 \(got 0\)"),
        ({"k": 2.5}, r"k must be an integer of at least 1 \(got 2.5\)"),
        ({"k": True}, r"k must be an integer of at least 1 \(got True\)"),
        ({"aggregation": "sum"}, r"aggregation must be one of max, mean \(got 'sum'\)"),
        ({"exclude_rows": torch.tensor([62])}, r"exclude_rows must hold rows 0..61 \(got 62\)"),
        ({"candidate_rows": torch.tensor([3, -1])}, r"candidate_rows must hold rows 0..61 \(got -1\)"),
        ({"candidate_rows": torch.tensor([3.0])}, r"candidate_rows must be a flat int64 tensor \(got \[1\] float32\)"),
        ({"published": True, "user_exclude": LISTS}, r"published=True takes no filters; use published=False"),
        ({"published": True, "exclude_rows": torch.tensor([3])}, r"published=True takes no filters"),
        ({"published": True, "n_published_rows": 63}, r"n_published_rows must be 0..62 \(got 63\)"),
        ({"zeroed": LISTS}, r"zeroed and n_published_rows need published=True"),
        ({"n_published_rows": 5}, r"zeroed and n_published_rows need published=True"),
    ],
)
def test_ranking_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=r"ItemCatalog\.topk: " + message):
        make("row").topk(**({"query": QUERY, "k": 3} | arguments))


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_queries_that_are_not_finite(metric: str) -> None:
    query = QUERY.clone()
    query[1, 3] = torch.nan
    with pytest.raises(
        InvalidArgument, match=r"score_topk: query must be finite \(got NaN or infinity in query\[1\]\)"
    ):
        make("row", metric).topk(query, 3)


def test_the_id_is_named_whatever_container_it_came_in() -> None:
    for ids in ([-100, 4], np.array([-100, 4]), torch.tensor([-100, 4])):
        with pytest.raises(CatalogError, match=r"ids\[1\] is 4, which"):
            make("int").rows(ids)
    with pytest.raises(
        CatalogError, match=r"ids\[0\] is 'x', which is no item; .* 60 string ids \('item 0', 'item 1', "
    ):
        make("str").rows(np.array(["x"]))


# --- looks ------------------------------------------------------------------------------------------------------------


def test_repr() -> None:
    assert repr(make("row")) == (
        "ItemCatalog(60 items (ids 1..60), 2 other rows, dim=8, float32, metric='dot', device=cpu)"
    )
    assert "60 items (60 ids from -100 to 313)" in repr(make("int"))
    assert "60 items (60 string ids ('item 0', 'item 1', 'item 2', ...))" in repr(make("str"))
    assert "metric='cosine', scan_dtype=bfloat16, device=cpu" in repr(make("str", "cosine", scan_dtype=torch.bfloat16))


def test_to() -> None:
    catalog = make("int")
    assert catalog.to("cpu") is catalog
    if torch.cuda.is_available():
        moved = catalog.to("cuda")
        query = torch.randn(3, D)
        here, there = catalog.topk(query, 5), moved.topk(query.to("cuda"), 5)
        assert torch.equal(here.rows, there.rows.cpu())
        assert torch.equal(here.scores, there.scores.cpu())
        assert moved.external(there.rows).device.type == "cuda"
