"""Files of histories, splits, instances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.data import (
    Instance,
    InstanceFile,
    LeaveOneOut,
    SequenceFile,
    UserSequence,
    check_known,
    id_type_of,
    parse_items,
    read_items,
    statistics,
)
from fastdiff.errors import DataError, InvalidArgument


def write(folder: Path, content: str | bytes, name: str = "sequences.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def users_and_items(path: Path, id_type: Any = int) -> list[tuple[str, list[Any]]]:
    return [(user, items) for user, items, _ in SequenceFile(path, id_type)]


# --- sequence files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"1 10 20\nu2 30\n",
        b"1 10 20\nu2 30",
        b"\n1 10 20\n\n  \nu2 30\n\n",
        b"1\t10\t20\r\nu2\t30\r\n",
        b"  1   10  20  \nu2 30 ",
        b"\xef\xbb\xbf1 10 20\nu2 30\n",
    ],
)
def test_layouts_of_a_sequence_file(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    assert users_and_items(path) == [("1", [10, 20]), ("u2", [30])]
    assert users_and_items(path, str) == [("1", ["10", "20"]), ("u2", ["30"])]


def test_a_sequence_file_can_be_read_again_and_says_where(tmp_path: Path) -> None:
    path = write(tmp_path, "a 1\n\nb 2\n")
    file = SequenceFile(path)
    assert list(file) == list(file) == [UserSequence("a", [1], f"{path}:1"), UserSequence("b", [2], f"{path}:3")]
    assert file.notes == []


def test_a_sequence_file_is_read_line_by_line(tmp_path: Path) -> None:
    lines = iter(SequenceFile(write(tmp_path, "a 1\nb x\n")))
    assert next(lines).items == [1]  # the bad second line is not reached yet
    with pytest.raises(DataError):
        next(lines)


def test_an_empty_file_holds_nobody(tmp_path: Path) -> None:
    assert users_and_items(write(tmp_path, "")) == []


ids = st.integers(-(2**63), 2**63 - 1)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=8)


@given(st.lists(st.tuples(words, st.lists(ids, min_size=1, max_size=5)), max_size=6))
def test_integers_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    text = "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in rows)
    assert users_and_items(write(tmp_path_factory.mktemp("data"), text)) == rows


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=5)), max_size=6))
def test_text_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    text = "".join(f"{user} {' '.join(items)}\n" for user, items in rows)
    assert users_and_items(write(tmp_path_factory.mktemp("data"), text), str) == rows


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"1 2\n7\n", 2, r"a user without items \(got '7'\); a line is `user item item \.\.\.`"),
        (b"1 2 x 3\n", 1, r"item id 'x' is not an integer of 64 bits; the catalogue's ids are integers"),
        (b"1 2\n\n1 2.0\n", 3, "item id '2.0' is not an integer"),
        (b"1 1_0\n", 1, "item id '1_0'"),
        (b"1 +1\n", 1, r"item id '\+1'"),
        (b"1 1-2\n", 1, "item id '1-2'"),
        ("1 ٣\n".encode(), 1, "item id '٣'"),
        (b"1 9223372036854775808\n", 1, "item id '9223372036854775808'"),
        (b"1 " + b"9" * 100 + b"\n", 1, r"item id '9{57}\.\.\.'"),
        (b"1 2\n1 2\xff3\n", 2, r"byte 4 of the line is not UTF-8 text \(got 0xff\); convert"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as raised:
        list(SequenceFile(path))
    assert str(raised.value).startswith(f"{path}:{line}: ")


def test_files_that_are_no_sequence_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: there is no such file; a sequence file"):
        SequenceFile(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="is a folder, not a file"):
        SequenceFile(tmp_path)
    with pytest.raises(DataError, match=r"holds evaluation instances, not sequences; `fastdiff evaluate` reads it"):
        SequenceFile(write(tmp_path, b"", "test.npz"))
    with pytest.raises(InvalidArgument, match="id_type must be int or str"):
        SequenceFile(write(tmp_path, b""), float)  # type: ignore[arg-type]


def test_lists_of_items(tmp_path: Path) -> None:
    assert read_items(write(tmp_path, "1 2\n3\n"), int) == [1, 2, 3]
    assert parse_items("", int, "here") == parse_items(" ", str, "here") == []
    with pytest.raises(DataError, match="here: item id 'a'"):
        parse_items("1 a", int, "here")


# --- RecBole ----------------------------------------------------------------------------------------------------------


def test_interactions_are_sorted_by_user_then_time(tmp_path: Path) -> None:
    rows = ["10\t5\t3.5", "9\t1\t2", "10\t6\t1", "9\t2\t1e0", "10\t7\t1"]
    path = write(tmp_path, "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n", "a.inter")
    assert users_and_items(path) == [("9", [2, 1]), ("10", [6, 7, 5])]  # equal times keep the file's order
    assert SequenceFile(path).notes == []
    assert [where for *_, where in SequenceFile(path)] == [f"{path}:3", f"{path}:2"]


def test_columns_may_stand_anywhere(tmp_path: Path) -> None:
    rows = ["rating:float\titem_id:token\tuser_id:token", "4.0\tthe item\tb", "1\tx\ta", "", "5\ty\tb"]
    path = write(tmp_path, "\r\n".join(rows), "a.inter")
    assert users_and_items(path, str) == [("a", ["x"]), ("b", ["the item", "y"])]
    assert SequenceFile(path, str).notes == [
        "a.inter has no timestamp column: a user's interactions keep the order of the file"
    ]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", 1, "the header has no column user_id and no column item_id"),
        ("user:token\titem_id:token\n", 1, r"no column user_id \(got 'user:token"),
        ("user_id:token\titem_id:token\n1\t2\n1\t2\t3\n", 3, r"3 columns \(got '1\\t2\\t3'\); the header names 2"),
        ("user_id:token\titem_id:token\n1 2\n", 2, "1 columns .* separated by one tab each"),
        ("user_id:token\titem_id:token\n1\t\n", 2, "the item id is empty"),
        ("user_id:token\titem_id:token\n\t1\n", 2, "the user id is empty"),
        ("user_id:token\titem_id:token\n1\ta\n", 2, "item id 'a' is not an integer"),
        ("user_id:token\titem_id:token\ttimestamp:float\n1\t2\tnoon\n", 2, "timestamp 'noon' is not a finite number"),
        ("user_id:token\titem_id:token\ttimestamp:float\n1\t2\tnan\n", 2, "timestamp 'nan'"),
    ],
)
def test_a_bad_interaction_is_named(tmp_path: Path, content: str, line: int, message: str) -> None:
    path = write(tmp_path, content, "a.inter")
    with pytest.raises(DataError, match=message) as raised:
        list(SequenceFile(path))
    assert str(raised.value).startswith(f"{path}:{line}: ")


# --- splits -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(ids, min_size=1, max_size=6), max_size=8), st.integers(0, 3))
def test_leave_one_out(sequences: list[list[int]], min_history: int) -> None:
    rows = [UserSequence(str(i), list(items), f"file:{i}") for i, items in enumerate(sequences)]
    for split, last in (("test", -1), ("valid", -2)):
        instances = LeaveOneOut(rows, split, min_history)
        kept = [row for row in rows if len(row.items[:last]) >= min_history and len(row.items) >= -last]
        expected = [Instance(row.user, row.items[:last], row.items[last], row.where) for row in kept]  # type: ignore[arg-type]
        assert list(instances) == expected
        assert list(instances) == expected  # again, and the count begins again
        assert instances.skipped == len(rows) - len(kept)


def test_leave_one_out_refuses() -> None:
    with pytest.raises(InvalidArgument, match=r"split must be one of test, valid \(got 'train'\)"):
        LeaveOneOut([], "train")
    with pytest.raises(InvalidArgument, match=r"min_history must be an int of at least 0 \(got -1\)"):
        LeaveOneOut([], min_history=-1)


# --- instances --------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "history": np.array([[4, 5, 9], [9, 9, 9], [1, 2, 3]], dtype=np.int32),
    "history_len": np.array([2, 0, 3]),
    "target": np.array([6, 7, 8]),
}


def test_instances(tmp_path: Path) -> None:
    path = tmp_path / "test.npz"
    np.savez(path, **GOOD)
    instances = InstanceFile(path)
    assert len(instances) == 3
    assert [(user, history, target) for user, history, target, _ in instances] == [
        ("0", [4, 5], 6),
        ("1", [], 7),
        ("2", [1, 2, 3], 8),
    ]
    assert next(iter(instances)).where == f"{path}, row 0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, "no array target"),
        ({"history": GOOD["history"][0]}, r"history has shape \(3,\) and dtype int32; integer arrays history \[B, L\]"),
        ({"target": np.array([1.0, 2.0, 3.0])}, "target has shape .* and dtype float64"),
        ({"target": np.array([1, 2])}, r"target has shape \(2,\)"),
        ({"history_len": np.array([2, 4, 3])}, r"history_len\[1\] is 4; history has 3 columns, so 0\.\.3 is accepted"),
        ({"history_len": np.array([2, -1, 3])}, r"history_len\[1\] is -1"),
    ],
)
def test_bad_instances(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arrays = {name: array for name, array in (GOOD | changes).items() if array is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        InstanceFile(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"history", b"PK\x03\x04 cut off"])
def test_files_that_hold_no_instances(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"not an \.npz file of plain arrays .* are accepted"):
        InstanceFile(write(tmp_path, content, "bad.npz"))
    with pytest.raises(DataError, match="there is no such file"):
        InstanceFile(tmp_path / "other.npz")


def test_arrays_of_objects_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **(GOOD | {"target": np.array([1, None, 3], dtype=object)}))
    with pytest.raises(DataError, match=r"not an \.npz file of plain arrays"):
        InstanceFile(tmp_path / "bad.npz")
    np.save(tmp_path / "one.npy", GOOD["target"])
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(DataError, match=r"not an \.npz file of plain arrays"):
        InstanceFile(tmp_path / "one.npz")


# --- against a catalogue ----------------------------------------------------------------------------------------------


class Catalogue:
    """The part of a catalogue that reading data needs."""

    def __init__(self, item_ids: list[Any]) -> None:
        self.item_ids = item_ids
        self.id_type = str if item_ids and isinstance(item_ids[0], str) else int

    def known(self, values: Any) -> Any:
        return np.array([self.item_ids.index(v) if v in self.item_ids else -1 for v in values], dtype=np.int64)

    def describe_ids(self) -> str:
        return "ids 10..12"


def test_the_first_unknown_item_is_named() -> None:
    rows = [UserSequence("a", [10, 0], "f:1"), UserSequence("b", [], "f:2"), UserSequence("c", [11, 13, 14], "f:4")]
    histories = [row.items for row in rows]
    catalogue: Any = Catalogue([10, 11, 12])
    config: Any = SimpleNamespace(pad_id=0)
    with pytest.raises(DataError, match=r"^f:4: item id 13 is not in the catalogue, which has ids 10\.\.12; leave"):
        check_known(rows, histories, catalogue, config)
    check_known(rows[:2], histories[:2], catalogue, config)  # 0 is the model's pad id
    with pytest.raises(DataError, match=r"^f:1: item id 0 "):
        check_known(rows[:2], histories[:2], catalogue, SimpleNamespace(pad_id=9))  # type: ignore[arg-type]


def test_ids_are_of_the_catalogues_type() -> None:
    assert id_type_of(Catalogue([3])) is id_type_of(Catalogue([])) is int  # type: ignore[arg-type]
    words: Any = Catalogue(["a", "b"])
    assert id_type_of(words) is str
    with pytest.raises(DataError, match="f:1: item id 'c'"):
        check_known([UserSequence("a", ["a", "c"], "f:1")], [["a", "c"]], words, SimpleNamespace(pad_id=0))  # type: ignore[arg-type]


# --- statistics and the real files ------------------------------------------------------------------------------------


def test_statistics() -> None:
    rows = [UserSequence("a", [1, 2, 3, 1], ""), UserSequence("b", [3], ""), UserSequence("c", [4], "")]
    found = statistics(rows)
    assert (found.users, found.items, found.interactions) == (3, 4, 6)
    assert (found.mean_length, found.median_length) == (2.0, 1.0)
    assert found.lengths == (1.0, 1.0, 1.0, 2.5, 4.0)
    assert found.density == 6 / 12
    assert found.repeats == 0.0
    assert statistics([UserSequence("a", [1, 1, 2, 2, 2], ""), UserSequence("b", [1], "")]).repeats == 3 / 4
    assert (statistics([]).users, statistics([]).density) == (0, 0.0)


def test_real_sequences_have_the_recorded_counts(dataset: Callable[[str], Path]) -> None:
    recorded = json.loads((dataset("datasets.json")).read_text())
    for name in ("adrec-ml-100k", "amazon-office"):
        found = statistics(SequenceFile(dataset(name) / "sequences.txt"))
        expected = recorded[name]
        assert (found.users, found.interactions) == (expected["users"], expected["interactions"])
        # the Amazon files hold 0 as an item, which is the number of their model's pad row
        assert (
            max(item for _, items, _ in SequenceFile(dataset(name) / "sequences.txt") for item in items)
            == (expected["max_item_id"])
        )


def test_real_instances(dataset: Callable[[str], Path]) -> None:
    recorded = json.loads((dataset("datasets.json")).read_text())["dreamrec-zhihu"]
    instances = InstanceFile(dataset("dreamrec-zhihu") / "test.npz")
    assert len(instances) == recorded["parts"]["test"]
    first, second = list(instances)[:2]
    assert first.history == [recorded["pad_id"]]
    assert second.history == [first.target]
