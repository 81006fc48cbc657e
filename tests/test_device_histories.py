"""Histories that are parsed on the device: what `parse_histories` makes of them, on tensors of the CPU here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.catalog import ItemCatalog
from fastdiff.device_histories import DeviceHistories, can_parse, parse_on_device
from fastdiff.errors import InvalidHistory
from fastdiff.histories import parse_histories
from tests.builders import METHODS, small_config, small_engine
from tests.syncs import no_syncs


def small_catalog(method: str, kind: str) -> tuple[ItemCatalog, Any]:
    config = small_config(method, max_seq_len=3)
    ids = None if kind == "rows" else [7 * item - 20 for item in range(50)]  # the pad id 0 is none of them, 1 is
    return ItemCatalog.from_table(torch.zeros(config.n_rows, 16), config.special_rows, ids), config


def error_of(run: Callable[[], object]) -> str | None:
    try:
        run()
    except InvalidHistory as error:
        return str(error)
    return None


def agree(ids: Any, catalog: ItemCatalog, config: Any) -> None:
    """The same histories, or the same error with the same words when it is asked for."""
    with no_syncs():
        ours = parse_on_device(torch.as_tensor(ids), catalog, config)
    (check,) = ours.checks
    words = error_of(lambda: parse_histories(np.asarray(ids), catalog, config))
    assert error_of(check) == words
    if words is not None:
        return
    theirs = parse_histories(np.asarray(ids), catalog, config)
    width = theirs.window.items.shape[1]
    assert ours.window.items.shape[1] == min(len(ids[0]), config.max_seq_len)
    assert torch.equal(ours.window.lengths, theirs.window.lengths)
    assert torch.equal(ours.window.items[:, :width], theirs.window.items)
    assert bool((ours.window.items[:, width:] == config.pad_id).all())
    assert torch.equal(ours.row_key, theirs.row_key)
    assert torch.equal(ours.only_seen.values, theirs.seen.values)
    assert torch.equal(ours.only_seen.offsets, theirs.seen.offsets)
    own = [set(rows.tolist()) for rows in theirs.seen.values.tensor_split(theirs.seen.offsets[1:-1])]
    for rows, filled in zip(own, ours.seen.values.view(len(ids), -1).tolist(), strict=True):
        assert rows | {config.pad_id} >= set(filled) >= rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["rows", "integers"])
@given(data=st.data())
def test_what_the_host_makes_of_them(method: str, kind: str, data: st.DataObject) -> None:
    catalog, config = small_catalog(method, kind)
    usual = [*catalog.item_ids[:4], -1, config.pad_id]
    wrong = [99, -2, 1 << 40, -(1 << 63), config.pad_id + 1]
    ids = st.sampled_from([*usual * 4, *wrong] if data.draw(st.booleans()) else usual)
    width = data.draw(st.integers(1, 6))
    users = data.draw(st.lists(st.lists(ids, min_size=width, max_size=width), min_size=1, max_size=4))
    agree(users, catalog, config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["rows", "integers"])
def test_every_short_row_with_pads(method: str, kind: str) -> None:
    catalog, config = small_catalog(method, kind)
    item, pad = catalog.item_ids[5], config.pad_id
    for first in (item, pad, -1):
        for second in (item, pad, -1):
            for third in (item, pad, -1):
                agree([[first, second, third, item]], catalog, config)
                agree([[first, second, third]], catalog, config)


@pytest.mark.parametrize("method", METHODS)
def test_a_wider_window_is_the_same_to_a_model(method: str) -> None:
    engine = small_engine(method, backend="torch")
    ids = torch.tensor([[3, 7, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1], [5, -1, -1, -1, -1, -1]])
    ours = parse_on_device(ids, engine.catalog, engine.config).window
    theirs = parse_histories(ids, engine.catalog, engine.config).window
    assert ours.items.shape[1] > theirs.items.shape[1]
    plan = engine.model.plan("ddpm", 2) if method != "tarec" else engine.model.plan("one_step")
    states = [engine.model.prepare(engine.model.encode(w, engine.model.item_table), plan, 1.0) for w in (ours, theirs)]
    x_t = torch.randn(3, 16)
    outputs = [engine.model.denoise(x_t, 0, state) for state in states]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_the_callers_tensor_may_change_afterwards() -> None:
    catalog, config = small_catalog("dreamrec", "rows")
    ids = torch.tensor([[1, 99]])
    ours = parse_on_device(ids, catalog, config)
    ids.zero_()
    with pytest.raises(InvalidHistory, match=r"histories\[0\] holds item id 99"):
        ours.checks[0]()


def test_only_dense_integers_are_taken() -> None:
    catalog, _ = small_catalog("dreamrec", "rows")
    strings = ItemCatalog(torch.zeros(2, 3), ["a", "b"])
    ids = torch.ones(2, 3, dtype=torch.int32)
    assert can_parse(ids, catalog)
    assert not can_parse(ids, strings)
    for wrong in (ids.float(), ids[0], ids[:0], ids[:, :0], ids.bool(), ids.to_sparse()):
        assert not can_parse(wrong, catalog)


def test_lists_go_up_whole() -> None:
    engine = small_engine("cddrec")
    there = DeviceHistories.of(parse_histories([[3], []], engine.catalog, engine.config), torch.device("cpu"))
    assert there.only_seen is there.seen
    assert there.checks == ()
