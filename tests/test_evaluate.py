"""`evaluate()`: what it asks of the engine, what it says, and the numbers of the authors' trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint import convert
from fastdiff.data import Instance, LeaveOneOut, SequenceFile, UserSequence
from fastdiff.engine import Engine
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.evaluate import evaluate
from fastdiff.loading import from_pretrained
from fastdiff.metrics import RankingMetrics
from tests.builders import METHODS, small_engine


def instances(n: int, n_items: int = 40, first: int = 1) -> list[Instance]:
    """Users with 0 to 4 items; many share the empty history."""
    rows = []
    for user in range(n):
        history: list[Any] = [first + (7 * user + 3 * j) % n_items for j in range(user % 5)]
        rows.append(Instance(str(user), history, first + (11 * user + 5) % n_items, f"file:{user + 1}"))
    return rows


class Recorder:
    """An engine that keeps what it was asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.calls = engine, list[dict[str, Any]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, histories: Any, **arguments: Any) -> Any:
        self.calls.append({"histories": histories, **arguments})
        return self._engine.generate(histories, **arguments)


def recorded(engine: Engine, rows: Iterable[Instance], **arguments: Any) -> tuple[Any, list[dict[str, Any]]]:
    recorder: Any = Recorder(engine)
    return evaluate(recorder, rows, show_progress=False, **arguments), recorder.calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranking", ["published", "clean"])
def test_metrics_are_those_of_the_lists(method: str, ranking: str) -> None:
    engine = small_engine(method)
    rows = instances(23, first=engine.config.first_item_row)
    result = evaluate(engine, rows, ranking, top_ks=(2, 20), seed=5, show_progress=False)
    output = engine.generate([row.history for row in rows], top_k=20, seed=5, request_ids=range(23), ranking=ranking)
    expected = RankingMetrics((2, 20), engine.catalog.item_ids)
    expected.update(output.item_ids, [row.target for row in rows])
    assert result.metrics == expected.compute()
    assert result.standard_errors == expected.standard_errors()
    assert (result.users, result.skipped, result.seed, result.batch_size) == (23, 0, 5, 256)
    assert set(result.timings) == {"prepare", "encode", "denoise", "rank"}
    assert result.histories_per_second == result.users / result.seconds > 0
    assert result.items == len({item for one in rows for item in (*one.history, one.target)})


def test_the_batch_size_does_not_matter() -> None:
    results = [
        evaluate(small_engine("adrec"), instances(23), batch_size=size, top_ks=(3,), show_progress=False).metrics
        for size in (1, 7, 256)
    ]
    assert results[0] == results[1] == results[2]


def test_the_average_over_batches() -> None:
    data = instances(23)
    parts = [
        evaluate(small_engine("adrec"), data[i : i + 7], top_ks=(3,), show_progress=False).metrics["HR@3"]
        for i in range(0, 23, 7)
    ]
    result = evaluate(small_engine("adrec"), data, batch_size=7, top_ks=(3,), show_progress=False, average="batches")
    assert result.metrics["HR@3"] == pytest.approx(sum(parts) / 4)
    assert result.average == "batches"
    assert result.policy[-1] == "average: over batches of 7 users in file order, the last one of 2"


def test_users_are_numbered_in_the_noise() -> None:
    _, calls = recorded(small_engine("tarec"), instances(7), batch_size=3)
    assert [list(call["request_ids"]) for call in calls] == [[0, 1, 2], [3, 4, 5], [6]]
    assert {call["seed"] for call in calls} == {0}
    assert {call["top_k"] for call in calls} == {20}


def test_coupled_models_run_in_the_authors_batches() -> None:
    engine = small_engine("cddrec", batch_coupling="published")
    result, calls = recorded(engine, instances(130))
    assert [len(call["histories"]) for call in calls] == [128, 2]
    assert result.policy[-1] == (
        "batches: 128 users in file order attend to one another, the last batch is short (the authors' batches)"
    )
    result, calls = recorded(engine, instances(5), batch_size=4)
    assert [len(call["histories"]) for call in calls] == [4, 1]
    assert result.policy[-1].endswith("(the authors' are 128)")


def test_sampling_arguments_reach_the_engine() -> None:
    _, calls = recorded(small_engine("adrec"), instances(3), scheduler="ddim", num_inference_steps=4, eta=0.5)
    assert (calls[0]["scheduler"], calls[0]["num_inference_steps"], calls[0]["eta"]) == ("ddim", 4, 0.5)
    assert calls[0]["filter_seen"] is None


@pytest.mark.parametrize(
    ("method", "arguments", "lines"),
    [
        (
            "adrec",
            {},
            [
                "ranking: published, as the authors rank (candidates: all 51 rows of the item table, [PAD] included)",
                "seen items: ranked like all others",
            ],
        ),
        (
            "cddrec",
            {},
            [
                "ranking: published, as the authors rank "
                "(candidates: all 52 rows of the item table, [PAD], [MASK] included)",
                "seen items: scores set to 0, still ranked",
            ],
        ),
        (
            "adrec",
            {"ranking": "clean"},
            ["ranking: clean (candidates: the 50 items of the catalogue)", "seen items: left out"],
        ),
        (
            "adrec",
            {"ranking": "clean", "filter_seen": False},
            ["ranking: clean (candidates: the 50 items of the catalogue)", "seen items: ranked like all others"],
        ),
    ],
)
def test_the_policy_in_words(method: str, arguments: dict[str, Any], lines: list[str]) -> None:
    rows = [row for row in instances(6) if row.target not in row.history]
    result = evaluate(small_engine(method), rows, seed=3, show_progress=False, **arguments)
    assert result.policy == [*lines, "noise: seed 3, one stream per user (the user's number)"]


def test_targets_that_filtering_makes_unreachable_are_counted() -> None:
    rows = [Instance("a", [1, 2], 2, "f:1"), Instance("b", [1, 2], 3, "f:2")]
    line = "targets that are seen items, and so can never be hit: 1"
    engine = small_engine("adrec")
    assert line in evaluate(engine, rows, "clean", show_progress=False).policy
    assert line not in evaluate(engine, rows, "clean", filter_seen=False, show_progress=False).policy
    assert line not in evaluate(engine, rows, "published", show_progress=False).policy


def test_targets_that_are_no_items() -> None:
    for ranking in ("published", "clean"):
        for ids, target in ((None, 99), (None, "1"), (None, True), (None, 1 << 70), ([f"i{j}" for j in range(50)], 3)):
            engine = small_engine("adrec", item_ids=ids)
            rows = [Instance("a", [], engine.catalog.item_ids[0], "f:1"), Instance("b", [], target, "f:2")]
            with pytest.raises(
                DataError, match=rf"^f:2: the target {target!r} is not in the catalogue, which has .*50"
            ):
                evaluate(engine, rows, ranking, show_progress=False)
    engine = small_engine("adrec")
    engine.catalog = engine.catalog.remove([7])
    with pytest.raises(DataError, match="the target 7 is not in the catalogue"):
        evaluate(engine, [Instance("a", [], 7, "f:1")], "clean", show_progress=False)


def test_special_rows_as_targets() -> None:
    """The published ranking of CDDRec shows rows 0 and 51 by their number; no other ranking shows them."""
    engine = small_engine("cddrec")
    rows = [Instance("a", [1], 0, "f:1"), Instance("b", [2], 51, "f:2"), Instance("c", [3], 4, "f:3")]
    result = evaluate(engine, rows, top_ks=(52,), show_progress=False)
    assert result.metrics["HR@52"] == 1.0
    assert not any("no candidates" in line for line in result.policy)
    with pytest.raises(DataError, match=r"^f:2: the target 51 is not in the catalogue, which has ids 1\.\.50;"):
        evaluate(engine, rows, "clean", show_progress=False)
    result = evaluate(engine, [rows[0], rows[2]], "clean", top_ks=(52,), show_progress=False)
    assert result.metrics["HR@52"] == 0.5
    assert "targets that are no candidates (the pad id, 0), and so can never be hit: 1" in result.policy
    engine = small_engine("cddrec", item_ids=list(range(100, 150)))
    result = evaluate(engine, [Instance("a", [], 0, "f:1"), Instance("b", [], 100, "f:2")], show_progress=False)
    assert (
        "targets that are no candidates (rows without an id, added items), and so can never be hit: 1" in result.policy
    )


def test_targets_among_added_and_removed_items() -> None:
    engine = small_engine("adrec")
    engine.catalog = engine.catalog.add([51], torch.randn(1, 16)).remove([5])
    rows = [Instance("a", [51], 51, "f:1"), Instance("b", [], 5, "f:2")]
    result = evaluate(engine, rows, top_ks=(51,), show_progress=False)
    assert result.metrics["HR@51"] == 0.5
    assert (
        "targets that are no candidates (rows without an id, added items), and so can never be hit: 1" in result.policy
    )
    result = evaluate(engine, [Instance("a", [], 51, "f:1")], "clean", top_ks=(51,), show_progress=False)
    assert result.metrics["HR@51"] == 1.0


def test_skipped_users_and_a_limit() -> None:
    rows = [UserSequence(str(i), [1 + i] * (1 + i % 3), f"f:{i}") for i in range(9)]
    engine = small_engine("tarec")
    result = evaluate(engine, LeaveOneOut(rows), show_progress=False)
    assert (result.users, result.skipped) == (6, 3)
    assert evaluate(engine, LeaveOneOut(rows), limit=2, show_progress=False).users == 2
    assert evaluate(engine, instances(9), limit=100, show_progress=False).users == 9


def test_text_ids() -> None:
    names = [f"item-{i}" for i in range(50)]
    rows = [Instance("a", ["item-3"], "item-4", "f:1"), Instance("b", [], "item-9", "f:2")]
    result = evaluate(small_engine("adrec", item_ids=names), rows, top_ks=(51,), show_progress=False)
    assert result.metrics["HR@51"] == result.metrics["coverage@51"] == 1.0


def test_progress_is_shown_on_stderr_of_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(small_engine("tarec"), instances(3))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_what_cannot_be_evaluated() -> None:
    engine = small_engine("tarec")
    with pytest.raises(DataError, match=r"no instance to rank for \(0 users skipped"):
        evaluate(engine, [], show_progress=False)
    with pytest.raises(DataError, match=r"no instance to rank for \(1 users skipped for too few items\)"):
        evaluate(engine, LeaveOneOut([UserSequence("a", [1], "f:1")]), show_progress=False)
    with pytest.raises(DataError, match=r"^f:7: item id 99 is not in the catalogue, which has ids 0\.\.49"):
        evaluate(engine, [Instance("a", [1, 99], 2, "f:7")], show_progress=False)
    for arguments in ({"batch_size": 0}, {"batch_size": 2.0}, {"limit": 0}, {"limit": True}):
        with pytest.raises(InvalidArgument, match=f"{next(iter(arguments))} must be an int of at least 1"):
            evaluate(engine, instances(2), show_progress=False, **arguments)
    with pytest.raises(InvalidArgument, match=r"average must be one of 'users', 'batches' \(got 'rows'\)"):
        evaluate(engine, instances(2), average="rows", show_progress=False)
    with pytest.raises(InvalidArgument, match=r'average="batches" depends on the batch_size, which is not given'):
        evaluate(engine, instances(2), average="batches", show_progress=False)
    for top_ks in (5, None, "5", {5}, (), (0,), (True,)):
        with pytest.raises(InvalidArgument, match=r"top_ks must be .*ints of at least 1"):
            evaluate(engine, instances(2), top_ks=top_ks, show_progress=False)  # type: ignore[arg-type]
    for name, message in (
        ("top_k", "it is the largest of top_ks"),
        ("request_ids", "they are the users' numbers"),
        ("histories", "they are read from the instances"),
        ("noise", "it holds one entry per user of one batch; give a seed"),
        ("user_exclude_items", "give exclude_items"),
        ("user_candidate_items", "give candidate_items"),
    ):
        with pytest.raises(InvalidArgument, match=f"^evaluate: {name} cannot be given: .*{message}"):
            evaluate(engine, instances(2), show_progress=False, **{name: [1]})
    with pytest.raises(InvalidArgument, match="excludes filter_seen"):
        evaluate(engine, instances(2), "published", filter_seen=True, show_progress=False)


@pytest.mark.golden
def test_the_trained_adrec_reaches_its_authors_numbers(
    golden: Callable[..., dict[str, Any]], dataset: Callable[[str], Path], tmp_path: Path
) -> None:
    """The authors' code gives HR@20 22.28 % and NDCG@20 8.42 %; the noise differs, so a few users may."""
    record = golden("adrec_ml100k")
    convert("adrec", record["weights_file"], record["args_file"], tmp_path / "model")
    engine = from_pretrained(tmp_path / "model")
    data = LeaveOneOut(SequenceFile(dataset("adrec-ml-100k") / "sequences.txt"))
    with torch.inference_mode():
        result = evaluate(engine, data, show_progress=False)
    assert (result.users, result.skipped) == (938, 0)
    assert result.metrics["HR@20"] == pytest.approx(0.2228, abs=0.01)
    assert result.metrics["NDCG@20"] == pytest.approx(0.0842, abs=0.004)
    with torch.inference_mode():
        printed = evaluate(engine, data, batch_size=512, average="batches", show_progress=False)
    # their log has 22.4 and 8.55: the same users, of whom the last 426 weigh as much as the first 512
    assert printed.metrics["HR@20"] - result.metrics["HR@20"] == pytest.approx(0.0016, abs=0.0004)
    assert printed.metrics["NDCG@20"] - result.metrics["NDCG@20"] == pytest.approx(0.0013, abs=0.0004)
