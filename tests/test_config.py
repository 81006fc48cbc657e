"""Configs: what they refuse, and their way through JSON and back."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.config import (
    CONFIGS,
    ADRecConfig,
    CDDRecConfig,
    DimeRecConfig,
    DreamRecConfig,
    GenerationConfig,
    TARecConfig,
    config_from_dict,
    default_generation_config,
    generation_config_from_dict,
)
from fastdiff.errors import CheckpointError, InvalidArgument
from fastdiff.schedule import ScheduleConfig

SCHEDULE = ScheduleConfig("linear", 10)
SIZES: dict[str, Any] = {"n_items": 30, "hidden_size": 8, "max_seq_len": 5, "schedule": SCHEDULE}

schedules = st.one_of(
    st.builds(ScheduleConfig, st.sampled_from(["linear", "exp", "cosine", "sqrt", "trunc_lin"]), st.integers(1, 3000)),
    st.builds(
        ScheduleConfig,
        st.just("linear"),
        st.integers(1, 99),
        st.sampled_from(["float32", "float64"]),
        beta_start=st.floats(1e-6, 0.1),
        linspace_dtype=st.sampled_from([None, "float32"]),
    ),
    st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=9).map(
        lambda betas: ScheduleConfig("explicit", len(betas), "float64", betas=tuple(betas))
    ),
)
configs = st.one_of(
    st.builds(
        ADRecConfig,
        n_items=st.integers(1, 10**6),
        hidden_size=st.just(8),
        max_seq_len=st.integers(1, 200),
        schedule=schedules,
        decoder=st.sampled_from(["attention", "mlp"]),
        lambda_uncertainty=st.floats(0, 1),
        geodesic=st.booleans(),
    ),
    st.builds(TARecConfig, **{name: st.just(value) for name, value in SIZES.items()}, one_step_timestep=st.integers()),
    st.builds(
        CDDRecConfig,
        **{name: st.just(value) for name, value in SIZES.items()},
        batch_coupling=st.sampled_from(["published", "none"]),
        hidden_act=st.sampled_from(["gelu", "relu"]),
    ),
    st.builds(
        DimeRecConfig,
        **{name: st.just(value) for name, value in SIZES.items()},
        mlp_widths=st.lists(st.integers(1, 64), max_size=3).map(tuple),
        mlp_input_order=st.permutations(["x", "t", "g"]).map(tuple),
    ),
)


@given(configs)
def test_a_config_comes_back_from_json(config: Any) -> None:
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_generation_config_comes_back_from_json() -> None:
    config = GenerationConfig(top_k=3, scheduler="ddim", num_inference_steps=7, guidance_scale=2.5, filter_seen=False)
    assert generation_config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("method", "scheduler"),
    [("adrec", "ddpm"), ("dreamrec", "ddpm"), ("tarec", "one_step"), ("cddrec", "one_step"), ("dimerec", "ddpm")],
)
def test_each_method_samples_as_its_paper_does(method: str, scheduler: str) -> None:
    generation = default_generation_config(CONFIGS[method](**SIZES), guidance_scale=1.5)
    assert (generation.scheduler, generation.guidance_scale) == (scheduler, 1.5)


@pytest.mark.parametrize(
    ("method", "pad_id", "rows", "special"),
    [
        ("adrec", 0, 31, {0: "[PAD]"}),
        ("dreamrec", 30, 31, {30: "[PAD]"}),
        ("tarec", 30, 31, {30: "[PAD]"}),
        ("cddrec", 0, 32, {0: "[PAD]", 31: "[MASK]"}),
        ("dimerec", 0, 31, {0: "[PAD]"}),
    ],
)
def test_rows_that_are_no_items(method: str, pad_id: int, rows: int, special: dict[int, str]) -> None:
    config = CONFIGS[method](**SIZES)
    assert (config.pad_id, config.n_rows, config.special_rows) == (pad_id, rows, special)
    real = range(config.first_item_row, config.first_item_row + config.n_items)
    assert sorted([*real, *special]) == list(range(rows))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (DreamRecConfig, {"n_items": 0}, r"n_items must be an int of at least 1 \(got 0\)"),
        (DreamRecConfig, {"n_items": True}, r"n_items must be an int \(got True\)"),
        (DreamRecConfig, {"hidden_size": "8"}, r"hidden_size must be an int \(got '8'\)"),
        (DreamRecConfig, {"schedule": None}, r"schedule must be a ScheduleConfig \(got NoneType\)"),
        (DreamRecConfig, {"denoiser": "mlp9"}, r"denoiser must be one of mlp1, mlp2 \(got 'mlp9'\)"),
        (DreamRecConfig, {"prediction_type": "noise"}, "prediction_type must be one of sample"),
        (TARecConfig, {"one_step_timestep": 1.5}, "one_step_timestep must be an int or null"),
        (ADRecConfig, {"n_heads": 3}, r"hidden_size must be a multiple of n_heads \(got 8 and 3\)"),
        (ADRecConfig, {"geodesic": "false"}, r"geodesic must be true or false \(got 'false'\)"),
        (ADRecConfig, {"lambda_uncertainty": float("nan")}, "lambda_uncertainty must be a finite number"),
        (ADRecConfig, {"n_encoder_layers": 0}, "n_encoder_layers must be an int of at least 1"),
        (CDDRecConfig, {"batch_coupling": "official"}, "batch_coupling must be one of published, none"),
        (CDDRecConfig, {"hidden_act": 7}, r"hidden_act must be a string \(got 7\)"),
        (CDDRecConfig, {"n_heads": 0}, "hidden_size must be a multiple of n_heads"),
        (DimeRecConfig, {"mlp_widths": (8, 0)}, r"mlp_widths must hold ints of at least 1 \(got \[8, 0\]\)"),
        (DimeRecConfig, {"mlp_input_order": ("x", "t")}, "mlp_input_order must hold 'x', 't' and 'g' once each"),
        (GenerationConfig, {"top_k": 0}, "top_k must be an int of at least 1"),
        (GenerationConfig, {"num_inference_steps": 0}, "num_inference_steps must be an int of at least 1"),
        (GenerationConfig, {"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        (GenerationConfig, {"eta": -0.5}, r"eta must be a number from 0, .* \(got -0\.5\)"),
        (GenerationConfig, {"eta": 1.01}, r"eta must be a number from 0, .* to 1, as DDPM \(got 1\.01\)"),
        (GenerationConfig, {"scheduler": "euler"}, "scheduler must be one of ddpm"),
    ],
)
def test_what_a_config_refuses(kind: type, fields: dict[str, Any], message: str) -> None:
    sizes = {} if kind is GenerationConfig else SIZES
    with pytest.raises(InvalidArgument, match=message):
        kind(**(sizes | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "sasrec"}, "unknown method 'sasrec'; known methods: adrec, cddrec"),
        ({"method": ["adrec"]}, "unknown method"),
        ({"colour": 1}, r"config.json \(cddrec\): unknown fields colour; known fields: batch_coupling"),
        ({"n_items": ...}, r"config.json \(cddrec\): missing fields n_items"),
        ({"schedule": ...}, "schedule: must be a JSON object"),
        ({"schedule": {"family": "wiggly"}}, "config.json: schedule: .*unknown family 'wiggly'"),
        ({"schedule": {"beta_start": "1e-4"}}, "config.json: schedule: .*beta_start must be a finite number"),
        ({"schedule": {"family": "explicit", "betas": "abc"}}, "config.json: schedule: "),
        ({"hidden_size": 10}, r"config.json \(cddrec\): .*hidden_size must be a multiple of n_heads"),
    ],
)
def test_what_a_config_file_may_not_hold(change: dict[str, Any], message: str) -> None:
    values = CDDRecConfig(**SIZES).to_dict() | change
    with pytest.raises(CheckpointError, match=message):
        config_from_dict({name: value for name, value in values.items() if value is not ...})


def test_a_generation_config_file_is_checked_too() -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json: .*top_k must be an int \(got '10'\)"):
        generation_config_from_dict({"top_k": "10"})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: unknown fields temperature"):
        generation_config_from_dict({"temperature": 1.0})
