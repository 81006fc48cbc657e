"""Calls that are captured and replayed, on the CPU with stand-ins for CUDA graphs; `test_cuda.py` has the real ones."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import graphs as graphs_module
from fastdiff.engine import Engine
from fastdiff.errors import BackendUnavailable, InvalidArgument
from fastdiff.graph_inputs import MOST_NUMBERS, MOST_SLOTS, MOST_USERS, Bucket
from fastdiff.graphs import Graphs, why_off
from fastdiff.ops.backend import why_not
from fastdiff.ops.score_topk import score_topk
from fastdiff.output import GenerateOutput
from tests.builders import METHODS, first_id, small_engine
from tests.recorders import Reruns, Tapes

CPU = torch.device("cpu")
WAITING = [backend for backend in score_topk.available(CPU) if backend != "triton"]
TRITON = pytest.param("triton", marks=pytest.mark.skipif(why_not("triton", CPU) is not None, reason="not interpreted"))
FIRST = "the first of its sizes"
HISTORIES = [[3, 7, 7, 20], [], [5], list(range(10, 22)), [1, 2, 3, 4, 5, 6, 7, 8]]
"""Against a window of 8: some shorter, one cold, one longer, one as long."""


def with_graphs(engine: Engine, make_recorder: Callable[[torch.device], Any] = Reruns, **bounds: int) -> Engine:
    engine.graphs = Graphs(engine.device, None, make_recorder, **bounds)
    engine.graphs.renew(engine.catalog)
    return engine


def same(got: GenerateOutput, expected: GenerateOutput) -> bool:
    pairs = [(got.scores, expected.scores), (got.num_valid, expected.num_valid)]
    if expected.embeddings is not None:
        assert got.embeddings is not None
        pairs.append((got.embeddings, expected.embeddings))
    same_ids = got.item_ids.tolist() == expected.item_ids.tolist()
    return same_ids and got.seed == expected.seed and all(torch.equal(ours, theirs) for ours, theirs in pairs)


def agree(got: GenerateOutput, expected: GenerateOutput, exactly: bool) -> bool:
    """A row's result is the same bits in any batch on backend 'cpu' alone."""
    if exactly:
        return same(got, expected)
    return got.scores.shape == expected.scores.shape and torch.allclose(got.scores, expected.scores, 1e-4, 1e-5)


# --- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", WAITING)
@pytest.mark.parametrize("method", METHODS)
def test_a_replay_is_the_call(method: str, backend: str) -> None:
    """At the edges of buckets; the first call of a size, the one that is captured, and the replays."""
    engine, plain = with_graphs(small_engine(method, backend=backend)), small_engine(method, backend=backend)
    low = first_id(engine)
    draws = torch.Generator().manual_seed(1)
    for n_users in (1, 2, 3, 4, 5, 6, 7, 13):
        for longest in (0, 1, 8, 9, 16, 17, 33):
            histories = []
            for user in range(n_users):
                length = longest if user == 0 else int(torch.randint(0, longest + 1, (1,), generator=draws))
                histories.append((torch.randint(0, 50, (length,), generator=draws) + low).tolist())
            for seed in (1, 2, 3):
                asked: dict[str, Any] = {"top_k": 7, "seed": seed, "output_embeddings": True}
                got, expected = engine.generate(histories, **asked), plain.generate(histories, **asked)
                assert agree(got, expected, exactly=backend == "cpu"), (n_users, longest, seed)
                histories.reverse()
    calls = engine.graphs.calls
    assert set(calls) == {FIRST, "captured", "replayed"}
    assert calls[FIRST] == calls["captured"] == len(engine.graphs)
    assert calls["replayed"] > calls["captured"]


@pytest.mark.parametrize("backend", WAITING)
def test_all_three_kinds_of_call_give_the_same_bits(backend: str) -> None:
    engine = with_graphs(small_engine("adrec", backend=backend))
    first, captured, replayed = (engine.generate(HISTORIES, seed=3, output_embeddings=True) for _ in range(3))
    assert engine.graphs.calls == {FIRST: 1, "captured": 1, "replayed": 1}
    assert same(captured, first)
    assert same(replayed, first)
    assert set(replayed.timings) == {"prepare", "graph"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_samples": 3},
        {"num_samples": 2, "aggregation": "mean"},
        {"guidance_scale": 2.5},
        {"guidance_scale": 2.5, "num_samples": 2, "filter_seen": False},
        {"scheduler": "closed_form"},
        {"scheduler": "closed_form", "guidance_scale": 1.7, "num_samples": 2},
        {"num_inference_steps": 3},
        {"scheduler": "ddim", "num_inference_steps": 4, "eta": 0.5},
        {"request_ids": [5, -1, 1 << 63, 7, 8]},
        {"seed": -1},
        {"seed": (1 << 64) - 1},
    ],
)
def test_what_a_call_may_ask_for(arguments: dict[str, Any]) -> None:
    engine, plain = with_graphs(small_engine("dreamrec")), small_engine("dreamrec")
    for seed in (4, 4, 9, 10):
        asked = {"seed": seed, "top_k": 6, "output_embeddings": True} | arguments
        assert agree(engine.generate(HISTORIES, **asked), plain.generate(HISTORIES, **asked), "cpu" in WAITING)
    assert engine.graphs.calls == {FIRST: 1, "captured": 1, "replayed": 2}


def test_ids_that_are_strings_and_calls_with_other_settings() -> None:
    names = [f"item-{row}" for row in range(50)]
    engine, plain = (small_engine("dimerec", item_ids=names) for _ in range(2))
    with_graphs(engine)
    for _ in range(3):
        for top_k in (1, 60):  # more than there are items
            for histories in ([["item-3", "item-4"], []], [["item-5"], ["item-6"] * 12]):
                got, expected = (each.generate(histories, top_k=top_k, seed=1) for each in (engine, plain))
                assert got.item_ids.tolist() == expected.item_ids.tolist()
                assert agree(got, expected, "cpu" in WAITING)
    assert len(engine.graphs) == 4


def test_calls_that_differ_in_one_thing_share_no_graph() -> None:
    engine, plain = with_graphs(small_engine("dreamrec")), small_engine("dreamrec")
    base: dict[str, Any] = {
        "top_k": 5,
        "num_samples": 2,
        "aggregation": "max",
        "filter_seen": True,
        "scheduler": "ddpm",
    }
    changes: list[dict[str, Any]] = [
        {},
        {"filter_seen": False},
        {"scheduler": "closed_form"},
        {"scheduler": "ddim"},
        {"aggregation": "mean"},
        {"num_samples": 3},
        {"guidance_scale": 3.0},
        {"top_k": 6},
    ]
    histories = [[3, 7, 7, 20], [], [5]]  # all within the window: the same bucket, whatever is filtered
    for seed in (1, 2, 3):
        for change in changes:
            asked = base | change | {"seed": seed, "output_embeddings": True}
            assert agree(engine.generate(histories, **asked), plain.generate(histories, **asked), "cpu" in WAITING)
    count = len(changes)
    assert engine.graphs.calls == {FIRST: count, "captured": count, "replayed": count}


def test_a_seed_is_drawn_once() -> None:
    engine, plain = with_graphs(small_engine("tarec")), small_engine("tarec")
    for histories in ([[3, 4]], [[3, 4]], [[3, 4]], [[1]] * (MOST_USERS + 1)):
        seeds = []
        for each in (engine, plain):
            torch.manual_seed(11)
            seeds += [each.generate(histories, top_k=2).seed, each.generate([[1]], top_k=2).seed]
        assert seeds[:2] == seeds[2:]


def test_an_output_is_the_callers_own() -> None:
    engine = with_graphs(small_engine("adrec"))
    outputs = [engine.generate(HISTORIES, seed=seed, output_embeddings=True) for seed in range(5)]
    again = [engine.generate(HISTORIES, seed=seed, output_embeddings=True) for seed in range(5)]
    assert engine.graphs.calls["replayed"] == 8
    assert all(same(one, other) for one, other in zip(outputs, again, strict=True))
    assert not same(outputs[3], again[4])


def test_calls_inside_and_outside_of_inference_mode() -> None:
    engine = with_graphs(small_engine("dreamrec"))
    with torch.inference_mode():
        expected = [engine.generate(HISTORIES, seed=1) for _ in range(2)]
    got = engine.generate(HISTORIES, seed=1)
    assert engine.graphs.calls["replayed"] == 1
    assert same(got, expected[0])
    assert not got.scores.is_inference()
    with torch.inference_mode():
        assert same(engine.generate(HISTORIES, seed=1), got)


def test_batches_of_many_histories() -> None:
    engine, plain = with_graphs(small_engine("cddrec")), small_engine("cddrec")
    histories = [[1 + number % 50] * (number % 13) for number in range(43)]
    got, expected = (list(each.generate_batches(histories, batch_size=8, seed=5)) for each in (engine, plain))
    assert all(agree(one, other, "cpu" in WAITING) for one, other in zip(got, expected, strict=True))
    assert engine.graphs.calls["replayed"] > 0


# --- what is not captured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "histories", "arguments"),
    [
        ("no histories", [], {}),
        ("callback_on_step_end or show_progress", HISTORIES, {"callback_on_step_end": lambda step, t, x: None}),
        ("noise or generator", HISTORIES, {"noise": torch.zeros(5, 16)}),
        ("noise or generator", HISTORIES, {"generator": torch.Generator().manual_seed(0), "seed": None}),
        ("lists of items", HISTORIES, {"exclude_items": [5]}),
        ("lists of items", HISTORIES, {"user_candidate_items": [[5]] * 5}),
        ("ranking='published'", HISTORIES, {"ranking": "published"}),
        ("too many histories, or too long ones", [[1]] * (MOST_USERS + 1), {"top_k": 1}),
        ("too many histories, or too long ones", [[1, 2] * MOST_SLOTS], {}),
    ],
)
def test_other_calls_say_why(reason: str, histories: list[list[int]], arguments: dict[str, Any]) -> None:
    engine, plain = with_graphs(small_engine("dreamrec")), small_engine("dreamrec")
    asked = {"seed": 1} | arguments
    expected = plain.generate(histories, **asked)
    if "generator" in arguments:
        asked["generator"] = torch.Generator().manual_seed(0)
    for times in (1, 2):
        got = engine.generate(histories, **asked)
        assert times == 2 or same(got, expected)
        assert engine.graphs.calls == {reason: times}
        asked.pop("generator", None)
        if "generator" in arguments:
            break


def test_users_that_attend_to_each_other_are_never_padded() -> None:
    engine = with_graphs(small_engine("cddrec", batch_coupling="published"))
    plain = small_engine("cddrec", batch_coupling="published")
    for _ in range(3):
        assert same(engine.generate(HISTORIES[:3], seed=1), plain.generate(HISTORIES[:3], seed=1))
    assert engine.graphs.calls == {"users attend to each other, so none may be added": 3}


def test_wrong_arguments_are_refused_as_ever() -> None:
    engine = with_graphs(small_engine("dreamrec"))
    for _ in range(3):
        with pytest.raises(InvalidArgument, match="request_ids must hold one integer per history"):
            engine.generate(HISTORIES, request_ids=[1, 2])
        with pytest.raises(InvalidArgument, match="seed must be an integer"):
            engine.generate(HISTORIES, seed=1 << 64)
        with pytest.raises(InvalidArgument, match="holds item id 99"):
            engine.generate([[99]])
    assert engine.graphs.calls == {}


# --- snapshots, threads and bounds ------------------------------------------------------------------------------------


def test_a_new_catalogue_has_graphs_of_its_own() -> None:
    engine, plain = with_graphs(small_engine("dreamrec")), small_engine("dreamrec")
    best = first_id(engine) + 30
    for scale in (1.0, 100.0, -100.0):
        for each in (engine, plain):
            vector = torch.full((1, 16), scale)
            each.catalog = each.catalog.update([best], vector).add([1000 + int(scale)], vector)
        for _ in range(3):
            got, expected = (each.generate(HISTORIES, top_k=50, seed=2) for each in (engine, plain))
            assert agree(got, expected, "cpu" in WAITING)
        assert len(engine.graphs) == 1
    assert engine.graphs.calls == {FIRST: 3, "captured": 3, "replayed": 3}


def test_graphs_keep_no_old_snapshot_alive() -> None:
    engine = with_graphs(small_engine("dreamrec"))
    engine.catalog = engine.catalog.update([4], torch.ones(1, 16))
    for _ in range(3):
        engine.generate(HISTORIES, seed=1)
    old = weakref.ref(engine.catalog)
    assert len(engine.graphs) == 1
    engine.catalog = engine.catalog.update([4], torch.zeros(1, 16))
    gc.collect()
    assert old() is None
    assert len(engine.graphs) == 0
    assert engine.graphs.n_bytes == 0


def test_a_call_that_began_before_the_catalogue_changed_captures_nothing() -> None:
    engine = with_graphs(small_engine("dreamrec"))
    expected = engine.generate(HISTORIES, seed=1)
    before, after = engine.catalog, engine.catalog.update([4], torch.ones(1, 16))
    engine.graphs.renew(after)  # as the setter does, while a call holds the snapshot before
    assert engine.catalog is before
    for _ in range(3):
        assert same(engine.generate(HISTORIES, seed=1), expected)
    assert engine.graphs.calls == {FIRST: 1, "an older catalogue": 3}
    assert len(engine.graphs) == 0


@pytest.mark.parametrize("method", ["adrec", "dreamrec"])
def test_many_threads(method: str) -> None:
    engine, plain = with_graphs(small_engine(method), most_graphs=3, patience=20), small_engine(method)
    low = first_id(engine)
    cases = [([[low + user + case] * (case % 11) for user in range(1 + case % 5)], case) for case in range(24)]
    expected = [plain.generate(histories, seed=seed) for histories, seed in cases]
    gate = threading.Barrier(6)

    def work(number: int) -> list[bool]:
        torch.set_num_threads(1)
        gate.wait()
        return [
            agree(engine.generate(histories, seed=seed), expected[seed], "cpu" in WAITING)
            for histories, seed in cases[number:] + cases[:number] + cases
        ]

    with ThreadPoolExecutor(6) as pool:
        assert all(all(right) for right in pool.map(work, range(6)))
    calls = engine.graphs.calls
    assert sum(calls.values()) == 6 * 2 * len(cases)
    assert calls["replayed"] > 0
    assert len(engine.graphs) <= 3


def test_graphs_are_dropped_together_and_not_too_often() -> None:
    engine = with_graphs(small_engine("tarec"), most_graphs=2, patience=10)
    recorder = Reruns(engine.device)
    engine.graphs._make_recorder = lambda device: recorder

    def ask(n_users: int) -> None:
        engine.generate([[1]] * n_users, seed=1)

    for n_users in (1, 1, 2, 2, 3, 3, 1, 2):
        ask(n_users)
    # the first time that they are full, they are dropped at once; 2 finds 3 and 1 there
    assert engine.graphs.calls == {FIRST: 3, "captured": 4, "no room for another graph": 1}
    assert recorder.n_drops == 1
    for _ in range(7):
        ask(1)
    assert engine.graphs.calls == {FIRST: 3, "captured": 4, "no room for another graph": 1, "replayed": 7}
    ask(2)
    assert recorder.n_drops == 2
    assert len(engine.graphs) == 1
    assert engine.graphs.calls["captured"] == 5


def test_no_graph_is_captured_where_they_hold_too_many_bytes() -> None:
    engine = with_graphs(small_engine("tarec"), most_bytes=1, patience=1000)
    for n_users in (1, 1, 1, 2, 2, 2):
        engine.generate([[1]] * n_users, seed=1)
    assert engine.graphs.n_bytes > 1
    engine.generate([[1]], seed=1)
    engine.generate([[1]], seed=1)
    assert len(engine.graphs) == 1
    assert engine.graphs.calls["no room for another graph"] == 2


def test_plans_that_come_and_go_are_captured_only_where_they_come_again() -> None:
    engine = with_graphs(small_engine("adrec"))
    for _ in range(20):
        engine.generate(HISTORIES, scheduler=engine.model.plan("ddpm", 3), seed=1)
    assert engine.graphs.calls == {FIRST: 20}
    plan = engine.model.plan("ddpm", 3)
    expected = engine.generate(HISTORIES, scheduler=plan, seed=1)
    for _ in range(3):
        assert same(engine.generate(HISTORIES, scheduler=plan, seed=1), expected)
    assert engine.graphs.calls == {FIRST: 21, "captured": 1, "replayed": 2}


# --- turning them on --------------------------------------------------------------------------------------------------


def test_a_cpu_has_none() -> None:
    engine = small_engine("tarec")
    assert engine.graphs.why_off == "they need a CUDA device (got cpu)"
    assert repr(engine.graphs) == "Graphs(off: they need a CUDA device (got cpu))"
    engine.generate([[1]])
    assert engine.graphs.calls == {}
    parts = engine.model, engine.catalog, engine.generation_config
    assert Engine(*parts, cuda_graphs=False).graphs.why_off == "cuda_graphs=False"
    with pytest.raises(BackendUnavailable, match=r"cuda_graphs: True was asked for, and they need a CUDA device"):
        Engine(*parts, cuda_graphs=True)
    with pytest.raises(InvalidArgument, match="cuda_graphs: must be True, False or 'auto'"):
        Engine(*parts, cuda_graphs="on")
    copied = copy.copy(Engine(*parts, cuda_graphs=False))
    assert copied.graphs.why_off == "cuda_graphs=False"


def test_where_graphs_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, kernels, mixed = torch.device("cuda:0"), {"a": "triton"}, {"a": "triton", "b": "torch"}
    assert why_off(True, gpu, kernels) is None
    assert "'auto' leaves them off" in str(why_off("auto", gpu, kernels))
    assert why_off("auto", gpu, mixed) == "only ops on triton can be captured (got b=torch)"
    with pytest.raises(BackendUnavailable, match="only ops on triton can be captured"):
        why_off(True, gpu, mixed)
    monkeypatch.setattr(graphs_module, "AUTO", True)
    assert why_off("auto", gpu, kernels) is None
    assert why_off(False, gpu, kernels) == "cuda_graphs=False"


def test_what_is_shown() -> None:
    engine = with_graphs(small_engine("tarec"))
    assert repr(engine.graphs) == "Graphs(0 graphs, 0 MiB)"
    for _ in range(3):
        engine.generate([[1]])
    assert repr(engine.graphs) == f"Graphs(1 graphs, 0 MiB, captured: 1, replayed: 1, {FIRST}: 1)"


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_buckets() -> None:
    users = [Bucket.of(n, 1, 50).users for n in range(1, 14)]
    assert users == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    slots = [Bucket.of(1, longest, 50).slots for longest in (0, 1, 16, 17, 32, 33, 50, 51, 64, 65)]
    assert slots == [16, 16, 16, 32, 32, 50, 50, 64, 64, 128]
    assert Bucket.of(1, 0, 8) == (1, 8)
    for n_users in range(1, 2 * MOST_USERS):
        bucket = Bucket.of(n_users, 1, 50)
        assert n_users <= bucket.users < 1.5 * n_users + 1
        assert 3 * (bucket.users - n_users) <= bucket.users or n_users == 1
        assert bucket.fits == (bucket.users <= MOST_USERS)
        assert not bucket.fits or bucket.numbers <= MOST_NUMBERS
    assert Bucket(1, MOST_SLOTS).fits
    assert Bucket(1, MOST_SLOTS).numbers <= MOST_NUMBERS
    assert not Bucket(2, MOST_SLOTS).fits
    assert Bucket(MOST_USERS, 32).numbers == MOST_NUMBERS - 4 * 16 + 16


# --- all that a graph knows -------------------------------------------------------------------------------------------


def taped(method: str, **changes: Any) -> Engine:
    return with_graphs(small_engine(method, backend="triton", **changes), Tapes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", [TRITON])
def test_kernels_replayed_without_python(method: str, backend: str) -> None:
    """What is recorded holds nothing of the call with which it was recorded."""
    engine, plain = taped(method), small_engine(method, backend=backend)
    low, asked = first_id(engine), {"top_k": 5, "num_inference_steps": 2, "output_embeddings": True}
    for histories, seed in (
        ([[low + 3, low + 4], []], 1),
        ([[low + 9], [low + 1] * 7], 2),
        ([[low + 9, low + 3, low + 4], [low + 1] * 8], 3),
        ([[], [low + 2]], (1 << 63) + 5),
    ):
        got, expected = (each.generate(histories, seed=seed, **asked) for each in (engine, plain))
        assert got.item_ids.tolist() == expected.item_ids.tolist()
        assert agree(got, expected, exactly=False)
    assert engine.graphs.calls == {FIRST: 1, "captured": 1, "replayed": 2}


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("dreamrec", {"num_samples": 2, "guidance_scale": 2.0}),
        ("dreamrec", {"scheduler": "closed_form"}),
        ("adrec", {"num_samples": 2, "aggregation": "mean", "guidance_scale": 1.5, "num_inference_steps": 2}),
        ("cddrec", {"num_inference_steps": 3}),
    ],
)
@pytest.mark.parametrize("backend", [TRITON])
def test_kernels_replayed_for_long_histories(method: str, arguments: dict[str, Any], backend: str) -> None:
    engine, plain = taped(method), small_engine(method, backend=backend)
    low = first_id(engine)
    for seed in (1, 2, 3):
        histories = [[low + (seed + place) % 50 for place in range(11 + seed)], [low + seed]]
        asked = {"top_k": 5, "seed": seed, "filter_seen": True, **arguments}
        got, expected = engine.generate(histories, **asked), plain.generate(histories, **asked)
        assert got.item_ids.tolist() == expected.item_ids.tolist()
        assert agree(got, expected, exactly=False)
    assert engine.graphs.calls == {FIRST: 1, "captured": 1, "replayed": 1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", [TRITON])
def test_what_a_graph_reads_is_kept_for_it(method: str, backend: str) -> None:
    """Whatever other calls do to what is kept for plans and sizes. It reads nothing that stays on the host."""
    engine = taped(method)
    low = first_id(engine)

    def ask(n_users: int, steps: int | None = None) -> Tensor:
        return engine.generate([[low + 3, low + 4]] * n_users, top_k=2, seed=1, num_inference_steps=steps).scores

    for _ in range(2):
        ask(1, 2)
    (kept,) = engine.graphs._kept.values()
    read = kept.recording.forget()  # type: ignore[attr-defined]
    assert len(read) > 5
    for on_host in (kept.pipeline.plan.coef, kept.pipeline.plan.timesteps):
        assert on_host.untyped_storage().data_ptr() not in read
    engine._make_plan.cache_clear()
    for steps in (1, 3):
        ask(2, steps)
    gc.collect()
    assert not any(reference.expired() for reference in read.values())
