"""Which sampler a trained model gets."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

import fastdiff
from fastdiff import cli
from fastdiff.config import GenerationConfig, default_generation_config
from fastdiff.sampler import Sampler
from fastdiff.train.steps import Measured, fewest_steps, samplers
from tests.builders import small_config

FULL = Sampler("ddpm", 50)


def measured(*found: tuple[str, int, float, float]) -> list[Measured]:
    return [
        Measured(Sampler(scheduler, steps), {"HR@20": hr, "NDCG@20": ndcg}, 1e-3)
        for scheduler, steps, hr, ndcg in found
    ]


@pytest.mark.parametrize(
    ("others", "wanted"),
    [
        ([("ddpm", 1, 0.1990, 0.0995), ("ddpm", 2, 0.21, 0.11)], Sampler("ddpm", 1)),  # half a per cent is nothing
        ([("ddpm", 1, 0.1970, 0.1000), ("ddpm", 2, 0.20, 0.10)], Sampler("ddpm", 2)),  # one and a half are not
        ([("ddpm", 1, 0.2000, 0.0970), ("ddim", 5, 0.20, 0.10)], Sampler("ddim", 5)),  # nor of NDCG
        ([("ddpm", 1, 0.1500, 0.0500), ("ddim", 50, 0.30, 0.20)], FULL),  # as many steps: the paper's
        ([("ddpm", 1, 0.2, 0.1), ("ddim", 1, 0.2, 0.1)], Sampler("ddpm", 1)),  # equal: the first
        ([("ddpm", 1, 0.2, 0.1), ("closed_form", 50, 0.2, 0.1)], Sampler("closed_form", 50)),  # as dear as one step
        (
            [("ddpm", 1, 0.3, 0.2), ("closed_form", 50, 0.2, 0.1)],
            Sampler("closed_form", 50),
        ),  # equal in law, not by luck
        ([("ddpm", 1, 0.2, 0.1), ("ddim", 1, 0.2, 0.11)], Sampler("ddim", 1)),  # the better one
    ],
)
def test_the_fewest_steps_that_cost_nothing(others: list[tuple[str, int, float, float]], wanted: Sampler) -> None:
    assert fewest_steps(measured(*others, ("ddpm", 50, 0.2, 0.1)), FULL).sampler == wanted


def test_a_model_of_one_step_keeps_it() -> None:
    found = measured(("one_step", 1, 0.2, 0.1), ("ddpm", 1, 0.2, 0.1), ("ddpm", 50, 0.3, 0.2))
    assert fewest_steps(found, Sampler("one_step", 1)).sampler == Sampler("one_step", 1)


@pytest.mark.parametrize("method", ["adrec", "tarec", "dreamrec", "cddrec", "dimerec"])
def test_every_sampler_is_written_as_a_config_and_read_back(method: str) -> None:
    config = small_config(method)
    generation = replace(default_generation_config(config), guidance_scale=2.0, top_k=7)
    assert Sampler.of(generation, config) in samplers(config)
    for sampler in samplers(config):
        chosen = sampler.generation_config(generation, config)
        assert Sampler.of(chosen, config) == sampler
        assert (chosen.guidance_scale, chosen.top_k) == (2.0, 7)


@pytest.mark.parametrize("all_steps", [False, True])
def test_the_default_of_a_trained_model(
    all_steps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DreamRec's closed form draws from the law of all DDPM steps: here the two are told to be as good."""
    from fastdiff.train import run as training

    def found(recipe, model):
        values = {1: (0.1, 0.1), 20: (0.2, 0.2)}
        return [
            Measured(one, dict(zip(("HR@20", "NDCG@20"), values.get(one.steps, (0.1, 0.1)), strict=True)), 1e-3)
            for one in samplers(model.config)
        ]

    monkeypatch.setattr(training, "measure_steps", found)
    sequences = tmp_path / "sequences.txt"
    sequences.write_text(
        "".join(f"{user} {' '.join(str((user + at) % 30) for at in range(8))}\n" for user in range(40))
    )
    sizes = ["hidden_size=8", "epochs=1", "num_train_timesteps=20"]
    command = ["train", "dreamrec", str(sequences), "--output", str(tmp_path / "run"), "--no-progress"]
    command += [word for size in sizes for word in ("--set", size)]
    assert cli.main([*command, *(["--all-steps"] if all_steps else [])]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    generation = fastdiff.from_pretrained(tmp_path / "run" / "model").generation_config
    wanted = GenerationConfig(scheduler="ddpm" if all_steps else "closed_form")
    assert (generation.scheduler, generation.num_inference_steps) == (wanted.scheduler, None)
    assert result["sampler"]["scheduler"] == wanted.scheduler
    assert result["paper_sampler"] == {"scheduler": "ddpm", "steps": 20, "valid": {"HR@20": 0.2, "NDCG@20": 0.2}}
    if all_steps:
        assert "sampler: DDPM, 20 steps\n" in out
    else:
        assert "sampler: closed form, 20 steps, in valid HR@20 20.00 %" in out
        assert "generate(scheduler='ddpm', num_inference_steps=20) runs the paper's" in out
    with (tmp_path / "run" / "steps.csv").open() as file:
        assert {row["scheduler"] for row in csv.DictReader(file)} == {"ddpm", "ddim", "closed_form"}
