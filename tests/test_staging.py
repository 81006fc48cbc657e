"""What goes up to a device together, and the ids that are looked up there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.catalog import ItemCatalog
from fastdiff.device_histories import DeviceHistories
from fastdiff.device_ids import DeviceIds
from fastdiff.histories import parse_histories
from fastdiff.noise import history_row_key
from fastdiff.ops.score_topk import UserLists
from fastdiff.staging import ALIGNED, upload
from tests.builders import METHODS, small_engine
from tests.syncs import no_syncs

CPU = torch.device("cpu")
HISTORIES = [[3, 7, 7, 20], [], [5], list(range(10, 22))]


def test_tensors_go_up_as_views_of_one_aligned_buffer() -> None:
    tensors = [
        torch.arange(6).view(2, 3),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.arange(40)[::2],
        torch.tensor([-(1 << 63)]),
    ]
    there = upload(tensors, CPU)
    assert all(torch.equal(a, b) for a, b in zip(tensors, there, strict=True))
    assert len({part.untyped_storage().data_ptr() for part in there}) == 1
    assert all(part.storage_offset() % ALIGNED == 0 for part in there)
    there[0].zero_()
    assert tensors[0].sum() == 15
    assert upload([], CPU) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("with_key", [True, False])
def test_histories_on_a_device_are_those_on_the_host(method: str, with_key: bool) -> None:
    engine = small_engine(method)
    host = parse_histories(HISTORIES, engine.catalog, engine.config)
    key = host.row_key
    if not with_key:
        host._row_key = None
    there = DeviceHistories.of(host, CPU)
    assert torch.equal(there.window.items, host.window.items)
    assert torch.equal(there.window.lengths, host.window.lengths)
    assert torch.equal(there.seen.values, host.seen.values)
    assert torch.equal(there.seen.offsets, host.seen.offsets)
    assert torch.equal(there.row_key, key)
    assert torch.equal(key, history_row_key(host.window.items, host.window.lengths))
    assert there.n_users == 4


@pytest.mark.parametrize("kind", ["rows", "integers"])
def test_ids_on_a_device_are_those_on_the_host(kind: str) -> None:
    ids = None if kind == "rows" else [900 - 7 * row for row in range(12)]
    catalog = ItemCatalog.from_table(torch.randn(14, 4), {0: "[PAD]", 13: "[MASK]"}, ids)
    named = list(catalog.item_ids)
    for snapshot in (catalog, catalog.remove(named[3:5]), catalog.add([5000, 77], torch.randn(2, 4))):
        there = snapshot.device_ids
        asked = torch.tensor([*named, 5000, 77, 0, 13, -1, -5, 1 << 40, -(1 << 63)]).view(2, -1)
        known = there.known(asked)
        assert known.flatten().tolist() == snapshot.known(asked.flatten()).tolist()
        rows = torch.tensor([[1, 5, -1], [12, 2, 13]])
        assert torch.equal(there.external(rows), torch.as_tensor(snapshot.external(rows)))
        assert there.external(rows).data_ptr() != rows.data_ptr()


def test_no_ids_at_all() -> None:
    catalog = ItemCatalog(torch.zeros(0, 3), np.zeros(0, dtype=np.int64))
    assert DeviceIds(catalog._ids, CPU).known(torch.tensor([0, -1])).tolist() == [-1, -1]


@pytest.mark.parametrize("times", [1, 3])
def test_repeated_lists_need_no_look_at_their_lengths(times: int) -> None:
    lists = UserLists.from_lists([[4, 1], [], [2, 2, 9]])
    with no_syncs():
        repeated = lists.repeat(times)
    expected = [rows for rows in ([4, 1], [], [2, 2, 9]) for _ in range(times)]
    assert torch.equal(repeated.values, UserLists.from_lists(expected).values)
    assert torch.equal(repeated.offsets, UserLists.from_lists(expected).offsets)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("filters", [{}, {"exclude_rows": [3, 4]}, {"candidate_rows": [5, 6, 7]}])
def test_the_ranking_around_the_kernel_waits_for_nothing(samples: int, filters: dict[str, Any]) -> None:
    """All that `topk` does itself, on tensors that stand for those of a device."""
    engine = small_engine("dreamrec", item_ids=[1000 - row for row in range(50)])
    catalog, query = engine.catalog, torch.randn(4, samples, 16).squeeze(1)
    there = DeviceHistories.of(parse_histories([[1000], [], [999, 990], [951]], catalog, engine.config), CPU)
    expected = catalog.topk(
        query, 5, user_exclude=there.seen, **{name: torch.tensor(rows) for name, rows in filters.items()}
    )
    checked = {name: catalog._checked_rows(torch.tensor(rows), name) for name, rows in filters.items()}
    ids = catalog.device_ids
    with no_syncs():
        history_row_key(there.window.items, there.window.lengths)
        catalog._queries(query, "max")
        allowed = catalog._allowed_of(checked.get("exclude_rows"), checked.get("candidate_rows"))
        there.seen.repeat(samples)
        known = ids.known(ids.external(expected.rows))
    assert torch.equal(known, expected.rows)
    assert allowed is not None
    assert bool(allowed[expected.rows[expected.rows >= 0]].all())
