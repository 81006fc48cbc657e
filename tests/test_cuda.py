"""What `generate()` promises on a CUDA device: it waits for nothing, honours streams, and says at the output what is
wrong. All here needs such a device; what the same code does on tensors of the CPU is tested in test_staging.py,
test_output.py and test_device_histories.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench.weights import random_weights
from fastdiff.checkpoint import Checkpoint
from fastdiff.config import default_generation_config
from fastdiff.engine import Engine
from fastdiff.errors import InvalidArgument, InvalidHistory
from tests.builders import METHODS, small_config, small_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

HISTORIES = [[3, 7, 7, 20], [], [5], list(range(10, 22)), [1, 2, 3, 4, 5, 6, 7, 8]]


def cuda_engine(method: str, item_ids: list[Any] | None = None, broken: bool = False) -> Engine:
    config = small_config(method)
    weights = random_weights(config, 0)
    if broken:
        weights = {
            name: weight if weight.shape[0] == config.n_rows else torch.full_like(weight, float("nan"))
            for name, weight in weights.items()
        }
    checkpoint = Checkpoint(config, default_generation_config(config, 1.0), weights, item_ids)
    return Engine.from_checkpoint(checkpoint, device="cuda", backend="triton")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
