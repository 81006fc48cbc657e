"""Training data: splits, filters, statistics, and what is wrong with a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.data import Instance, LeaveOneOut, SequenceFile, UserSequence
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.train.data import chronological, describe, leave_one_out, prefixes, read, thin, windows


def write(folder: Path, text: str, name: str = "sequences.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def users_of(*sequences: list[Any]) -> list[UserSequence]:
    return [UserSequence(str(at), items, f"f:{at + 1}") for at, items in enumerate(sequences)]


INTER = "user_id:token\titem_id:token\ttimestamp:float\n"

# --- splits -----------------------------------------------------------------------------------------------------------


def test_leave_one_out_holds_out_the_last_two() -> None:
    data = leave_one_out(users_of([30, 10, 20, 40], [20, 30, 10]))
    assert data.item_ids == [10, 20, 30, 40]
    assert [sequence.tolist() for sequence in data.sequences] == [[2, 0], [1]]
    assert data.valid == [Instance("0", [30, 10], 20, "f:1"), Instance("1", [20], 30, "f:2")]
    assert data.test == [Instance("0", [30, 10, 20], 40, "f:1"), Instance("1", [20, 30], 10, "f:2")]
    assert data.cold_items == {40}
    assert data.numbers[40] == 3


def test_it_is_the_split_of_evaluate(tmp_path: Path) -> None:
    path = write(tmp_path, "a 1 2 3 4\nb 4 3 2\n")
    data = read(path)
    assert data.test == list(LeaveOneOut(SequenceFile(path), "test"))
    assert data.valid == list(LeaveOneOut(SequenceFile(path), "valid"))


def test_chronological_split_by_the_time_of_the_last_interaction(tmp_path: Path) -> None:
    """Ten users; user u's last interaction is at time 100 - u, its first long before: 8 : 1 : 1 from the oldest end."""
    rows = [f"{user}\t{item}\t{time}" for user in range(10) for item, time in ((user, 100 - user), (50 + user, user))]
    data = read(write(tmp_path, INTER + "\n".join(rows) + "\n", "a.inter"), "chronological")
    ids = data.item_ids
    assert [[ids[number] for number in sequence] for sequence in data.sequences] == [
        [50 + user, user] for user in (9, 8, 7, 6, 5, 4, 3, 2)
    ]
    assert [(one.user, one.history, one.target) for one in data.valid] == [("1", [], 51), ("1", [51], 1)]
    assert [(one.user, one.history, one.target) for one in data.test] == [("0", [], 50), ("0", [50], 0)]
    assert data.cold_items == {0, 1, 50, 51}
    assert any("of the same user: 10 (the first: " in note for note in data.notes)


def test_equal_last_times_keep_the_files_order() -> None:
    timed = [(user, [1.0] * len(user.items)) for user in users_of(*([at, at + 1] for at in range(11)))]
    data = chronological(timed)
    assert [one.user for one in data.valid] == ["8", "8"]
    assert [one.user for one in data.test] == ["9", "9", "10", "10"]


def test_a_chronological_split_needs_times_and_users(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sequences\.txt: the times .* a sequence file holds no times; a RecBole"):
        read(write(tmp_path, "1 2 3\n"), "chronological")
    with pytest.raises(DataError, match="it has no timestamp column"):
        read(write(tmp_path, "user_id:token\titem_id:token\n1\t2\n", "b.inter"), "chronological")
    nine = "".join(f"{user}\t{user}\t1\n{user}\t3\t2\n" for user in range(9))
    with pytest.raises(DataError, match=r"c\.inter: 9 users; .* at least 10 are needed"):
        read(write(tmp_path, INTER + nine, "c.inter"), "chronological")
    with pytest.raises(InvalidArgument, match="split must be one of leave-one-out, chronological"):
        read(tmp_path / "sequences.txt", "random")


# --- filters ----------------------------------------------------------------------------------------------------------


def test_items_are_left_out_first_then_users() -> None:
    """Item 9 occurs once; without it user 2 is too short; then item 7 is rare too, which only a second pass sees."""
    users = users_of([1, 2, 7], [1, 2, 1, 2], [7, 9, 1])
    assert thin(users, 3, 2) == [[0, 1, 2], [0, 1, 2, 3], []]
    assert thin(users, 3, 2, until_stable=True) == [[], [0, 1, 2, 3], []]
    assert thin(users, 1, 1) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2]]


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=7), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_a_stable_filter_keeps_what_it_promises_and_no_less(
    sequences: list[list[int]], min_items: int, min_interactions: int
) -> None:
    users = users_of(*sequences)
    kept = thin(users, min_items, min_interactions, until_stable=True)
    expected = [list(range(len(items))) for items in sequences]
    while True:  # literally: drop rare items, then short users, until nothing changes
        left = [items[at] for items, places in zip(sequences, expected, strict=True) for at in places]
        after = [
            [at for at in places if left.count(items[at]) >= min_interactions]
            for items, places in zip(sequences, expected, strict=True)
        ]
        after = [places if len(places) >= min_items else [] for places in after]
        if after == expected:
            break
        expected = after
    assert kept == expected


def test_filters_of_a_file(tmp_path: Path) -> None:
    data = read(write(tmp_path, "a 1 2 3 2\nb 2 1 3\nc 5 1\nd 1\n"), min_items=3, min_interactions=2)
    assert [one.user for one in data.test] == ["a", "b"]
    assert data.notes[0] == (
        "left out: 2 users and 1 item, with them 3 interactions (--min-interactions 2, --min-items 3)"
    )
    with pytest.raises(DataError, match=r"nothing is left of its 4 users .*; lower --min-interactions or --min-items"):
        read(tmp_path / "sequences.txt", min_interactions=9)
    with pytest.raises(InvalidArgument, match=r"min_items must be an int of at least 1 \(got 0\)"):
        read(tmp_path / "sequences.txt", min_items=0)


def test_the_last_interaction_is_one_that_was_kept(tmp_path: Path) -> None:
    """User 0's rare last item is left out, and with it the late time that would have made it a test user."""
    rows = ["0\t99\t500"] + [f"{user}\t{item}\t{10 * user + item}" for user in range(10) for item in (1, 2)]
    data = read(write(tmp_path, INTER + "\n".join(rows) + "\n", "a.inter"), "chronological", min_interactions=2)
    assert {one.user for one in data.test} == {"9"}


# --- what is wrong with a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"s\.txt: it holds no sequence"),
        ("\n \n", r"s\.txt: it holds no sequence"),
        ("a 1 2 3\nb 4\nc 1 2\n", r"s\.txt:2: user b has 1 item, and 1 more user fewer than 3; .* --min-items 3"),
        ("a 1 2 3\nb 4 1\n", r"s\.txt:2: user b has 2 items; .* leave these users out, or give --min-items 3"),
        ("a 1 2\nb 4\n", r"s\.txt:1: all 2 users have fewer than 3 items; leave-one-out holds out the last two"),
        ("a 7 7 7 7\nb 7 7 7\n", r"s\.txt:1: item 7 is the only one of all users; .* at least 2 are needed"),
        ("a 1 2 3 4\nb 4 -1 2\n", r"s\.txt:2: item id -1 stands for 'no item'"),
        ("a 1 2 3\nb x 2 1\n", r"s\.txt:2: item id 'x' is not an integer of 64 bits; .* text ids with --text-ids"),
        ("a 1 2 9223372036854775808\n", r"s\.txt:1: item id '9223372036854775808' is not an integer of 64 bits"),
    ],
)
def test_what_cannot_be_learned_from(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, text, "s.txt"))


def test_instances_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"an \.npz file holds evaluation instances, not sequences"):
        read(write(tmp_path, "", "train.npz"))


def test_odd_things_are_noted(tmp_path: Path) -> None:
    path = write(tmp_path, "a 1 2 3 4\nb 4 1 2\na 1 2 3 4\na 2 1 3 4\n")
    assert read(path).notes == [
        f"2 lines of users who have one already (1 with the same items; the first: user a, {path}:3, before it "
        f"{path}:1): each line counts as a user of its own",
        "1 user with a single item to learn from",
    ]


def test_unsorted_times_are_sorted_and_noted(tmp_path: Path) -> None:
    path = write(tmp_path, INTER + "a\t1\t3\nb\t1\t9\na\t2\t1\na\t3\t2\na\t4\t8\nb\t2\t9\nb\t3\t10\n", "a.inter")
    file = SequenceFile(path)
    assert [user.items for user in file] == [[2, 3, 1, 4], [1, 2, 3]]
    note = (
        "a.inter is not in the order of time, and was sorted; interactions older than the one before them of the same "
        f"user: 1 (the first: {path}:4)"
    )
    list(file)
    assert file.notes == [note]  # once, however often it is read
    assert note in read(path).notes
    in_order = write(tmp_path, INTER + "a\t2\t1\na\t3\t2\na\t1\t3\na\t4\t3\n", "b.inter")
    assert read(in_order).notes == []


def test_text_ids(tmp_path: Path) -> None:
    data = read(write(tmp_path, "u b a c\nv a b c d\n"), id_type=str)
    assert data.item_ids == ["a", "b", "c", "d"]
    assert [sequence.tolist() for sequence in data.sequences] == [[1], [0, 1]]


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_description() -> None:
    data = leave_one_out(users_of([1, 1, 2, 1], [2, 1, 3]))
    assert describe(data) == [
        "users         2: 3.5 items each (from 3 to 4; quartiles 3.25, 3.5, 3.75)",
        "items         3",
        "interactions  7: 117 per cent of users times items; 20 per cent repeat the item just before",
        "split         leave-one-out: 3 items of 2 users to learn from, 2 to validate on, 2 to test on",
        "seen          50 per cent of the test targets stand in their own history",
        "cold          1 item in held-out places only, of which nothing is learned: 0 of the validation targets, 1 of "
        "the test targets",
        "note          1 user with a single item to learn from",
    ]


def test_the_real_files_are_sound(dataset: Callable[[str], Path]) -> None:
    for name, cold, targets in (("adrec-ml-100k", 0, 0), ("amazon-office", 13, 66)):
        data = read(dataset(name) / "sequences.txt")
        assert data.notes == []
        assert len(data.cold_items) == cold
        assert sum(one.target in data.cold_items for one in data.test) == targets


# --- arrays of examples -----------------------------------------------------------------------------------------------


def test_windows() -> None:
    sequences = [np.array([5, 6, 7, 8]), np.array([9]), np.array([], dtype=np.int64)]
    table, lengths = windows(sequences, 3, 0, "left")
    assert table.tolist() == [[6, 7, 8], [0, 0, 9], [0, 0, 0]]
    assert lengths.tolist() == [3, 1, 0]
    assert windows(sequences, 3, -1, "right")[0].tolist() == [[6, 7, 8], [9, -1, -1], [-1, -1, -1]]


def test_prefixes() -> None:
    sequences = [np.array([5, 6, 7]), np.array([9])]
    assert [(before.tolist(), item) for before, item in prefixes(sequences)] == [([5], 6), ([5, 6], 7)]
    assert [(before.tolist(), item) for before, item in prefixes(sequences, 0)][-1] == ([], 9)
    assert [item for _, item in prefixes(sequences, 2)] == [7]
