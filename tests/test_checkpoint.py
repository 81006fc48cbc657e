"""Checkpoints: native folders, the authors' files and live models, and what is said about bad ones."""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.published.adrec import PublishedADRec, betas_of
from bench.published.cddrec import CDDRecModel
from bench.published.dimerec import DimeRec as PublishedDimeRec
from bench.published.dreamrec import DreamRec as PublishedDreamRec
from bench.published.dreamrec import beta_table
from bench.weights import random_weights
from fastdiff.checkpoint import Checkpoint, convert, from_module, looks_like, read_folder, write_folder
from fastdiff.config import (
    ADRecConfig,
    CDDRecConfig,
    DimeRecConfig,
    DreamRecConfig,
    GenerationConfig,
    ModelConfig,
    TARecConfig,
    default_generation_config,
)
from fastdiff.errors import CheckpointError, InvalidArgument
from fastdiff.schedule import ScheduleConfig

# what the authors' settings say, and the config that they mean
ADREC_SETTINGS = {
    "max_len": 9,
    "diffusion_steps": 24,
    "noise_schedule": "trunc_lin",
    "lambda_uncertainty": 0.002,
    "rescale_timesteps": True,
    "cfg_scale": 2.5,
}
DREAMREC_SETTINGS = {"timesteps": 15, "beta_sche": "exp", "w": 2.0}
CDDREC_SETTINGS = {"num_attention_heads": 2, "hidden_act": "gelu", "beta_1": 1e-4, "beta_T": 0.04}
DIMEREC_SETTINGS = {"family": "cosine", "noise_scale": "literal", "mlp_activation": "silu"}
SIZES: dict[str, Any] = {"n_items": 21, "hidden_size": 8, "max_seq_len": 9}
CASES: dict[str, tuple[dict[str, Any], ModelConfig, float]] = {
    "adrec": (
        ADREC_SETTINGS,
        ADRecConfig(**SIZES, schedule=ScheduleConfig("trunc_lin", 24), lambda_uncertainty=0.002),
        2.5,
    ),
    "adrec-mlp": (
        ADREC_SETTINGS | {"dif_decoder": "mlp", "geodesic": True, "rescale_timesteps": False},
        ADRecConfig(
            **SIZES,
            schedule=ScheduleConfig("trunc_lin", 24),
            lambda_uncertainty=0.002,
            decoder="mlp",
            rescale_timesteps=False,
            geodesic=True,
        ),
        2.5,
    ),
    "dreamrec": (DREAMREC_SETTINGS, DreamRecConfig(**SIZES, schedule=ScheduleConfig("exp", 15, "float32")), 3.0),
    "dreamrec-mlp2": (
        DREAMREC_SETTINGS | {"diffuser_type": "mlp2", "w": 0},
        DreamRecConfig(**SIZES, schedule=ScheduleConfig("exp", 15, "float32"), denoiser="mlp2"),
        1.0,
    ),
    "tarec": ({"timesteps": 15}, TARecConfig(**SIZES, schedule=ScheduleConfig("linear", 15, "float32")), 1.0),
    "tarec-step": (
        {"timesteps": 15, "beta_sche": "cosine", "w": 1.5, "one_step_timestep": 12},
        TARecConfig(**SIZES, schedule=ScheduleConfig("cosine", 15, "float32"), one_step_timestep=12),
        2.5,
    ),
    "cddrec": (
        CDDREC_SETTINGS,
        CDDRecConfig(
            **SIZES,
            schedule=ScheduleConfig("linear", 13, beta_end=0.04, linspace_dtype="float32"),
            n_heads=2,
            n_layers=3,
        ),
        1.0,
    ),
    "dimerec": (
        DIMEREC_SETTINGS,
        DimeRecConfig(
            **SIZES,
            schedule=ScheduleConfig("cosine", 6),
            noise_scale="literal",
            mlp_activation="silu",
            mlp_widths=(12, 5),
            n_interests=3,
        ),
        1.0,
    ),
    "dimerec-rule": (
        {"schedule": {"family": "linear", "beta_end": 0.3}, "max_seq_len": 9, "normalize": "before"},
        DimeRecConfig(
            **SIZES,
            schedule=ScheduleConfig("linear", 6, beta_end=0.3),
            normalize="before",
            guidance_extractor="last_items",
        ),
        1.0,
    ),
}
METHODS = ("adrec", "dreamrec", "tarec", "cddrec", "dimerec")


class Case:
    """The authors' files of one method in a folder of their own; change them, then `convert()`."""

    def __init__(self, name: str, folder: Path) -> None:
        settings, self.config, self.guidance_scale = CASES[name]
        self.method, self.folder = self.config.method, folder
        self.settings: dict[str, Any] = dict(settings)
        self.weights = random_weights(self.config)
        self.weights_file = folder / "weights.safetensors"

    def convert(self, **arguments: Any) -> Checkpoint:
        if self.weights:
            save_file(self.weights, self.weights_file)
        settings_file = self.folder / "args.json"
        settings_file.write_text(json.dumps(self.settings))
        given = {"method": self.method, "weights_file": self.weights_file, "settings_file": settings_file}
        return convert(**(given | {"output": self.folder / "out"} | arguments))

    def refused(self, message: str, **arguments: Any) -> str:
        with pytest.raises(CheckpointError, match=message) as caught:
            self.convert(**arguments)
        assert not (self.folder / "out").exists()
        return str(caught.value)


@pytest.fixture
def case(tmp_path: Path) -> Callable[[str], Case]:
    return lambda name: Case(name, tmp_path)


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0)


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_convert_finds_the_config_that_the_settings_mean(case: Callable[[str], Case], name: str) -> None:
    source = case(name)
    converted = source.convert()
    assert converted.config == source.config
    assert converted.generation_config == default_generation_config(source.config, source.guidance_scale)
    stored = read_folder(source.folder / "out")
    assert (stored.config, stored.generation_config) == (converted.config, converted.generation_config)
    assert stored.item_ids is None
    assert_same_weights(stored.weights, source.weights)


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["safetensors", "pth", "pt"])
@pytest.mark.parametrize(
    ("name", "method", "weights_of"),
    [
        ("adrec_ml100k", "adrec", None),
        ("adrec_ml100k_cfg", "adrec", "adrec_ml100k"),
        ("adrec_mlp_decoder", "adrec", None),
        ("cddrec_office", "cddrec", None),
        ("dreamrec_zhihu", "dreamrec", None),
        ("dreamrec_zhihu", "tarec", None),
    ],
)
def test_the_authors_checkpoints_convert(
    golden: Callable[..., dict[str, Any]], tmp_path: Path, kind: str, name: str, method: str, weights_of: str | None
) -> None:
    record = golden(name, weights_of)
    weights_file = record["weights_file"]
    if kind != "safetensors":
        weights_file = tmp_path / f"model.{kind}"
        torch.save(record["weights"], weights_file)
    convert(method, weights_file, record["args_file"], tmp_path / "out")
    stored = read_folder(tmp_path / "out")
    unused = ("s_fc.", "emb_mlp.", "diff_mlp.")
    assert_same_weights(
        dict(sorted(stored.weights.items())),
        {key: weight for key, weight in sorted(record["weights"].items()) if not key.startswith(unused)},
    )
    args = record["args"]
    schedule = stored.config.schedule.build()
    if method == "adrec":
        expected = torch.from_numpy(betas_of(SimpleNamespace(**args)))
        assert stored.generation_config.guidance_scale == args["cfg_scale"]
    elif method == "cddrec":
        expected = CDDRecModel(SimpleNamespace(**args)).betas
        assert stored.config.coupled
    else:
        expected = beta_table(args["beta_sche"], args["timesteps"], args["beta_start"], args["beta_end"])
        assert stored.generation_config.guidance_scale == 1 + args["w"]
    assert torch.equal(schedule.betas, expected)


@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt", "trunc_cos", "trunc_lin", "pw_lin", "beta"])
@pytest.mark.parametrize("steps", [24, 32, 500])
def test_adrec_schedules_are_the_authors_bit_for_bit(case: Callable[[str], Case], name: str, steps: int) -> None:
    if name == "beta":
        pytest.importorskip("scipy", reason="the schedule 'beta' needs scipy")
    source = case("adrec")
    source.settings |= {"noise_schedule": name, "diffusion_steps": steps, "beta_a": 0.3, "beta_b": 10}
    expected = torch.from_numpy(betas_of(SimpleNamespace(**source.settings)))
    betas = source.convert().config.schedule.build().betas
    if name == "trunc_cos":  # numpy's cosine and Python's may differ in the last bit
        torch.testing.assert_close(betas, expected, rtol=1e-13, atol=0)
    else:
        assert torch.equal(betas, expected)


@pytest.mark.parametrize("name", ["linear", "exp", "cosine", "sqrt"])
def test_dreamrec_schedules_are_the_authors_bit_for_bit(case: Callable[[str], Case], name: str) -> None:
    source = case("dreamrec")
    source.settings |= {"beta_sche": name, "timesteps": 500, "beta_start": 2e-4, "beta_end": 0.03}
    schedule = source.convert().config.schedule.build()
    assert schedule.betas.dtype == torch.float32
    assert torch.equal(schedule.betas, beta_table(name, 500, 2e-4, 0.03))


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".txt", ".log"])
def test_every_form_of_a_settings_file_says_the_same(case: Callable[[str], Case], suffix: str) -> None:
    source = case("adrec")
    stated = source.settings | {"lr": 1e-3, "metric_ks": [5, 10], "description": "a (strange) one", "momentum": None}
    path = source.folder / f"settings{suffix}"
    if suffix == ".json":
        text = json.dumps({"method": "adrec", "dataset": "ml-100k", "args": stated})
    elif suffix in (".yaml", ".yml"):
        pytest.importorskip("yaml")
        text = "".join(f"{name}: {json.dumps(value)}  # as in config.yaml\n" for name, value in stated.items())
    else:
        device = torch.device("cpu")
        text = f"started\n{argparse.Namespace(**stated, device=device)}\nEpoch 1 (of 9)\n"
    path.write_text(text)
    assert source.convert(settings_file=path).config == source.config


@pytest.mark.parametrize("width", [1, 3, 100])
def test_a_namespace_may_be_broken_over_lines(case: Callable[[str], Case], width: int) -> None:
    source = case("adrec")
    stated = source.settings | {"description": "a :-) (strange", "quote": 'it\'s "so"', "metric_ks": [5, (10, {1: 2})]}
    parts = [f"{name}={value!r}" for name, value in stated.items()]
    lines = [", ".join(parts[at : at + width]) for at in range(0, len(parts), width)]
    text = "[12:01] args: Namespace(\n    " + ",\n    ".join(lines) + "\n)\nloss (mean): 0.3, it's late\n"
    path = source.folder / "run.log"
    path.write_text(text)
    assert source.convert(settings_file=path).config == source.config


@pytest.mark.parametrize("coupling", ["published", "none"])
def test_batch_coupling_is_a_setting_of_cddrec(
    case: Callable[[str], Case], caplog: pytest.LogCaptureFixture, coupling: str
) -> None:
    source = case("cddrec")
    source.settings["batch_coupling"] = coupling
    module, _ = live("cddrec")
    with caplog.at_level(logging.WARNING):
        configs = [source.convert().config, from_module(module, {"batch_coupling": coupling}).config]
    assert configs == [replace(source.config, batch_coupling=coupling)] * 2
    assert not caplog.records


def test_numbers_may_be_texts(case: Callable[[str], Case]) -> None:
    """YAML 1.1 reads 1e-4 as text; JSON from other tools may hold 20.0 for 20."""
    source = case("cddrec")
    source.settings |= {"beta_1": "1e-4", "num_attention_heads": 2.0, "max_seq_length": "9"}
    assert source.convert().config == source.config


def test_rescale_timesteps_as_the_authors_command_line_leaves_it(
    case: Callable[[str], Case], caplog: pytest.LogCaptureFixture
) -> None:
    source = case("adrec")
    source.settings["rescale_timesteps"] = "false"
    with caplog.at_level(logging.WARNING):
        config = source.convert().config
    assert config == source.config
    assert isinstance(config, ADRecConfig)
    assert config.rescale_timesteps
    assert "rescale_timesteps is the text 'false', which the authors' code takes as true" in caplog.text


def test_settings_of_training_pass_without_a_word_and_unknown_ones_are_reported(
    case: Callable[[str], Case], caplog: pytest.LogCaptureFixture
) -> None:
    source = case("dreamrec")
    source.settings |= {"lr": 0.005, "optimizer": "adam", "cuda": 0, "descri": "x"}
    with caplog.at_level(logging.WARNING):
        source.convert()
    assert not caplog.records
    source.settings |= {"timestep": 3, "beta_schedule": "exp"}
    with caplog.at_level(logging.WARNING):
        source.convert()
    assert "settings that fastdiff does not know and did not use: beta_schedule, timestep" in caplog.text


# --- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (
            "adrec",
            [
                r"max_len \(L, the window of history\)",
                "diffusion_steps",
                "noise_schedule",
                "lambda_uncertainty",
                "rescale_timesteps",
            ],
        ),
        ("dreamrec", [r"timesteps \(T, the length of the training chain\)", "beta_sche", r"w \(guidance weight"]),
        ("tarec", ["timesteps"]),
        ("cddrec", ["num_attention_heads", "hidden_act", "beta_1", "beta_T"]),
        ("dimerec", [r"family \(the family of betas\)", "mlp_activation"]),
        ("dimerec-rule", ["max_seq_len", "family"]),
    ],
)
def test_missing_settings_are_named_all_at_once(case: Callable[[str], Case], name: str, named: list[str]) -> None:
    source = case(name)
    source.settings = {}
    for words in named:
        source.refused(
            f"args.json: missing settings, which the weights cannot tell: .*{words}.*add them to the settings"
        )


def test_the_ends_of_a_linear_schedule_are_asked_for(case: Callable[[str], Case]) -> None:
    source = case("dreamrec")
    source.settings["beta_sche"] = "linear"
    source.refused(r"missing settings.*beta_start \(the first beta\), beta_end \(the last beta\)")
    source = case("adrec")
    source.settings["noise_schedule"] = "beta"
    source.refused("missing settings.*beta_a .*beta_b ")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adrec", {"hidden_size": 64}, r"hidden_size is 64 in the settings and 8 in the weights \(columns of item_emb"),
        ("adrec", {"item_num": 22}, "item_num is 22 in the settings and 21 in the weights"),
        ("adrec", {"dif_decoder": "mlp"}, "dif_decoder is 'mlp' in the settings and att in the weights"),
        ("adrec", {"model": "diffurec"}, "model is 'diffurec' in the settings and adrec in the weights"),
        ("adrec", {"is_causal": False}, "is_causal is false, which is not supported: .*clean prefix"),
        ("adrec", {"noise_schedule": "exp"}, r"noise_schedule must be one of linear, cosine, .* \(got 'exp'\)"),
        ("adrec", {"diffusion_steps": 2.5}, r"diffusion_steps must be a whole number \(got 2.5\)"),
        ("adrec", {"diffusion_steps": True}, r"diffusion_steps must be a whole number \(got True\)"),
        ("adrec", {"diffusion_steps": 0}, "num_train_timesteps must be an int of at least 1"),
        ("adrec", {"noise_schedule": "pw_lin", "diffusion_steps": 4}, "needs at least 10 training timesteps"),
        ("adrec", {"noise_schedule": "linear", "diffusion_steps": 4}, r"every beta must lie in \(0, 1\] \(got 1.68"),
        ("adrec", {"cfg_scale": "much"}, r"cfg_scale must be a finite number \(got 'much'\)"),
        ("adrec", {"geodesic": "maybe"}, r"geodesic must be true or false \(got 'maybe'\)"),
        ("adrec", {"n_heads": 3}, r"hidden_size must be a multiple of n_heads \(got 8 and 3\)"),
        ("adrec", {"betas": [[0.1]]}, r"betas must be a row of numbers \(got \[\[0.1\]\]\)"),
        ("adrec", {"betas": "none"}, r"betas must be a row of numbers \(got 'none'\)"),
        ("adrec", {"betas": [0.1, 0.2]}, r"diffusion_steps is 24 in the settings and 2 in the betas \(their number\)"),
        ("dreamrec", {"hidden_factor": 64}, "hidden_factor is 64 in the settings and 8 in the weights"),
        ("dreamrec", {"seq_size": 10}, "seq_size is 10 in the settings and 9 in the weights"),
        ("dreamrec", {"diffuser_type": "mlp2"}, "diffuser_type is 'mlp2' in the settings and mlp1 in the weights"),
        ("dreamrec", {"beta_sche": ["exp"]}, r"beta_sche must be one of linear, exp, cosine, sqrt \(got \['exp'\]\)"),
        ("cddrec", {"T": 20}, r"T is 20 in the settings and 13 in the weights \(rows of time_embeddings.weight\)"),
        ("cddrec", {"num_hidden_layers": 1}, "num_hidden_layers is 1 in the settings and 3 in the weights"),
        ("cddrec", {"item_size": 21}, "item_size is 21 in the settings and 23 in the weights"),
        ("cddrec", {"hidden_act": "swish"}, r"hidden_act must be one of gelu, relu \(got 'swish'\)"),
        ("cddrec", {"batch_coupling": False}, r"batch_coupling must be one of published, none \(got False\)"),
        ("adrec", {"diffusion_steps": 10**12}, r"num_train_timesteps must be at most 1000000 \(got 1000000000000\)"),
        ("cddrec", {"num_attention_heads": 5}, "hidden_size must be a multiple of n_heads"),
        ("dimerec", {"n_interests": 4}, "n_interests is 4 in the settings and 3 in the weights"),
        ("dimerec", {"mlp_widths": [12]}, r"mlp_widths is \[12\] in the settings and \[12, 5\] in the weights"),
        ("dimerec", {"num_train_timesteps": 50}, "num_train_timesteps is 50 in the settings and 6 in the weights"),
        ("dimerec", {"family": "bumpy"}, "unknown family 'bumpy'"),
        ("dimerec", {"normalize": "never"}, "normalize must be one of after, before"),
        ("dimerec", {"method": "adrec"}, "holds the settings of 'adrec', and 'dimerec' was asked for"),
    ],
)
def test_settings_that_cannot_be(
    case: Callable[[str], Case], name: str, settings: dict[str, Any], message: str
) -> None:
    source = case(name)
    source.settings |= settings
    source.refused(f"args.json: .*{message}")


def test_everything_wrong_with_the_settings_is_said_at_once(case: Callable[[str], Case]) -> None:
    source = case("cddrec")
    source.settings = {"T": 20, "hidden_act": "swish", "beta_1": "small"}
    said = source.refused("args.json")
    for words in ("num_attention_heads (heads", "beta_T (the last beta)", "T is 20", "hidden_act must", "beta_1 must"):
        assert words in said


@pytest.mark.parametrize(
    ("file_name", "text", "message"),
    [
        ("absent.json", None, "does not exist; give the file with the settings of the training run"),
        ("broken.json", '{"T": ', r"cannot be read as JSON \("),
        ("list.json", "[1, 2]", r"must hold names and values \(got list\)"),
        ("broken.yaml", "a: [1\nb: 2", r"cannot be read as YAML \("),
        ("empty.yaml", "", r"must hold names and values \(got NoneType\)"),
        ("notes.txt", "T=20", r"holds no Namespace\(...\); accepted are .yaml and .json files"),
        ("odd.txt", "Namespace(f=<function f at 0x7f>, T=2)", r"cannot be parsed \(got 'Namespace\(f=<function"),
        ("open.txt", "Namespace(T=2", "cannot be parsed"),
        ("closed.txt", "Namespace)", r"holds no Namespace\(...\)"),
        ("deep.txt", f"Namespace(T={'(' * 3000}2{')' * 3000})", "cannot be parsed"),
        ("deep.json", "[" * 100_000, r"cannot be read as JSON \(maximum recursion depth exceeded"),
        ("deep.yaml", "[" * 5000, r"cannot be read as YAML \("),
        ("long.json", f'{{"T": {"1" * 5000}}}', r"cannot be read as JSON \(Exceeds the limit"),
        ("latin.txt", b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_bad_settings_files(
    case: Callable[[str], Case], file_name: str, text: str | bytes | None, message: str
) -> None:
    source = case("cddrec")
    path = source.folder / file_name
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    if path.suffix == ".yaml":
        pytest.importorskip("yaml")
    source.refused(f"{file_name}: .*{message}", settings_file=path)


def test_a_namespace_is_parsed_and_never_run(case: Callable[[str], Case], tmp_path: Path) -> None:
    source = case("cddrec")
    trap = tmp_path / "trap"
    path = tmp_path / "settings.txt"
    path.write_text(f"Namespace(T=open({str(trap)!r}, 'w'), beta_1=0.1)")
    source.refused("missing settings", settings_file=path)
    assert not trap.exists()


# --- bad weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_wrong_parameter_is_named(case: Callable[[str], Case], method: str) -> None:
    source = case(method)
    last = sorted(source.weights)[-1]
    biases = [name for name in source.weights if name.endswith("bias")][:3]
    for name in biases[:2]:
        del source.weights[name]
    source.weights[biases[2]] = torch.zeros(3, 77)
    source.weights["lm_head.weight"] = torch.zeros(2, 2)
    said = source.refused("weights.safetensors: the weights are not those of the")
    for words in [*biases[:2], f"{biases[2]} is [3, 77], expected [", "unexpected: lm_head.weight [2, 2]"]:
        assert words in said
    assert last not in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(case: Callable[[str], Case], value: float) -> None:
    source = case("cddrec")
    source.weights["decoder.linear1.bias"][3] = value
    source.refused("NaN or infinity in decoder.linear1.bias; the training diverged")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_must_be_floating_and_not_quantised(case: Callable[[str], Case], dtype: torch.dtype) -> None:
    source = case("cddrec")
    source.weights["LayerNorm.bias"] = torch.zeros(8).to(dtype)
    source.refused(
        r"parameters must be float32, float64, bfloat16 or float16 \(got LayerNorm.bias "
        rf"\({dtype}\)\); convert them with .float\(\)"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_every_other_floating_dtype_convert(case: Callable[[str], Case], dtype: torch.dtype) -> None:
    source = case("dimerec")
    source.weights = {name: weight.to(dtype) for name, weight in source.weights.items()}
    source.convert()
    assert_same_weights(read_folder(source.folder / "out").weights, source.weights)


def test_weights_must_be_dense_and_there(case: Callable[[str], Case]) -> None:
    source = case("cddrec")
    path = source.folder / "model.pth"
    table = source.weights["item_embeddings.weight"]
    for weight, message in (
        (table.to_sparse(), r"parameters must be dense tensors \(got item_embeddings.weight \(torch.sparse_coo\)\)"),
        (
            table.to_sparse_csr(),
            r"must be dense tensors \(got item_embeddings.weight \(torch.sparse_csr\)\); save them",
        ),
        (table.to("meta"), "without numbers, on the meta device: item_embeddings.weight; load the trained weights"),
    ):
        torch.save(source.weights | {"item_embeddings.weight": weight}, path)
        source.refused(f"model.pth: .*{message}", weights_file=path)


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_of_another_method_are_recognised(case: Callable[[str], Case], method: str) -> None:
    source = case(method)
    found = "dreamrec" if method == "tarec" else method
    assert looks_like(source.weights) == found
    wrong = "adrec" if method == "cddrec" else "cddrec"
    source.refused(f"these are the parameters of {found}, not of {wrong}; give the method '{found}'", method=wrong)


def test_the_weights_of_no_known_method(case: Callable[[str], Case]) -> None:
    source = case("cddrec")
    source.weights = {f"layer{i}.weight": torch.zeros(2) for i in range(7)}
    assert looks_like(source.weights) is None
    source.refused(
        "these are not the parameters of cddrec: item_embeddings.weight, time_embeddings.weight, decoder.multihead_attn"
        r".* missing \(got layer0.weight, .* and 2 more\)"
    )
    source.refused("convert: unknown method 'sasrec'; known methods: adrec, cddrec", method="sasrec")


def test_a_weight_that_sizes_come_from_must_be_a_matrix(case: Callable[[str], Case]) -> None:
    source = case("cddrec")
    source.weights["position_embeddings.weight"] = torch.zeros(4)
    source.refused(r"must hold a matrix position_embeddings.weight, from which sizes are read \(got \[4\]\)")
    del source.weights["position_embeddings.weight"]
    source.refused(r"must hold a matrix position_embeddings.weight, .*\(got none\)")


# --- weight files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_wrappers_are_taken_off(case: Callable[[str], Case], prefix: str) -> None:
    source = case("dimerec")
    plain = dict(source.weights)
    source.weights = {prefix + name: weight for name, weight in plain.items()}
    assert_same_weights(source.convert().weights, plain)


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_where_a_pickled_file_may_hold_its_state_dict(
    case: Callable[[str], Case], key: str | None, zipped: bool
) -> None:
    source = case("cddrec")
    content = source.weights if key is None else {"epoch": 3, key: source.weights, "optimizer": {"lr": 0.1}}
    path = source.folder / "model.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same_weights(source.convert(weights_file=path).weights, source.weights)


def _whole(suffix: str, folder: Path) -> bytes:
    path = folder / f"whole{suffix}"
    weights = {"a": torch.zeros(64, 64)}
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("damage", ["empty", "cut in its header", "cut at its end", "text"])
def test_damaged_weight_files(case: Callable[[str], Case], suffix: str, damage: str) -> None:
    source = case("cddrec")
    whole = _whole(suffix, source.folder)
    path = source.folder / f"damaged{suffix}"
    cut = {"empty": b"", "cut in its header": whole[:30], "cut at its end": whole[:-200], "text": b"hello, world\n" * 9}
    path.write_bytes(cut[damage])
    kind = "safetensors" if suffix == ".safetensors" else "a PyTorch file"
    source.refused(f"cannot be read as {kind} .*the file is truncated or of another format", weights_file=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            nn.Linear(2, 2),
            r"holds pickled Python objects \(torch.nn.modules.linear.Linear\).*torch.save\(model.state_dict",
        ),
        (argparse.Namespace(T=3), r"holds pickled Python objects \(argparse.Namespace\), not only tensors"),
        (torch.zeros(3), r"holds no state dict \(got a Tensor\)"),
        ({"epoch": 3, "loss": 0.5}, r"holds no state dict \(got a dict with epoch, loss\)"),
        ({}, r"holds no state dict \(got a dict with nothing\)"),
        (
            {"model": {"a": 3}},
            r"holds no state dict .*accepted: a dict from names to tensors, bare or under state_dict",
        ),
    ],
)
def test_files_without_a_state_dict(case: Callable[[str], Case], content: Any, message: str) -> None:
    source = case("cddrec")
    path = source.folder / "model.pth"
    torch.save(content, path)
    source.refused(f"model.pth: {message}", weights_file=path)


@pytest.mark.parametrize("name", ["weights_file", "settings_file", "output", "item_ids_file"])
def test_what_is_no_path(case: Callable[[str], Case], name: str) -> None:
    for value in (5, b"folder", *([] if name == "item_ids_file" else [None])):
        with pytest.raises(InvalidArgument, match=rf"^convert: {name} must be a path, a str or a pathlib.Path \(got "):
            case("cddrec").convert(**{name: value})


def test_weight_files_that_are_none(case: Callable[[str], Case]) -> None:
    source = case("cddrec")
    source.refused("absent.pth: does not exist; give the file that holds", weights_file=source.folder / "absent.pth")
    source.refused("is a folder; give the file", weights_file=source.folder)
    path = source.folder / "model.npz"
    path.write_bytes(b"")
    source.refused(r"unknown kind of file \(got .npz\); accepted: .safetensors, .pth, .pt", weights_file=path)


# --- item ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_name", "text", "expected"),
    [
        ("ids.json", json.dumps([f"item-{i}" for i in range(21)]), [f"item-{i}" for i in range(21)]),
        ("ids.json", json.dumps(list(range(100, 121))), list(range(100, 121))),
        ("ids.txt", "\n".join(str(i) for i in range(-23, -2)), list(range(-23, -2))),
        ("ids.txt", "\n".join(str(i - (1 << 63)) for i in range(21)), [i - (1 << 63) for i in range(21)]),
        ("ids.txt", "-0\n" + "\n".join(str(i) for i in range(20)), ["-0", *map(str, range(20))]),
        ("ids.txt", "".join(f"B00{i:02}\n" for i in range(21)), [f"B00{i:02}" for i in range(21)]),
        ("ids.txt", "".join(f"{i:03}\n" for i in range(21)), [f"{i:03}" for i in range(21)]),
    ],
)
def test_item_ids_come_along(case: Callable[[str], Case], file_name: str, text: str, expected: list[Any]) -> None:
    source = case("cddrec")
    path = source.folder / file_name
    path.write_text(text)
    assert source.convert(item_ids_file=path).item_ids == expected
    assert read_folder(source.folder / "out").item_ids == expected


@pytest.mark.parametrize(
    ("file_name", "text", "message"),
    [
        ("ids.json", json.dumps(list(range(23))), r"one id per real item, in row order, 21 of them \(got 23\)"),
        ("ids.json", json.dumps({"a": 1}), r"must be a list of item ids \(got dict\)"),
        ("ids.json", json.dumps([1.5] * 21), r"all integers or all strings \(got 1.5 of type float at index 0\)"),
        ("ids.json", json.dumps([1, "a", *range(19)]), r"all integers or all strings \(got 'a' .* at index 1\)"),
        ("ids.json", json.dumps([True] * 21), r"all integers or all strings \(got True of type bool at index 0\)"),
        ("ids.json", json.dumps([[1]] * 21), r"all integers or all strings \(got \[1\] of type list at index 0\)"),
        ("ids.json", json.dumps([*range(20), 7]), r"\[20\]: item id 7 is already at index 7"),
        ("ids.json", json.dumps([*range(20), -1]), r"\[20\]: -1 cannot be an item id"),
        ("ids.json", json.dumps([*range(20), 1 << 63]), r"\[20\]: integers must have 64 bits"),
        ("ids.json", f"[{'1' * 5000}]", "cannot be read as JSON"),
        ("ids.json", "[" * 100_000, r"cannot be read as JSON \(maximum recursion depth exceeded"),
        ("ids.json", "[1, 2", "cannot be read as JSON"),
        ("ids.txt", "\n".join(str(i) for i in range(-2, 19)), r"\[1\]: -1 cannot be an item id"),
        ("ids.txt", "\n".join(str(i + (1 << 63) - 3) for i in range(21)), r"\[3\]: integers must have 64 bits"),
        ("ids.txt", f"7\n{'1' * 5000}\n8", r"\[1\]: integers must have 64 bits \(got '1+\.\.\.\); use strings"),
        ("ids.txt", "a\n\nb\n", r"\[1\]: an id must not be empty"),
        ("ids.txt", None, "does not exist; give the file with the external ids of the items"),
    ],
)
def test_bad_item_ids(case: Callable[[str], Case], file_name: str, text: str | None, message: str) -> None:
    source = case("cddrec")
    path = source.folder / file_name
    if text is not None:
        path.write_text(text)
    source.refused(f"{file_name}.*{message}", item_ids_file=path)


# --- native folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint() -> Checkpoint:
    config = CASES["cddrec"][1]
    return Checkpoint(config, GenerationConfig(scheduler="one_step"), random_weights(config))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_made_with_its_parents_and_nothing_beside_it(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = tmp_path / "models" / "one"
    write_folder(folder, checkpoint)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    assert sorted(contents(folder)) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("before", ["empty", "an earlier checkpoint"])
def test_what_write_folder_replaces(tmp_path: Path, checkpoint: Checkpoint, before: str) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    if before != "empty":
        write_folder(folder, replace(checkpoint, item_ids=list(range(21))))
    write_folder(folder, checkpoint)
    assert sorted(contents(folder)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_same_weights(read_folder(folder).weights, checkpoint.weights)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_what_write_folder_leaves_alone(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds files that are not of a checkpoint \(thesis.tex\).*new folder"):
        write_folder(tmp_path, checkpoint)
    with pytest.raises(CheckpointError, match=r"thesis.tex: is a file; give the name of a folder"):
        write_folder(tmp_path / "thesis.tex", checkpoint)
    assert contents(tmp_path) == before


def test_a_write_that_fails_leaves_the_earlier_checkpoint(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "one"
    write_folder(folder, checkpoint)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"save_pretrained: item_ids: .*21 of them \(got 1\)"):
        write_folder(folder, replace(checkpoint, item_ids=["only one"]))

    rename = Path.rename

    def fail_on_the_new(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_new)
    with pytest.raises(OSError, match="the disk is gone"):
        write_folder(folder, checkpoint)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_views_and_shared_storage_can_be_written(tmp_path: Path, checkpoint: Checkpoint) -> None:
    table = checkpoint.weights["time_embeddings.weight"]
    shared = torch.randn(20, 8)
    weights = checkpoint.weights | {
        "time_embeddings.weight": table.T.contiguous().T,
        "LayerNorm.weight": shared[0],
        "LayerNorm.bias": shared[0],
        "position_embeddings.weight": shared[:9].requires_grad_(),
    }
    write_folder(tmp_path / "one", replace(checkpoint, weights=weights))
    assert_same_weights(read_folder(tmp_path / "one").weights, {name: w.detach() for name, w in weights.items()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"config.json": None}, "has no config.json; a native folder holds .*make one .* with `fastdiff convert`"),
        (
            {"model.safetensors": None, "generation_config.json": None},
            "has no generation_config.json, model.safetensors",
        ),
        ({"config.json": "{"}, r"config.json: cannot be read as JSON \("),
        ({"config.json": "[]"}, r"config.json: must hold a JSON object \(got list\)"),
        ({"config.json": '{"method": "x"}'}, "unknown method 'x'"),
        ({"generation_config.json": '{"top_k": 0}'}, r"generation_config.json: .*top_k must be an int of at least 1"),
        ({"config.json": "[" * 100_000}, r"config.json: cannot be read as JSON \(maximum recursion depth"),
        (
            {"config.json": '{"method": "cddrec", "schedule": {"num_train_timesteps": 1000000000000}}'},
            "config.json: schedule: .*num_train_timesteps must be at most 1000000 ",
        ),
        ({"model.safetensors": "cut"}, "model.safetensors: cannot be read as safetensors"),
        (
            {"item_ids.json": "[1]"},
            r"item_ids.json: must hold one id per real item, in row order, 21 of them \(got 1\)",
        ),
    ],
)
def test_bad_folders(tmp_path: Path, checkpoint: Checkpoint, damage: dict[str, str | None], message: str) -> None:
    folder = tmp_path / "one"
    write_folder(folder, checkpoint)
    for name, text in damage.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_folder(folder)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"from_pretrained: .*nowhere does not exist; give a folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file; give a folder"):
        read_folder(tmp_path / "file")


def test_a_config_that_does_not_fit_its_weights(tmp_path: Path, checkpoint: Checkpoint) -> None:
    write_folder(tmp_path / "one", replace(checkpoint, config=replace(CASES["cddrec"][1], n_items=20)))
    with pytest.raises(CheckpointError, match=r"item_embeddings.weight is \[23, 8\], expected \[22, 8\]"):
        read_folder(tmp_path / "one")


# --- live models ------------------------------------------------------------------------------------------------------


def live(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A published module with the sizes of a case, and the settings that it does not hold itself."""
    settings, config, _ = CASES[name]
    module: nn.Module
    if isinstance(config, ADRecConfig):
        decoder = "mlp" if config.decoder == "mlp" else "att"
        module = PublishedADRec(settings | {"item_num": 21, "hidden_size": 8, "dif_decoder": decoder})
        return module, {}
    if isinstance(config, CDDRecConfig):
        sizes = {"hidden_size": 8, "num_hidden_layers": 3, "max_seq_length": 9, "T": 13, "item_size": 23}
        return CDDRecModel(SimpleNamespace(**(settings | sizes))), {}
    if isinstance(config, DreamRecConfig):
        return PublishedDreamRec(8, 21, 9, config.denoiser), {"method": config.method} | settings
    assert isinstance(config, DimeRecConfig)
    return PublishedDimeRec(config), {}


@pytest.mark.parametrize("name", CASES)
def test_a_live_model_is_recognised_with_its_settings(name: str) -> None:
    module, settings = live(name)
    _, config, guidance_scale = CASES[name]
    checkpoint = from_module(module, settings)
    assert checkpoint.config == config
    assert checkpoint.generation_config == default_generation_config(config, guidance_scale)
    state = module.state_dict()
    for key, weight in checkpoint.weights.items():
        assert torch.equal(weight, state[key])
        assert weight.data_ptr() != state[key].data_ptr(), f"{key} is shared with the model"
        assert not weight.requires_grad


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda module: torch.compile(nn.DataParallel(module))]
)
def test_wrapped_models_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module, settings = live("cddrec")
    assert from_module(wrap(module), settings).config == CASES["cddrec"][1]


def test_a_model_with_a_compiled_part() -> None:
    module, settings = live("adrec")
    assert isinstance(module, PublishedADRec)
    module.diffu.net = torch.compile(module.diffu.net)
    assert from_module(module, settings).config == CASES["adrec"][1]


def test_the_model_itself_is_believed_over_its_args() -> None:
    module, _ = live("adrec")
    assert isinstance(module, PublishedADRec)
    module.diffu.cfg_scale = 4.0
    assert from_module(module).generation_config.guidance_scale == 4.0
    module.diffu.betas = module.diffu.betas * 0.5
    schedule = from_module(module).config.schedule
    assert schedule.family == "explicit"
    assert torch.equal(schedule.build().betas, torch.from_numpy(module.diffu.betas))


def test_betas_of_a_known_family_keep_its_name() -> None:
    module, settings = live("dreamrec")
    del settings["beta_sche"], settings["timesteps"]
    for name in ("exp", "cosine", "sqrt"):
        given = settings | {"betas": beta_table(name, 40, 1e-4, 0.02)}
        assert from_module(module, given).config.schedule == ScheduleConfig(name, 40, "float32")
    own = torch.linspace(0.01, 0.3, 7)
    schedule = from_module(module, settings | {"betas": own}).config.schedule
    assert (schedule.family, schedule.arithmetic) == ("explicit", "float32")
    assert torch.equal(schedule.build().betas, own)


def test_what_a_live_model_does_not_hold_is_asked_for() -> None:
    module, _ = live("dreamrec")
    with pytest.raises(CheckpointError, match=r"accelerate: DreamRec: missing settings.*timesteps .*beta_sche .*w \("):
        from_module(module)


def test_settings_may_repeat_the_model_and_not_contradict_it() -> None:
    module, _ = live("cddrec")
    assert from_module(module, {"beta_T": 0.04, "hidden_act": "gelu"}).config == CASES["cddrec"][1]
    with pytest.raises(CheckpointError, match=r"beta_T is 0.5 in the settings and 0.04 in the model; leave out"):
        from_module(module, {"beta_T": 0.5})


def test_unknown_settings_of_a_call_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    module, settings = live("dreamrec")
    with caplog.at_level(logging.WARNING):
        from_module(module, settings | {"beta_schedule": "exp"})
    assert "did not use: beta_schedule" in caplog.text


def test_models_that_are_not_known() -> None:
    with pytest.raises(InvalidArgument, match=r"accelerate: needs a torch.nn.Module .*\(got str\)"):
        from_module("model.pth")  # type: ignore[arg-type]
    with pytest.raises(
        CheckpointError, match=r"accelerate: Linear is not a model that fastdiff knows by its parameters"
    ):
        from_module(nn.Linear(3, 3))
    module, _ = live("cddrec")
    with pytest.raises(CheckpointError, match="these are the parameters of cddrec, not of tarec"):
        from_module(module, {"method": "tarec"})
    with pytest.raises(CheckpointError, match="unknown method 'bert'"):
        from_module(module, {"method": "bert"})
    with torch.no_grad():
        module.decoder.linear1.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in decoder.linear1.weight"):
        from_module(module)
