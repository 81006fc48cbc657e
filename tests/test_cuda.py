"""What `generate()` promises on a CUDA device: it waits for nothing, honours streams, and says at the output what is
wrong. All here needs such a device; what the same code does on tensors of the CPU is tested in test_staging.py,
test_output.py and test_device_histories.py."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.graphs import waiting_is_an_error
from bench.weights import random_weights
from fastdiff.checkpoint import Checkpoint
from fastdiff.config import default_generation_config
from fastdiff.engine import Engine
from fastdiff.errors import InvalidArgument, InvalidHistory
from fastdiff.output import GenerateOutput
from tests.builders import METHODS, small_config, small_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

HISTORIES = [[3, 7, 7, 20], [], [5], list(range(10, 22)), [1, 2, 3, 4, 5, 6, 7, 8]]


def cuda_engine(
    method: str, item_ids: list[Any] | None = None, broken: bool = False, cuda_graphs: bool = False
) -> Engine:
    config = small_config(method)
    weights = random_weights(config, 0)
    if broken:
        weights = {
            name: weight if weight.shape[0] == config.n_rows else torch.full_like(weight, float("nan"))
            for name, weight in weights.items()
        }
    checkpoint = Checkpoint(config, default_generation_config(config, 1.0), weights, item_ids)
    return Engine.from_checkpoint(checkpoint, device="cuda", backend="triton", cuda_graphs=cuda_graphs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ids", ["rows", "integers", "strings"])
def test_a_call_waits_for_nothing_until_its_output_is_looked_at(method: str, ids: str) -> None:
    names: dict[str, Any] = {
        "rows": None,
        "integers": [500 - row for row in range(50)],
        "strings": [f"item-{row}" for row in range(50)],
    }
    engine = cuda_engine(method, names[ids])
    listed = list(engine.catalog.item_ids)
    histories = [[listed[item % 50] for item in history] for history in HISTORIES]
    for arguments in ({}, {"seed": 1}, {"seed": 1, "num_samples": 2}, {"seed": 1, "exclude_items": listed[:3]}):
        expected = engine.generate(histories, top_k=7, **arguments)  # makes what is kept
        assert expected.num_valid.tolist() == [7] * 5
        with waiting_is_an_error():
            output = engine.generate(histories, top_k=7, **arguments)
        if "seed" in arguments:
            assert output.item_ids.tolist() == expected.item_ids.tolist()
            assert torch.equal(output.scores, expected.scores)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("numbered", [True, False])
def test_histories_on_the_device_stay_there(method: str, numbered: bool) -> None:
    engine = cuda_engine(method, None if numbered else [500 - row for row in range(50)])
    listed = list(engine.catalog.item_ids)
    histories = [[listed[item % 50] for item in history] for history in HISTORIES]
    width = max(map(len, histories))
    for padded in (
        [history + [-1] * (width - len(history)) for history in histories],
        [[-1] * (width - len(history)) + history for history in histories],
    ):
        ids = torch.tensor(padded, device="cuda")
        expected = engine.generate(histories, top_k=7, seed=3)
        assert engine.generate(ids, top_k=7, seed=3).item_ids.tolist() == expected.item_ids.tolist()
        with waiting_is_an_error():
            output = engine.generate(ids, top_k=7, seed=3)
        assert output.item_ids.tolist() == expected.item_ids.tolist()
        torch.testing.assert_close(output.scores, expected.scores, rtol=1e-5, atol=1e-5)


def test_ids_that_are_none_are_an_error_of_the_output() -> None:
    engine = cuda_engine("dreamrec")
    ids = torch.tensor([[3, 7], [99120, -1]], device="cuda")
    engine.generate(ids[:1], seed=1)
    with waiting_is_an_error():
        output = engine.generate(ids, seed=1)
    for name in ("item_ids", "scores", "num_valid", "embeddings"):
        with pytest.raises(InvalidHistory, match=r"histories\[1\] holds item id 99120"):
            getattr(output, name)


@pytest.mark.parametrize("method", METHODS)
def test_a_cuda_engine_agrees_with_the_cpu(method: str) -> None:
    theirs = small_engine(method).generate(HISTORIES, top_k=7, seed=3, output_embeddings=True)
    ours = cuda_engine(method).generate(HISTORIES, top_k=7, seed=3, output_embeddings=True)
    assert ours.embeddings is not None
    assert theirs.embeddings is not None
    torch.testing.assert_close(ours.embeddings.cpu(), theirs.embeddings, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.scores.cpu(), theirs.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_call_runs_on_the_stream_that_is_current(method: str) -> None:
    engine = cuda_engine(method)
    expected = engine.generate(HISTORIES, top_k=7, seed=3).item_ids
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine.generate(HISTORIES, top_k=7, seed=3)  # takes its memory, which may last longer than the sleep below
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        output = engine.generate(HISTORIES, top_k=7, seed=3)
        assert not stream.query()  # the call is queued behind the sleep, and nothing elsewhere
        assert torch.cuda.default_stream().query()
        got = output.item_ids.tolist()
    assert got == expected.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_many_threads_each_on_its_stream(method: str) -> None:
    engines = [cuda_engine(method), cuda_engine(method)]
    expected = small_engine(method).generate(HISTORIES, top_k=5, seed=3).scores
    wrong: list[Any] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                scores = engines[number % 2].generate(HISTORIES, top_k=5, seed=3).scores.cpu()
                if not torch.allclose(scores, expected, rtol=1e-4, atol=1e-4):
                    wrong.append(scores)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_numbers_that_are_none_are_an_error_of_the_output() -> None:
    engine = cuda_engine("dreamrec", broken=True)
    output = engine.generate(HISTORIES, seed=1)
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="query must be finite"):
            output.scores  # noqa: B018


def test_memory_is_bounded() -> None:
    engine = cuda_engine("adrec")
    for _ in range(5):
        engine.generate(HISTORIES, seed=1).to_tuple()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(50):
        engine.generate(HISTORIES, seed=seed).to_tuple()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_timings_are_of_the_device() -> None:
    timings = cuda_engine("adrec").generate(HISTORIES, seed=1).timings
    assert set(timings) == {"prepare", "encode", "denoise", "rank"}
    assert all(seconds >= 0 for seconds in timings.values())


# --- CUDA graphs; test_graphs.py has what can be tested without them --------------------------------------------------


def unreplayed(engine: Engine, histories: list[list[int]], **asked: Any) -> GenerateOutput:
    """On the same padded tensors, kernel after kernel: a plan that comes for the first time is not captured."""
    before = engine.graphs.calls
    output = engine.generate(histories, scheduler=replace(engine.model.plan("ddpm", 3)), **asked)
    assert engine.graphs.calls["the first of its sizes"] == before.get("the first of its sizes", 0) + 1
    return output


def same(got: GenerateOutput, expected: GenerateOutput) -> bool:
    assert got.embeddings is not None
    assert expected.embeddings is not None
    pairs = ((got.item_ids, expected.item_ids), (got.scores, expected.scores), (got.embeddings, expected.embeddings))
    return all(torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)) for ours, theirs in pairs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arguments", [{}, {"num_samples": 2}, {"filter_seen": False}])
def test_a_replay_is_the_call_to_the_bit_and_waits_for_nothing(method: str, arguments: dict[str, Any]) -> None:
    engine = cuda_engine(method, cuda_graphs=True)
    asked = {"top_k": 7, "output_embeddings": True} | arguments
    plan = engine.model.plan("ddpm", 3)
    for histories in (HISTORIES, HISTORIES[::-1], [[9]] * 5, [[5], [6, 7], [], list(range(1, 31)), [8] * 3]):
        for _ in range(2):
            engine.generate(histories, scheduler=plan, seed=1, **asked)
        for seed in (5, -1, 1 << 63):
            expected = unreplayed(engine, histories, seed=seed, **asked)
            before = engine.graphs.calls.get("replayed", 0)
            with waiting_is_an_error():
                output = engine.generate(histories, scheduler=plan, seed=seed, **asked)
            assert engine.graphs.calls["replayed"] == before + 1
            assert same(output, expected)
            assert set(output.timings) == {"prepare", "graph"}
    plain = cuda_engine(method).generate(HISTORIES, scheduler=plan, seed=5, **asked)
    torch.testing.assert_close(
        engine.generate(HISTORIES, scheduler=plan, seed=5, **asked).scores, plain.scores, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("arguments", [{"guidance_scale": 2.0}, {"scheduler": "closed_form"}, {"aggregation": "mean"}])
def test_other_kinds_of_call_are_replayed_too(arguments: dict[str, Any]) -> None:
    engine = cuda_engine("dreamrec", cuda_graphs=True)
    asked = {"num_samples": 2, "output_embeddings": True} | arguments
    expected = {seed: engine.generate([[3]] * 3, seed=seed, **asked) for seed in (1,)}
    for seed in (2, 3):
        expected[seed] = cuda_engine("dreamrec", cuda_graphs=True).generate([[3]] * 3, seed=seed, **asked)
    outputs = {seed: engine.generate([[3]] * 3, seed=seed, **asked) for seed in (1, 2, 3)}
    assert engine.graphs.calls == {"the first of its sizes": 1, "captured": 1, "replayed": 2}
    assert all(same(outputs[seed], expected[seed]) for seed in outputs)


def test_replays_on_different_streams_do_not_run_into_each_other() -> None:
    """One input buffer serves all: a replay that is queued behind a sleep must still find its own histories there."""
    engine = cuda_engine("adrec", cuda_graphs=True)
    asked = {"top_k": 7, "output_embeddings": True}
    cases = [([[3 + seed, 7], [5 + seed], []], seed) for seed in range(12)]
    expected = [engine.generate(histories, seed=seed, **asked) for histories, seed in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    outputs = []
    with waiting_is_an_error():
        for (histories, seed), stream in zip(cases, streams * 4, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
                outputs.append(engine.generate(histories, seed=seed, **asked))
    for (output, stream), one in zip(zip(outputs, streams * 4, strict=True), expected, strict=True):
        with torch.cuda.stream(stream):
            assert same(output, one)
    assert engine.graphs.calls["replayed"] == 22


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_capture_and_replay(method: str) -> None:
    """Captures in one thread while others launch and allocate; two engines in one process."""
    engines = [cuda_engine(method, cuda_graphs=True) for _ in range(2)]
    cases = [([[3, 7, 7][: 1 + user % 3] for user in range(n_users)], n_users) for n_users in range(1, 9)]
    asked = {"top_k": 5, "output_embeddings": True}
    expected = [cuda_engine(method, cuda_graphs=True).generate(*case[:1], seed=case[1], **asked) for case in cases]
    wrong: list[Any] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(40):
                place = (number + turn) % len(cases)
                histories, seed = cases[place]
                output = engines[number % 2].generate(histories, seed=seed, **asked)
                if not same(output, expected[place]):
                    wrong.append((number, turn))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for engine in engines:
        assert sum(engine.graphs.calls.values()) == 3 * 40
        assert engine.graphs.calls["replayed"] > 60


def test_replays_take_no_more_memory_and_dropped_graphs_give_theirs_back() -> None:
    engine = cuda_engine("adrec", cuda_graphs=True)
    engine.catalog = engine.catalog.update([4], torch.zeros(1, 16, device="cuda"))  # the loaded one is kept to compare
    plain = cuda_engine("adrec")
    for each in (engine, plain):
        for _ in range(3):
            each.generate(HISTORIES, seed=1).to_tuple()
    torch.cuda.synchronize()
    before, held = torch.cuda.memory_allocated(), engine.graphs.n_bytes
    assert held > 0
    for seed in range(50):
        engine.generate(HISTORIES, seed=seed).to_tuple()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    assert engine.graphs.n_bytes == held
    for n_users in range(1, 9):
        for _ in range(2):
            engine.generate([[3]] * n_users, seed=1).to_tuple()
    n_graphs = len(engine.graphs)
    assert n_graphs > 4
    assert engine.graphs.n_bytes < n_graphs * held  # they share what is not their output
    old, table = weakref.ref(engine.catalog), engine.catalog.table.data_ptr()
    engine.catalog = engine.catalog.update([4], torch.ones(1, 16, device="cuda"))
    gc.collect()
    assert old() is None
    assert table != engine.catalog.table.data_ptr()
    assert len(engine.graphs) == engine.graphs.n_bytes == 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < before + (1 << 20)


def test_graphs_that_were_dropped_leave_those_captured_after_them_as_they_are() -> None:
    """cuBLAS among them: DreamRec's encoder and CDDRec's call it."""
    for method in ("dreamrec", "cddrec"):
        engine = cuda_engine(method, cuda_graphs=True)
        asked = {"seed": 3, "output_embeddings": True}
        expected = engine.generate(HISTORIES, **asked)
        first = cuda_engine(method, cuda_graphs=True)
        for each in (first, engine):
            for _ in range(2):
                each.generate(HISTORIES, **asked)
        del first, each  # whose graphs go with it
        gc.collect()
        torch.cuda.empty_cache()
        filler = torch.full((1 << 24,), float("nan"), device="cuda")
        engine.catalog = engine.catalog.update([30], engine.catalog.table[30:31])
        for _ in range(3):
            assert same(engine.generate(HISTORIES, **asked), expected)
        assert engine.graphs.calls["replayed"] >= 1
        del filler


def test_an_engine_may_go_while_its_replay_runs() -> None:
    engine = cuda_engine("adrec", cuda_graphs=True)
    asked = {"seed": 3, "output_embeddings": True}
    expected = engine.generate(HISTORIES, **asked)
    for _ in range(2):
        engine.generate(HISTORIES, **asked)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        output = engine.generate(HISTORIES, **asked)
    del engine
    gc.collect()
    junk = [torch.full((1 << 18,), -7, dtype=torch.int64, device="cuda") for _ in range(8)]
    with torch.cuda.stream(stream):
        assert same(output, expected)
    del junk


def test_numbers_that_are_none_are_found_in_a_replay() -> None:
    engine = cuda_engine("dreamrec", broken=True, cuda_graphs=True)
    for _ in range(3):
        with pytest.raises(InvalidArgument, match="query must be finite"):
            engine.generate(HISTORIES, seed=1).scores  # noqa: B018
    assert engine.graphs.calls["replayed"] == 1
