"""Trained weights of the authors' own code give the authors' own answers, by every way into fastdiff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from bench.published.adrec import PublishedADRec
from bench.published.cddrec import CDDRecModel
from bench.published.dreamrec import DreamRec
from fastdiff.checkpoint import convert
from tests.tolerances import GOLDEN, relative_error

pytestmark = pytest.mark.golden

Golden = Callable[..., dict[str, Any]]

# folder -> (method, folder of the weights)
RECORDS = {
    "adrec_ml100k": ("adrec", "adrec_ml100k"),
    "adrec_ml100k_cfg": ("adrec", "adrec_ml100k"),
    "adrec_mlp_decoder": ("adrec", "adrec_mlp_decoder"),
    "cddrec_office": ("cddrec", "cddrec_office"),
    "dreamrec_zhihu": ("dreamrec", "dreamrec_zhihu"),
}


@pytest.fixture(params=["convert", "accelerate", "save_pretrained"])
def load(request: pytest.FixtureRequest, golden: Golden, tmp_path: Path) -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """load(name) -> (engine, record), by each of the ways that users have."""

    def through(name: str) -> tuple[Any, dict[str, Any]]:
        method, weights_of = RECORDS[name]
        record = golden(name, weights_of)
        if request.param == "accelerate":
            return _accelerate(method, record), record
        convert(method, record["weights_file"], record["args_file"], tmp_path / "model")
        engine = fastdiff.from_pretrained(tmp_path / "model")
        if request.param == "save_pretrained":
            engine.save_pretrained(tmp_path / "again")
            engine = fastdiff.from_pretrained(tmp_path / "again")
        return engine, record

    return through


def _accelerate(method: str, record: dict[str, Any]) -> Any:
    args = record["args"]
    settings: dict[str, Any] = {}
    module: torch.nn.Module
    if method == "adrec":
        module = PublishedADRec(args)
    elif method == "cddrec":
        module = CDDRecModel(SimpleNamespace(**args))
    else:
        module = DreamRec(args["hidden_factor"], args["item_num"], args["seq_size"], args["diffuser_type"])
    module.load_state_dict(record["weights"])
    if method == "dreamrec":  # its schedule lives outside the module
        settings = {name: args[name] for name in ("timesteps", "beta_sche", "beta_start", "beta_end", "w")}
    return fastdiff.accelerate(module, settings)


def assert_same_top(ids: Tensor, scores: Tensor, expected_ids: Tensor, expected_scores: Tensor) -> None:
    """The same items in the same order, but for items whose scores differ by less than rounding."""
    assert relative_error(scores, expected_scores) <= GOLDEN
    scale = float(expected_scores.abs().max())
    for mine, theirs, values in zip(ids.tolist(), expected_ids.tolist(), expected_scores.tolist(), strict=True):
        for place, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a == b:
                continue
            level = values[place]
            tied = [item for item, value in zip(theirs, values, strict=True) if abs(value - level) <= GOLDEN * scale]
            at_the_edge = abs(values[-1] - level) <= GOLDEN * scale
            assert a in tied or at_the_edge, f"place {place}: item {a} where the authors have {b}"


@pytest.mark.parametrize("name", RECORDS)
def test_recorded_outputs(load: Callable[[str], tuple[Any, dict[str, Any]]], name: str) -> None:
    engine, record = load(name)
    output = engine.generate(
        record["history"], top_k=20, noise=record["noise"], ranking="published", output_embeddings=True
    )
    assert relative_error(output.embeddings, record["x0"]) <= GOLDEN
    if name == "cddrec_office":  # its published ranking zeroes what the user has seen, also outside the window
        full = engine.generate(record["full_history"], top_k=20, noise=record["noise"], ranking="published")
        assert_same_top(full.item_ids, full.scores, record["topk_items_seen_zeroed"], record["topk_scores_seen_zeroed"])
    else:
        assert_same_top(output.item_ids, output.scores, record["topk_items"], record["topk_scores"])


def test_cddrec_one_by_one(load: Callable[[str], tuple[Any, dict[str, Any]]]) -> None:
    engine, record = load("cddrec_office")
    rows = [
        engine.generate(
            record["history"][i : i + 1], noise=record["noise_one_by_one"][:, i : i + 1], output_embeddings=True
        ).embeddings
        for i in range(len(record["history"]))
    ]
    assert relative_error(torch.cat(rows), record["x0_one_by_one"]) <= GOLDEN


def test_lists_of_items_give_the_same(load: Callable[[str], tuple[Any, dict[str, Any]]]) -> None:
    engine, record = load("adrec_ml100k")
    lists = [[item for item in row if item] for row in record["history"].tolist()]
    output = engine.generate(lists, noise=record["noise"], output_embeddings=True)
    assert relative_error(output.embeddings, record["x0"]) <= GOLDEN
