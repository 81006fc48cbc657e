"""One engine under many threads, with catalogue updates in between, and in the children of fork().

Each call is recorded with the snapshots of the catalogue that may have been current when it began, and repeated alone
afterwards: its answer must be that of one of them. FASTDIFF_TEST_SECONDS bounds how long all methods take together.
"""

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import pytest
import torch

from fastdiff.catalog import ItemCatalog
from fastdiff.engine import Engine
from fastdiff.ops.sampler_step import sampler_step
from fastdiff.output import GenerateOutput
from tests.builders import METHODS, first_id, small_engine

SECONDS = float(os.environ.get("FASTDIFF_TEST_SECONDS", "5")) / len(METHODS)
THREADS = 16
BATCH_SIZES = (1, 1, 1, 2, 3, 5, 8, 13, 40)
AGREE = 1e-5
"""Of scores: plain PyTorch may sum in another order when it runs in another thread."""


@dataclass(frozen=True)
class Call:
    """What was asked, the numbers of the first and last snapshot that it may have seen, and what came."""

    histories: list[list[int]]
    top_k: int
    seed: int
    first: int
    last: int
    output: GenerateOutput


def ask(engine: Engine, histories: list[list[int]], top_k: int, seed: int, threads: int = 2) -> GenerateOutput:
    torch.set_num_threads(threads)  # a setting of each thread
    return engine.generate(histories, top_k=top_k, seed=seed)


def same(got: GenerateOutput, expected: GenerateOutput) -> bool:
    """The same scores; the same ids too, but for places that are tied."""
    if got.scores.shape != expected.scores.shape or not torch.equal(got.num_valid, expected.num_valid):
        return False
    close = torch.isclose(got.scores, expected.scores, rtol=AGREE, atol=AGREE)
    differs = got.item_ids != expected.item_ids
    tied = torch.zeros_like(differs)
    gaps = (expected.scores[:, 1:] - expected.scores[:, :-1]).abs() <= 2 * AGREE
    tied[:, 1:] |= gaps
    tied[:, :-1] |= gaps
    tied[:, -1] = True  # its rival may be the item that just missed
    return bool(close.all()) and not bool((differs & ~tied).any())


def changed(catalog: ItemCatalog, draws: random.Random, step: int) -> ItemCatalog:
    """The next snapshot: items added, updated and removed in turn; those of the model's own table are never removed."""
    added = [item for item in catalog.item_ids if item >= 1000]
    vectors = torch.randn(3, catalog.dim, generator=torch.Generator().manual_seed(step))
    if step % 3 == 0:
        return catalog.add([1000 + 3 * step + i for i in range(3)], vectors)
    if step % 3 == 1 or len(added) < 6:
        return catalog.update(draws.sample(list(catalog.item_ids), 3), vectors)
    return catalog.remove(draws.sample(added, 3))


@pytest.mark.parametrize("method", METHODS)
def test_many_threads_and_a_changing_catalogue(method: str) -> None:
    engine = small_engine(method)
    first = first_id(engine)
    snapshots = [engine.catalog]
    until, enough = time.monotonic() + SECONDS / 2, threading.Event()
    gate = threading.Barrier(THREADS + 1)

    def caller(number: int) -> list[Call]:
        draws, calls = random.Random(number), []
        gate.wait()
        while not (calls and enough.is_set()):
            histories = [
                [draws.randrange(first, first + 50) for _ in range(draws.randrange(12))]
                for _ in range(draws.choice(BATCH_SIZES))
            ]
            top_k, seed, before = draws.choice((1, 5, 20)), draws.randrange(1 << 40), len(snapshots) - 1
            output = ask(engine, histories, top_k, seed)
            # the list grows just before the engine is given its last entry
            calls.append(Call(histories, top_k, seed, max(before - 1, 0), len(snapshots) - 1, output))
        return calls

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(caller, number) for number in range(THREADS)]
        draws = random.Random(method)
        gate.wait()
        try:
            while time.monotonic() < until or len(snapshots) <= 3:  # on a loaded machine this thread may hardly run
                snapshots.append(changed(snapshots[-1], draws, len(snapshots)))
                engine.catalog = snapshots[-1]
                time.sleep(0.002)
        finally:
            enough.set()
        calls = [future.result() for future in futures]  # raises what a thread raised

    assert all(calls), "a thread got no answer"
    lone = small_engine(method)
    for call in (call for one in calls for call in one):
        assert call.output.scores.shape == (len(call.histories), call.top_k)
        for number in range(call.last, call.first - 1, -1):
            lone.catalog = snapshots[number]
            if same(call.output, ask(lone, call.histories, call.top_k, call.seed, threads=1)):
                break
        else:
            pytest.fail(f"{call} is the answer of none of its snapshots")


def _in_children_of_fork(times: int, answer: Callable[[], object]) -> Iterator[object]:
    """What `answer` returns in a child, one child after the other; fails where a child hangs."""
    context = multiprocessing.get_context("fork")

    def run(pipe: Connection) -> None:
        pipe.send(answer())

    for _ in range(times):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=run, args=(theirs,))
        child.start()
        theirs.close()
        try:
            assert ours.poll(30), "the child gave no answer: it hangs"
            yield ours.recv()
        finally:
            child.kill()
            child.join()


@pytest.mark.parametrize("method", METHODS)
def test_children_of_fork(method: str) -> None:
    """An engine that the parent has used runs in its children, and in the parent afterwards."""
    engine = small_engine(method)

    def answer(threads: int) -> tuple[list[list[int]], list[list[float]]]:
        output = ask(engine, [[3, 7, 20], [5], []] * 20, 7, 3, threads)
        return output.item_ids.tolist(), output.scores.tolist()

    expected = answer(2)
    # one thread in the child: PyTorch's own operations, which run on OpenMP, hang there with more
    for got in _in_children_of_fork(3, lambda: answer(1)):
        assert got == expected
        assert answer(2) == expected


@pytest.mark.parametrize("backend", sampler_step.available("cpu"))
def test_an_op_on_many_threads_in_children_of_fork(backend: str) -> None:
    if backend == "torch":
        pytest.skip("PyTorch's operations hang in a child of a process that has used OpenMP")
    op = sampler_step.bind(backend, "cpu")
    rows = torch.randn(5000, 128)

    def answer() -> float:
        torch.set_num_threads(4)
        return float(op(rows, rows, None, 0.5, 0.25, 0.0)[4321, 7])

    expected = answer()
    for got in _in_children_of_fork(20, answer):
        assert got == expected
        assert answer() == expected
