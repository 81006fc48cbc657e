"""What the authors' settings mean: one function per method, from settings and weights to the fields of its config.

Sizes are read from the weights; where settings state them too, they must agree. What the weights cannot tell and what
would change results has no default here, whatever default the authors' parsers have: all that is missing is named at
once. Exceptions are switches that are off where absent (ADRec's cfg_scale and geodesic), the paper's own choices for
TA-Rec, whose code is not public, and DimeRec, whose settings are the fields of `DimeRecConfig`. CDDRec takes one
setting of ours beside its authors': `batch_coupling` (see `CDDRecConfig`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastdiff.author_settings import Settings
from fastdiff.config import CONFIGS, COUPLINGS, DimeRecConfig, GenerationConfig, ModelConfig, default_generation_config
from fastdiff.errors import CheckpointError, InvalidArgument
from fastdiff.schedule import ARITHMETIC, ScheduleConfig
from fastdiff.settings_reader import Reader

logger = logging.getLogger(__name__)

Described = tuple[dict[str, Any], float]
"""Fields of a `ModelConfig` ("schedule" still as keyword arguments), and the guidance scale."""


def describe(
    method: str, settings: Settings, weights: Mapping[str, Tensor], where: str
) -> tuple[ModelConfig, GenerationConfig]:
    """The configs that settings and weights describe; a CheckpointError names all that is missing or contradictory."""
    reader = Reader(settings, weights, where)
    described, guidance_scale = DESCRIBERS[method](reader)
    reader.finish(KNOWN_SETTINGS[method])
    try:
        described["schedule"] = ScheduleConfig(**described["schedule"])
        described["schedule"].build()
        config = CONFIGS[method](**described)
        return config, default_generation_config(config, guidance_scale)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _schedule(
    reader: Reader,
    steps_name: str,
    arithmetic: str,
    named: Callable[[], dict[str, Any]],
    families: Callable[[int], list[dict[str, Any]]],
) -> dict[str, Any]:
    """Keyword arguments of the `ScheduleConfig`: the named family, or the given betas under a family's name where they
    are those of one of `families(T)`, bit for bit."""
    betas = reader.betas()
    if betas is None:
        return named() | {"arithmetic": arithmetic}
    steps = betas.shape[0]
    reader.agree(steps_name, steps, "their number", "the betas")
    given = betas.to(ARITHMETIC[arithmetic])
    for family in families(steps):
        candidate = family | {"num_train_timesteps": steps, "arithmetic": arithmetic}
        try:
            if torch.equal(ScheduleConfig(**candidate).build().betas, given):
                return candidate
        except InvalidArgument:  # a family that does not exist at this length
            continue
    explicit = {"family": "explicit", "num_train_timesteps": steps, "betas": tuple(given.tolist())}
    return explicit | {"arithmetic": arithmetic}


# --- ADRec ------------------------------------------------------------------------------------------------------------

ADREC_FAMILIES = {
    "linear": "linear",
    "cosine": "cosine_alpha_bar",
    "sqrt": "sqrt",
    "trunc_cos": "trunc_cos",
    "trunc_lin": "trunc_lin",
    "pw_lin": "pw_lin",
    "beta": "beta",
}
"""`noise_schedule` -> our family."""


def _adrec_family(name: str, steps: int) -> dict[str, Any]:
    family: dict[str, Any] = {"family": ADREC_FAMILIES[name]}
    if name == "linear":
        scale = 1000 / max(steps, 1)
        family |= {"beta_start": scale * 0.0001, "beta_end": scale * 0.02}
    return family


def _describe_adrec(reader: Reader) -> Described:
    rows, dim = reader.matrix("item_embedding.weight")
    reader.agree("item_num", rows - 1, "rows of item_embedding.weight less the pad row")
    reader.agree("hidden_size", dim, "columns of item_embedding.weight")
    decoder = "mlp" if "diffu.net.decoder.0.weight" in reader.weights else "att"
    reader.agree("dif_decoder", decoder, "the parameters under diffu.net.decoder")
    reader.agree("model", "adrec", "their names")
    if not reader.flag("is_causal", "causal attention", default=True):
        reader.problems.append(
            "is_causal is false, which is not supported: fastdiff computes the clean prefix once, and only causal "
            "attention keeps it the same at every step"
        )
    fields_of: dict[str, Any] = {
        "n_items": rows - 1,
        "hidden_size": dim,
        "max_seq_len": reader.integer("max_len", "L, the window of history"),
        "schedule": _schedule(
            reader,
            "diffusion_steps",
            "float64",
            lambda: _adrec_named(reader),
            lambda steps: [_adrec_family(name, steps) for name in ADREC_FAMILIES if name != "beta"],
        ),
        "n_heads": reader.integer("n_heads", "attention heads, 4 in the authors' code", default=4),
        "n_encoder_layers": reader.count("diffu.ag_encoder.transformer_blocks"),
        "decoder": "mlp" if decoder == "mlp" else "attention",
        "lambda_uncertainty": reader.number("lambda_uncertainty", "factor of the noisy target in the decoder's input"),
        "rescale_timesteps": _rescale_timesteps(reader),
        "geodesic": reader.flag("geodesic", "targets on the unit sphere", default=False),
    }
    if decoder == "att":
        fields_of["n_decoder_layers"] = reader.count("diffu.net.decoder.transformer_blocks")
    return fields_of, reader.number("cfg_scale", "guidance scale", default=1.0)


def _adrec_named(reader: Reader) -> dict[str, Any]:
    steps = reader.integer("diffusion_steps", "T, the length of the training chain")
    name = reader.choice("noise_schedule", "the family of betas", ADREC_FAMILIES)
    family = _adrec_family(name, steps) | {"num_train_timesteps": steps}
    if name == "beta":
        family["beta_a"] = reader.number("beta_a", "first shape parameter of the schedule")
        family["beta_b"] = reader.number("beta_b", "second shape parameter of the schedule")
    return family


def _rescale_timesteps(reader: Reader) -> bool:
    """The authors' command line keeps this one as text, and any text is true to their code, "false" too."""
    value = reader.settings.values.get("rescale_timesteps")
    if isinstance(value, str) and value:
        if value.lower() != "true":
            logger.warning(
                "%s: rescale_timesteps is the text %r, which the authors' code takes as true", reader.where, value
            )
        return True
    return reader.flag("rescale_timesteps", "whether the time embedding gets t * 1000 / T instead of t")


# --- DreamRec and TA-Rec ----------------------------------------------------------------------------------------------

DREAMREC_FAMILIES = ("linear", "exp", "cosine", "sqrt")
"""`beta_sche`; our families have the same names."""


def _describe_dreamrec(reader: Reader) -> Described:
    described = _dreamrec_network(reader, lambda: _dreamrec_named(reader))
    return described, 1.0 + reader.number("w", "guidance weight; our guidance_scale is 1 + w")


def _describe_tarec(reader: Reader) -> Described:
    described = _dreamrec_network(reader, lambda: _tarec_named(reader))
    if reader.has("one_step_timestep"):
        described["one_step_timestep"] = reader.integer("one_step_timestep", "the index that the one step is fed")
    return described, 1.0 + reader.number("w", "guidance weight; our guidance_scale is 1 + w", default=0.0)


def _dreamrec_network(reader: Reader, named: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    rows, dim = reader.matrix("item_embeddings.weight")
    slots, _ = reader.matrix("positional_embeddings.weight")
    denoiser = "mlp2" if "diffuser.2.weight" in reader.weights else "mlp1"
    reader.agree("item_num", rows - 1, "rows of item_embeddings.weight less the pad row")
    reader.agree("hidden_factor", dim, "columns of item_embeddings.weight")
    reader.agree("seq_size", slots, "rows of positional_embeddings.weight")
    reader.agree("diffuser_type", denoiser, "the layers of diffuser")
    return {
        "n_items": rows - 1,
        "hidden_size": dim,
        "max_seq_len": slots,
        "denoiser": denoiser,
        "schedule": _schedule(
            reader, "timesteps", "float32", named, lambda steps: [{"family": name} for name in DREAMREC_FAMILIES]
        ),
    }


def _dreamrec_named(reader: Reader) -> dict[str, Any]:
    family: dict[str, Any] = {
        "num_train_timesteps": reader.integer("timesteps", "T, the length of the training chain"),
        "family": reader.choice("beta_sche", "the family of betas", DREAMREC_FAMILIES),
    }
    if family["family"] == "linear" and reader.has("beta_sche"):
        family["beta_start"] = reader.number("beta_start", "the first beta")
        family["beta_end"] = reader.number("beta_end", "the last beta")
    return family


def _tarec_named(reader: Reader) -> dict[str, Any]:
    """The paper leaves the family open; linear from 1e-4 to 0.02 is its group's usual one."""
    return {
        "num_train_timesteps": reader.integer("timesteps", "T, the length of the training chain"),
        "family": reader.choice("beta_sche", "the family of betas", DREAMREC_FAMILIES, default="linear"),
        "beta_start": reader.number("beta_start", "the first beta", default=1e-4),
        "beta_end": reader.number("beta_end", "the last beta", default=0.02),
    }


# --- CDDRec -----------------------------------------------------------------------------------------------------------


def _describe_cddrec(reader: Reader) -> Described:
    rows, dim = reader.matrix("item_embeddings.weight")
    slots, _ = reader.matrix("position_embeddings.weight")
    steps, _ = reader.matrix("time_embeddings.weight")
    layers = reader.count("conditional_encoder.layer")
    reader.agree("item_size", rows, "rows of item_embeddings.weight, pad and mask rows included")
    reader.agree("hidden_size", dim, "columns of item_embeddings.weight")
    reader.agree("max_seq_length", slots, "rows of position_embeddings.weight")
    reader.agree("T", steps, "rows of time_embeddings.weight")
    reader.agree("num_hidden_layers", layers, "the layers of conditional_encoder")
    described = {
        "n_items": rows - 2,
        "hidden_size": dim,
        "max_seq_len": slots,
        "n_layers": layers,
        "n_heads": reader.integer("num_attention_heads", "heads of encoder and decoder"),
        "hidden_act": reader.choice("hidden_act", "activation of encoder and decoder", ("gelu", "relu")),
        "batch_coupling": reader.choice(
            "batch_coupling", "whether the users of a batch attend to one another", COUPLINGS, default="published"
        ),
        "schedule": _schedule(
            reader,
            "T",
            "float64",
            lambda: _cddrec_named(reader, steps),
            lambda _: [_cddrec_named(reader, steps)] if reader.has("beta_1") and reader.has("beta_T") else [],
        ),
    }
    return described, 1.0


def _cddrec_named(reader: Reader, steps: int) -> dict[str, Any]:
    """The authors draw the grid in float32 and go on in float64."""
    return {
        "family": "linear",
        "num_train_timesteps": steps,
        "beta_start": reader.number("beta_1", "the first beta"),
        "beta_end": reader.number("beta_T", "the last beta"),
        "linspace_dtype": "float32",
    }


# --- DimeRec ----------------------------------------------------------------------------------------------------------

DIMEREC_FIELDS = frozenset(item.name for item in fields(DimeRecConfig))
SCHEDULE_FIELDS = frozenset(item.name for item in fields(ScheduleConfig))


def _describe_dimerec(reader: Reader) -> Described:
    """There is no authors' code: settings are the fields of `DimeRecConfig` and, beside them or as an object
    "schedule", those of `ScheduleConfig`. What is left out keeps its default there, but for the family of betas."""
    values = reader.settings.values
    rows, dim = reader.matrix("item_embeddings.weight")
    step_rows, _ = reader.matrix("step_embeddings.weight")
    _, first_width = reader.matrix("denoiser.0.weight")
    depth = reader.count("denoiser")
    sizes: dict[str, Any] = {
        "n_items": (rows - 1, "rows of item_embeddings.weight less the pad row"),
        "hidden_size": (dim, "columns of item_embeddings.weight"),
        "n_interests": (first_width // dim - 2, "the width of denoiser.0.weight: (n_interests + 2) hidden_size"),
        "mlp_widths": ([reader.matrix(f"denoiser.{i}.weight")[0] for i in range(depth - 1)], "the rows of denoiser"),
        "guidance_extractor": (
            "self_attention" if "interest.w_1.weight" in reader.weights else "last_items",
            "the presence of interest.w_1.weight",
        ),
    }
    if "position_embeddings.weight" in reader.weights:
        sizes["max_seq_len"] = (reader.matrix("position_embeddings.weight")[0], "rows of position_embeddings.weight")
    described = {name: value for name, value in values.items() if name in DIMEREC_FIELDS and name != "schedule"}
    for name, (actual, source) in sizes.items():
        reader.agree(name, actual, source)
        described[name] = actual
    if "max_seq_len" not in described:
        described["max_seq_len"] = reader.integer("max_seq_len", "L, the window of history")
    if depth > 1 and not reader.has("mlp_activation"):
        reader.missing.append("mlp_activation (between the layers of the denoiser)")
    schedule = {name: value for name, value in values.items() if name in SCHEDULE_FIELDS}
    if isinstance(values.get("schedule"), dict):
        schedule |= values["schedule"]
    if schedule.setdefault("num_train_timesteps", step_rows - 1) != step_rows - 1:
        reader.problems.append(
            f"num_train_timesteps is {schedule['num_train_timesteps']} in the settings and {step_rows - 1} in the "
            "weights (rows of step_embeddings.weight less one)"
        )
    if "family" not in schedule:
        reader.missing.append("family (the family of betas)")
    described["schedule"] = schedule
    return described, 1.0


# --- tables -----------------------------------------------------------------------------------------------------------

DESCRIBERS: dict[str, Callable[[Reader], Described]] = {
    "adrec": _describe_adrec,
    "dreamrec": _describe_dreamrec,
    "tarec": _describe_tarec,
    "cddrec": _describe_cddrec,
    "dimerec": _describe_dimerec,
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ADREC_PARSER = _names("""
    dataset log_file random_seed max_len device num_gpu batch_size hidden_size dropout emb_dropout hidden_act dif_blocks
    epochs decay_step gamma metric_ks optimizer lr loss_lambda weight_decay momentum schedule_sampler_name
    diffusion_steps lambda_uncertainty lambda_schedule lambda_beta_a lambda_beta_b noise_schedule beta_a beta_b
    rescale_timesteps eval_interval epoch_wo_val patience long_head diversity_measure epoch_time_avg dif_decoder
    split_onebyone parallel_ag is_causal dif_objective pretrained freeze_emb model independent loss loss_scale cfg_scale
    description pcgrad geodesic item_num
""")
_DREAMREC_PARSER = _names("""
    epoch data random_seed batch_size layers hidden_factor timesteps beta_end beta_start lr l2_decay cuda dropout_rate
    w p report_epoch diffuser_type optimizer beta_sche descri item_num seq_size
""")
_CDDREC_PARSER = _names("""
    data_dir output_dir data_name do_eval ckp experimentation model_name hidden_size num_hidden_layers
    num_attention_heads hidden_act attention_probs_dropout_prob hidden_dropout_prob initializer_range max_seq_length T
    beta_1 beta_T temperature data_augmentation linear_infonce loss_type lr batch_size epochs no_cuda log_freq seed
    weight_decay adam_beta1 adam_beta2 gpu_id load_model cuda_condition data_file item_size num_users mask_id log_file
    checkpoint_path device train_matrix
""")

KNOWN_SETTINGS: dict[str, frozenset[str]] = {
    "adrec": _ADREC_PARSER | {"n_heads"},
    "dreamrec": _DREAMREC_PARSER,
    "tarec": _DREAMREC_PARSER | {"p1", "p2", "eval", "linespace", "one_step_timestep"},
    "cddrec": _CDDREC_PARSER | {"batch_coupling"},
    "dimerec": DIMEREC_FIELDS | SCHEDULE_FIELDS,
}
"""What the authors' parsers hold, training settings included: these are read or passed over without a word."""
