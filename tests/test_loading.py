"""`accelerate` and `from_pretrained`: the engine for a live model is a snapshot, and what the calls accept."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.published.adrec import PublishedADRec
from bench.published.cddrec import CDDRecModel
from bench.published.dimerec import DimeRec as PublishedDimeRec
from bench.published.dreamrec import DreamRec as PublishedDreamRec
from bench.published.dreamrec import beta_table
from fastdiff import accelerate, from_pretrained
from fastdiff.errors import CheckpointError, InvalidArgument
from tests.builders import METHODS, small_config, small_engine

ADREC_ARGS = {
    "item_num": 50,
    "hidden_size": 16,
    "max_len": 8,
    "diffusion_steps": 24,
    "noise_schedule": "trunc_lin",
    "lambda_uncertainty": 0.3,
    "rescale_timesteps": True,
    "cfg_scale": 1.0,
    "dif_decoder": "att",
}
CDDREC_ARGS = {
    "item_size": 52,
    "hidden_size": 16,
    "max_seq_length": 8,
    "T": 12,
    "beta_1": 0.01,
    "beta_T": 0.4,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
DREAMREC_SETTINGS = {"timesteps": 12, "beta_sche": "linear", "beta_start": 0.01, "beta_end": 0.4, "w": 1.0}
HISTORIES = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10, 11, 12, 13]]


def live(method: str) -> tuple[nn.Module, dict[str, Any]]:
    """A published module with 50 items, and the settings that it does not hold itself."""
    if method == "adrec":
        return PublishedADRec(ADREC_ARGS), {}
    if method == "cddrec":
        return CDDRecModel(SimpleNamespace(**CDDREC_ARGS)), {"batch_coupling": "none"}
    if method == "dimerec":
        return PublishedDimeRec(small_config("dimerec")), {}
    return PublishedDreamRec(16, 50, 8, "mlp1"), DREAMREC_SETTINGS | {"method": method}


def answers(model: nn.Module, settings: object) -> Callable[[], tuple[Tensor, Tensor]]:
    engine = accelerate(model, settings)

    def ask() -> tuple[Tensor, Tensor]:
        output = engine.generate(HISTORIES, seed=3, output_embeddings=True)
        assert output.embeddings is not None
        return output.embeddings, output.scores

    return ask


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["optimiser step", "load_state_dict"])
@pytest.mark.parametrize("method", METHODS)
def test_an_engine_is_a_snapshot_of_the_live_model(method: str, change: str) -> None:
    model, settings = live(method)
    ask = answers(model, settings)
    before = ask()
    if change == "optimiser step":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    else:
        model.load_state_dict({name: 1.5 * weight + 0.1 for name, weight in model.state_dict().items()})
    assert_equal(ask(), before)
    after = answers(model, settings)()
    assert not torch.equal(after[0], before[0]), "accelerate, called again, reads the new weights"


def test_the_engine_does_not_change_the_model() -> None:
    model, _ = live("adrec")
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    answers(model, None)()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, state[name], rtol=0, atol=0, equal_nan=True)


class Diffusion:
    """What DreamRec's `diffusion` object holds: its settings, and tables computed from them."""

    def __init__(self) -> None:
        self.timesteps, self.beta_start, self.beta_end, self.w = 12, 0.01, 0.4, 1.0
        self.betas = beta_table("linear", 12, 0.01, 0.4)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        argparse.Namespace(**DREAMREC_SETTINGS, lr=0.1, diffuser_type="mlp1", descri=None),
        SimpleNamespace(**DREAMREC_SETTINGS),
        Diffusion(),
        vars(Diffusion()) | {"alphas": None, "alphas_cumprod": None},
    ],
)
def test_settings_may_be_an_object(settings: object, caplog: pytest.LogCaptureFixture) -> None:
    model, plain = live("dreamrec")
    with caplog.at_level(logging.WARNING):
        ours = answers(model, settings)()
    torch.testing.assert_close(ours[0], answers(model, plain)()[0], rtol=1e-4, atol=1e-5)
    assert "did not use" not in caplog.text or isinstance(settings, dict)


@pytest.mark.parametrize("rescale", [True, "true", "false"])
def test_the_models_own_args_are_no_contradiction(rescale: Any) -> None:
    args = ADREC_ARGS | {"rescale_timesteps": rescale, "pretrained": None, "device": "cpu"}
    model = PublishedADRec(args)
    assert_equal(answers(model, argparse.Namespace(**args))(), answers(model, None)())


def test_unknown_attributes_of_an_object_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model, settings = live("dreamrec")
    with caplog.at_level(logging.WARNING):
        accelerate(model, SimpleNamespace(**settings, beta_schedule="exp", table=np.zeros(3)))
    assert "did not use: beta_schedule" in caplog.text
    assert "table" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    ["config.yaml", ["timesteps"], 5, True, torch.zeros(2), np.zeros(2), nn.Linear(2, 2), SimpleNamespace, len],
)
def test_settings_that_are_none(settings: object) -> None:
    model, _ = live("dreamrec")
    with pytest.raises(InvalidArgument, match=r"^accelerate: settings must be a mapping .* an argparse.Namespace or"):
        accelerate(model, settings)


def test_names_of_settings_are_strings() -> None:
    with pytest.raises(InvalidArgument, match=r"^accelerate: the names of settings must be strings \(got 5\)"):
        accelerate(live("dreamrec")[0], {5: 3})


@pytest.mark.parametrize("model", [None, "model.pth", 5, {"item_embeddings.weight": torch.zeros(2, 2)}, nn.Linear])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^accelerate: needs a torch.nn.Module of the authors' code \(got "):
        accelerate(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_numbers(method: str) -> None:
    model, settings = live(method)
    with pytest.raises(
        CheckpointError, match=r"^accelerate: \w+: parameters without numbers, on the meta device: \w+\."
    ):
        accelerate(model.to("meta"), settings)


def test_a_model_with_a_state_beside_its_parameters() -> None:
    class WithState(CDDRecModel):
        def get_extra_state(self) -> dict[str, int]:
            return {"epoch": 3}

    assert accelerate(WithState(SimpleNamespace(**CDDREC_ARGS))).config.hidden_size == 16


def test_a_cddrec_may_be_uncoupled() -> None:
    model, settings = live("cddrec")
    assert accelerate(model).config.coupled
    engine = accelerate(model, settings)
    assert not engine.config.coupled
    alone = engine.generate(HISTORIES[:1], seed=3, output_embeddings=True).embeddings
    together = engine.generate(HISTORIES, seed=3, output_embeddings=True).embeddings
    assert alone is not None
    assert together is not None
    torch.testing.assert_close(alone[0], together[0], rtol=1e-5, atol=1e-6)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [None, 5, b"model", ["model"]])
def test_what_is_no_folder(folder: Any) -> None:
    with pytest.raises(
        InvalidArgument, match=r"^from_pretrained: folder must be a path, a str or a pathlib.Path \(got "
    ):
        from_pretrained(folder)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_a_text_or_a_path(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    engine = small_engine("tarec")
    engine.save_pretrained(tmp_path / "model")
    loaded = from_pretrained(kind(tmp_path / "model"))
    assert loaded.config == engine.config
    assert torch.equal(loaded.generate(HISTORIES, seed=1).item_ids, engine.generate(HISTORIES, seed=1).item_ids)


def test_a_chain_that_nobody_trained(tmp_path: Path) -> None:
    small_engine("dreamrec").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["schedule"]["num_train_timesteps"] = 10**12
    path.write_text(json.dumps(config))
    message = r"^config.json: schedule: .*num_train_timesteps must be at most 1000000 \(got 1000000000000\)"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "model")
