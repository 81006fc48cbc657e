"""The way of a call, of a training and of a bench on a CUDA device, played where there is none: every tensor is where
it is used, and nothing waits that must not. What kernels compute there is not played."""

from __future__ import annotations

import gc
import inspect
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import graphs
from bench.graphs import waiting_is_an_error
from bench.weights import random_weights
from fastdiff.arguments import SamplerRequest
from fastdiff.checkpoint import Checkpoint
from fastdiff.config import default_generation_config
from fastdiff.engine import Engine
from fastdiff.ops.backend import why_not
from fastdiff.train.run import METHODS as RECIPES
from fastdiff.train.run import train
from fastdiff.train.trainer import Interrupted
from tests.builders import METHODS, small_config
from tests.played_gpu import GPU, OnGpu, PlayedGpu
from tests.train.small import small_settings
from tests.train.tiny import tiny_data

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_cuda.py needs no play")

IDS = [500 - row for row in range(50)]
HISTORIES = [[IDS[row % 50] for row in history] for history in ([3, 7, 7, 20], [], [5], range(10, 22), range(8))]
PADDED = [history + [-1] * (12 - len(history)) for history in HISTORIES]
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"num_samples": 2},
    {"num_samples": 2, "aggregation": "mean"},
    {"filter_seen": False, "request_ids": [1, 2, 3, 4, 5]},
    {"exclude_items": IDS[:3], "user_exclude_items": [IDS[:3]] * 5},
    {"candidate_items": IDS[:30], "user_candidate_items": [IDS[:9]] * 5},
    {"num_inference_steps": 3},
]


# --- the play itself --------------------------------------------------------------------------------------------------


def test_devices_that_are_mixed_and_waits_are_found() -> None:
    with PlayedGpu():
        there, here = torch.zeros(3, device=GPU), torch.zeros(3)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        assert (there + torch.tensor(1.0)).device == GPU  # numbers may come from the CPU
        assert there.sum().item() == 0.0
        pinned = torch.zeros(3, pin_memory=True)
        with waiting_is_an_error():
            assert pinned.to(GPU, non_blocking=True).device == GPU
            for wait in (
                lambda: there.sum().item(),
                lambda: there.tolist(),
                lambda: there[there > 0],
                lambda: there.cpu(),
                lambda: here.to(GPU, non_blocking=True),
                lambda: pinned.to(GPU),
                lambda: torch.tensor([1.0], device=GPU),
                lambda: torch.cuda.current_stream().synchronize(),
            ):
                with pytest.raises(RuntimeError, match="would wait"):
                    wait()
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="would be captured"):
            pinned.to(GPU, non_blocking=True)


# --- the engine -------------------------------------------------------------------------------------------------------


def checkpoint(method: str) -> Checkpoint:
    config = small_config(method)
    return Checkpoint(config, default_generation_config(config), random_weights(config, 0), IDS)


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_there_answers_as_one_here(method: str) -> None:
    here = Engine.from_checkpoint(checkpoint(method), backend="torch")
    expected = [here.generate(HISTORIES, seed=3, top_k=7, **arguments) for arguments in ARGUMENTS]
    published = here.generate(HISTORIES, seed=3, ranking="published")
    added = torch.randn(3, 16)
    changes = [lambda c: c.add([1000, 1001, 1002], added), lambda c: c.update([1000], -added[:1])]
    changes += [lambda c: c.remove([IDS[9], 1001])]
    for change in changes:
        here.catalog = change(here.catalog)
    later = here.generate([[1000, IDS[4]], [IDS[9]]], seed=3)
    with PlayedGpu():
        there = Engine.from_checkpoint(checkpoint(method), device="cuda", backend="torch")
        for arguments, truth in zip(ARGUMENTS, expected, strict=True):
            same(there.generate(HISTORIES, seed=3, top_k=7, **arguments), truth)
        same(there.generate(torch.tensor(PADDED, device=GPU), seed=3, top_k=7), expected[0])
        same(there.generate(HISTORIES, seed=3, ranking="published"), published)
        for change in changes:
            there.catalog = change(there.catalog)
        same(there.generate([[1000, IDS[4]], [IDS[9]]], seed=3), later)


def test_what_a_call_reads_lives_until_its_output_is_looked_at() -> None:
    """Its kernels may run long after the catalogue was replaced, on another stream than that of what comes next."""
    with PlayedGpu():
        engine = Engine.from_checkpoint(checkpoint("dreamrec"), device="cuda", dtype=torch.bfloat16, backend="torch")
        output = engine.generate(HISTORIES)
        kept = engine._history_table
        assert kept is not None
        table, plan = weakref.ref(kept[1]), weakref.ref(engine._sampler(SamplerRequest(), engine.generation_config)[0])
        del kept
        engine.catalog = engine.catalog.remove(IDS[:1])
        engine._default_sampler = None
        engine._make_plan.cache_clear()
        gc.collect()
        assert table() is not None
        assert plan() is not None
        output.scores  # noqa: B018
        gc.collect()
        assert table() is plan() is None


def same(found: Any, truth: Any) -> None:
    assert isinstance(found.scores, OnGpu)
    assert found.item_ids.tolist() == truth.item_ids.tolist()
    torch.testing.assert_close(found.scores.cpu(), truth.scores, rtol=1e-5, atol=1e-6)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """(kernel, arguments) of the launches, which are given tensors of the device alone."""
    if why_not("triton", "cuda") is not None:
        pytest.skip(str(why_not("triton", "cuda")))
    from triton.runtime.jit import JITFunction

    from fastdiff.kernels import runtime

    if runtime.INTERPRETED:
        pytest.skip("kernels are interpreted in this process")
    seen: list[tuple[Any, dict[str, Any]]] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        given = inspect.signature(kernel.fn).bind_partial(*arguments).arguments | keywords
        here = [name for name, value in given.items() if isinstance(value, Tensor) and not isinstance(value, OnGpu)]
        assert here == [], kernel.fn.__name__
        seen.append((kernel, given))

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_a_call_of_kernels_waits_for_nothing(method: str, launches: list[Any]) -> None:
    with PlayedGpu():
        engine = Engine.from_checkpoint(checkpoint(method), device="cuda", backend="triton")
        for histories in (HISTORIES, torch.tensor(PADDED, device=GPU)):
            for arguments in ARGUMENTS:
                for watched in (nullcontext(), waiting_is_an_error()):  # the first makes what is kept
                    with watched:
                        engine.generate(histories, top_k=7, **arguments)
    assert len(launches) > 50


@pytest.mark.parametrize("method", METHODS)
def test_histories_of_other_widths_compile_nothing_anew(method: str, launches: list[Any]) -> None:
    """But for blocks of other sizes: no number that follows from a batch's users or widths is made part of a kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = make_backend(GPUTarget("cuda", 90, 32))
    config = small_config(method, max_seq_len=40)
    weights = random_weights(config, 0)
    with PlayedGpu():
        made = Checkpoint(config, default_generation_config(config), weights)
        engine = Engine.from_checkpoint(made, device="cuda", backend="triton")
        for width in (1, 5, 16):
            for n_users in (1, 5, 16):
                engine.generate([[7] * width] * n_users, top_k=7)
    found: dict[tuple[str, str], set[Any]] = {}
    for kernel, given in launches:
        bind = create_function_from_signature(kernel.signature, kernel.params, target)
        for parameter, made_of in zip(kernel.params, bind(**given)[1], strict=True):
            if isinstance(given[parameter.name], int) and not parameter.is_constexpr:
                found.setdefault((kernel.fn.__name__, parameter.name), set()).add(str(made_of))
    assert found
    assert [name for name, kinds in found.items() if len(kinds) > 1] == []


@pytest.mark.parametrize("method", METHODS)
def test_a_call_can_be_captured(method: str, launches: list[Any]) -> None:
    asked = [arguments for arguments in ARGUMENTS if not any("items" in name for name in arguments)]
    with PlayedGpu():
        engine = Engine.from_checkpoint(checkpoint(method), device="cuda", backend="triton", cuda_graphs=True)
        for arguments in asked:
            for watched in (nullcontext(), nullcontext(), waiting_is_an_error()):
                with watched:
                    engine.generate(HISTORIES, top_k=7, **arguments)
        each = dict.fromkeys(("the first of its sizes", "captured", "replayed"), len(asked))
        assert engine.graphs.calls == each
        engine.catalog = engine.catalog.remove(IDS[:1])
        assert len(engine.graphs) == 0


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in RECIPES if method != "dreamrec"])  # which TA-Rec begins with
def test_a_training_there_ends_as_one_here(method: str, tmp_path: Path) -> None:
    """Broken off once, and resumed. Draws are those of the CPU's generator in both."""
    settings = small_settings(method, {})
    quiet: dict[str, Any] = {"show_progress": False, "say": lambda line: None}
    expected = train(method, tiny_data(), tmp_path / "here", settings, **quiet)
    with PlayedGpu():
        with pytest.raises(Interrupted):
            train(method, tiny_data(), tmp_path / "there", settings, device="cuda", minutes=0.0, **quiet)
        found = train(method, tiny_data(), tmp_path / "there", settings, device="cuda", resume=True, **quiet)
    assert found["valid"] == pytest.approx(expected["valid"], abs=0.02)
    assert found["test"] == pytest.approx(expected["test"], abs=0.02)


# --- benches ----------------------------------------------------------------------------------------------------------


def test_a_capture_that_would_fail_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    with PlayedGpu():
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: begun.append(graph) or nullcontext())
        numbers = torch.arange(3, device=GPU)
        with pytest.raises(RuntimeError, match="would wait"):
            graphs.Replayed(lambda x: x[x > 1], numbers)
        assert begun == []
        replayed = graphs.Replayed(lambda x: x + 1, numbers)
        assert len(begun) == 1
        assert replayed(numbers).tolist() == [1, 2, 3]
