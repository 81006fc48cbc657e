"""The models that ship for the benches: trained on Amazon Office by `fastdiff train`, one per method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fastdiff
from bench.bench_office import CASES, MODELS, PROVIDERS
from bench.cases import Case, Options, Provider
from fastdiff.evaluate import evaluate
from fastdiff.train.data import read
from fastdiff.train.run import data_digest, recipe_class
from fastdiff.train.run_folder import RESULT_FILE
from fastdiff.train.validation import TOP_KS


@pytest.mark.parametrize("case", [case for case in CASES if case.params["batch"] == 256], ids=lambda case: case.id)
def test_every_way_to_run_them_agrees_with_the_published_algorithm(case: Case) -> None:
    """Trained weights are harder than drawn ones: logits tens in size, items of very different length."""
    providers = [one for one in case.build(Options()) if isinstance(one, Provider)]
    assert {one.name for one in providers} >= {"published", "fastdiff"}
    for one in providers:
        gate = one.check((one.gated or one.run)())
        assert gate.passed, f"{one.name}[{one.backend}]: {gate.error:.1e} > {gate.tolerance:.1e} against {gate.against}"


@pytest.mark.parametrize("method", PROVIDERS)
def test_they_are_small_and_what_they_are_said_to_be(method: str) -> None:
    folder = MODELS / method
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2 * 2**20
    engine = fastdiff.from_pretrained(folder)
    run = json.loads((folder / "run.json").read_text())
    result = json.loads((folder / RESULT_FILE).read_text())
    assert (engine.config.method, run["method"], result["method"]) == (method, method, method)
    assert engine.config.n_items == 2420
    assert {f"settings.{name}" for name in vars(recipe_class(method).Settings())} == {
        name for name in run if name.startswith("settings.")
    }


@pytest.mark.parametrize("method", PROVIDERS)
def test_they_are_as_accurate_as_they_are_said_to_be(method: str, dataset: Callable[[str], Path]) -> None:
    data = read(dataset("amazon-office") / "sequences.txt")
    run, result = (json.loads((MODELS / method / name).read_text()) for name in ("run.json", RESULT_FILE))
    assert run["data"] == data_digest(data)
    engine = fastdiff.from_pretrained(MODELS / method)
    settings = {"ranking": "clean", "filter_seen": False} if method == "dimerec" else {"ranking": "published"}
    found = evaluate(engine, data.test, top_ks=TOP_KS, show_progress=False, **settings).metrics
    for name in ("HR@20", "NDCG@20"):
        assert found[name] == pytest.approx(result["test"][name], abs=5e-4)  # two users of 4,905: ties, roundings
