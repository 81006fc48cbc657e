"""What a generation config runs, in words and as arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastdiff.config import SCHEDULERS, default_generation_config
from fastdiff.sampler import NAMES, Sampler
from tests.builders import small_config


@pytest.mark.parametrize(
    ("sampler", "name", "calls", "arguments"),
    [
        (Sampler("ddim", 1), "DDIM, 1 step", 1, {"scheduler": "ddim", "num_inference_steps": 1}),
        (Sampler("ddpm", 1000), "DDPM, 1,000 steps", 1000, {"scheduler": "ddpm", "num_inference_steps": 1000}),
        (Sampler("one_step", 1), "one step", 1, {"scheduler": "one_step"}),
        (Sampler("closed_form", 500), "closed form, 500 steps", 1, {"scheduler": "closed_form"}),
    ],
)
def test_names_calls_and_arguments(sampler: Sampler, name: str, calls: int, arguments: dict[str, Any]) -> None:
    assert (str(sampler), sampler.calls, sampler.arguments) == (name, calls, arguments)


def test_every_scheduler_has_a_name() -> None:
    assert set(NAMES) == set(SCHEDULERS)


def test_no_number_of_steps_is_all_of_them() -> None:
    config = small_config("dreamrec")
    generation = default_generation_config(config)
    total = config.schedule.num_train_timesteps
    assert Sampler.of(replace(generation, num_inference_steps=None), config) == Sampler("ddpm", total)
    assert Sampler.of(replace(generation, num_inference_steps=3), config) == Sampler("ddpm", 3)
    assert Sampler("ddpm", total).generation_config(generation, config).num_inference_steps is None
    assert Sampler("ddpm", 3).generation_config(generation, config).num_inference_steps == 3
