"""Every fact about a model that its weights do not hold, as frozen dataclasses; what `config.json` stores."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from fastdiff.errors import CheckpointError, InvalidArgument
from fastdiff.plan import PREDICTION_TYPES, TIMESTEP_SPACINGS, VARIANCE_TYPES
from fastdiff.schedule import ScheduleConfig

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What weights are stored in and models run in."""
AGGREGATIONS = ("max", "mean")
COUPLINGS = ("published", "none")
RANKINGS = ("clean", "published")
SCHEDULERS = ("ddpm", "ddim", "one_step", "closed_form")


@dataclass(frozen=True)
class GenerationConfig:
    """What `generate()` does where its argument is None; stored as `generation_config.json`.

    scheduler            "ddpm", "ddim", "one_step" or "closed_form"
    num_inference_steps  S; None runs the whole training chain (one step for "one_step")
    timestep_spacing     how S steps are spread over the chain: "leading", "trailing", "linspace"
    guidance_scale       g of u + g (c - u), 1 = off (DreamRec's w is g - 1)
    eta                  DDIM's stochasticity, 0 to 1
    filter_seen          leave the items of a user's own history out of the clean ranking
    """

    top_k: int = 10
    scheduler: str = "ddpm"
    num_inference_steps: int | None = None
    timestep_spacing: str = "trailing"
    guidance_scale: float = 1.0
    eta: float = 0.0
    num_samples: int = 1
    aggregation: str = "max"
    filter_seen: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        _check_counts(self, "top_k", "num_samples")
        if self.num_inference_steps is not None:
            _check_counts(self, "num_inference_steps")
        if not 0 <= self.eta <= 1:
            raise InvalidArgument(
                f"GenerationConfig: eta must be a number from 0, deterministic, to 1, as DDPM (got {self.eta!r})"
            )
        _check(self, "scheduler", SCHEDULERS)
        _check(self, "timestep_spacing", TIMESTEP_SPACINGS)
        _check(self, "aggregation", AGGREGATIONS)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelConfig:
    """What all methods share.

    n_items       N, real items; the item table also holds `special_rows`
    hidden_size   D        max_seq_len  L, the window of history that the model sees
    schedule      the training chain
    """

    method: ClassVar[str] = ""
    pad_side: ClassVar[str] = "left"

    n_items: int
    hidden_size: int
    max_seq_len: int
    schedule: ScheduleConfig
    prediction_type: str = "sample"
    variance_type: str = "fixed_small"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, ScheduleConfig):
            raise InvalidArgument(
                f"{type(self).__name__}: schedule must be a ScheduleConfig (got {type(self.schedule).__name__})"
            )
        _check_types(self)
        _check_counts(self, "n_items", "hidden_size", "max_seq_len")
        _check(self, "prediction_type", PREDICTION_TYPES)
        _check(self, "variance_type", VARIANCE_TYPES)

    # rows of the item table: where the real items are, and which rows are not items
    @property
    def pad_id(self) -> int:
        """The row that fills the places of a history that hold no item."""
        return 0

    @property
    def first_item_row(self) -> int:
        """The row of the first real item; real items are rows first .. first + n_items - 1."""
        return 1

    @property
    def special_rows(self) -> dict[int, str]:
        """Rows of the item table that are no items, with the name under which the published ranking shows them."""
        return {self.pad_id: "[PAD]"}

    @property
    def n_rows(self) -> int:
        return self.n_items + len(self.special_rows)

    # how the method samples and ranks
    @property
    def noise_at_last_step(self) -> bool:
        return False

    @property
    def metric(self) -> str:
        return "dot"

    @property
    def published_seen_score(self) -> float | None:
        """The score that the authors' ranking gives to seen items; None leaves them as they are."""
        return None

    @property
    def coupled(self) -> bool:
        """Whether a row's result depends on the batch that it is in."""
        return False

    @property
    def pad_inside(self) -> bool:
        """Whether the pad id may stand between the items of a history, as a masked slot."""
        return False

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"method": self.method}
        for item in fields(self):
            value = getattr(self, item.name)
            values[item.name] = value.to_dict() if isinstance(value, ScheduleConfig) else value
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class ADRecConfig(ModelConfig):
    """ADRec (KDD 2025). See `fastdiff/models/adrec.py`.

    decoder             "attention" or "mlp"
    lambda_uncertainty  factor of (x_t + time) added to the condition
    rescale_timesteps   feed t * 1000 / T to the time embedding instead of t
    geodesic            targets on the unit sphere: normalise the clean prefix and x after every step
    """

    method: ClassVar[str] = "adrec"

    variance_type: str = "fixed_large"
    n_heads: int = 4
    n_encoder_layers: int = 2
    n_decoder_layers: int = 2
    decoder: str = "attention"
    lambda_uncertainty: float = 0.001
    rescale_timesteps: bool = True
    geodesic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "decoder", ("attention", "mlp"))
        _check_counts(self, "n_encoder_layers", "n_decoder_layers")
        _check_heads(self, self.n_heads)


@dataclass(frozen=True)
class DreamRecConfig(ModelConfig):
    """DreamRec (NeurIPS 2023). See `fastdiff/models/dreamrec.py`. `denoiser`: "mlp1" (one linear layer) or "mlp2"."""

    method: ClassVar[str] = "dreamrec"
    pad_side: ClassVar[str] = "right"

    denoiser: str = "mlp1"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "denoiser", ("mlp1", "mlp2"))

    @property
    def pad_id(self) -> int:
        return self.n_items

    @property
    def first_item_row(self) -> int:
        return 0


@dataclass(frozen=True)
class TARecConfig(DreamRecConfig):
    """TA-Rec (NeurIPS 2025). See `fastdiff/models/tarec.py`.

    one_step_timestep  the index fed to the denoiser by the one-step sampler; None is T-1
    """

    method: ClassVar[str] = "tarec"

    one_step_timestep: int | None = None


@dataclass(frozen=True)
class CDDRecConfig(ModelConfig):
    """CDDRec (PAKDD 2024). See `fastdiff/models/cddrec.py`.

    batch_coupling  "published": decoder self-attention runs over the users of a batch, as the authors' code does;
                    "none": each user alone
    hidden_act      of encoder and decoder: "gelu" or "relu"
    """

    method: ClassVar[str] = "cddrec"

    prediction_type: str = "prev_mean"
    variance_type: str = "fixed_small_clipped"
    n_heads: int = 4
    n_layers: int = 1
    hidden_act: str = "gelu"
    batch_coupling: str = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "batch_coupling", COUPLINGS)
        _check(self, "hidden_act", ("gelu", "relu"))
        _check_counts(self, "n_layers")
        _check_heads(self, self.n_heads)

    @property
    def special_rows(self) -> dict[int, str]:
        return {0: "[PAD]", self.n_items + 1: "[MASK]"}

    @property
    def noise_at_last_step(self) -> bool:
        return True

    @property
    def metric(self) -> str:
        return "cosine"

    @property
    def published_seen_score(self) -> float | None:
        return 0.0

    @property
    def coupled(self) -> bool:
        return self.batch_coupling == "published"

    @property
    def pad_inside(self) -> bool:
        """The authors number Office's items from 0: a real item shares the pad id and is masked wherever it stands."""
        return True


@dataclass(frozen=True)
class DimeRecConfig(ModelConfig):
    """DimeRec (WSDM 2025). See `fastdiff/models/dimerec.py`; no public code, so each open choice is a setting.

    n_interests          K interest vectors that guide the denoiser
    guidance_extractor   "self_attention" (learned, ComiRec-SA) or "last_items" (the last K items, no parameters)
    positions_in_values  add the position embeddings to the values of the learned extractor too
    mlp_widths           hidden widths of the denoiser; () makes it one linear layer
    mlp_activation       between its layers
    mlp_input_order      how its input is concatenated: "x" the state, "t" the step embedding, "g" the interests
    noise_scale          "sqrt": sqrt of the posterior variance; "literal": the variance itself, as the paper prints it
    normalize            L2-normalise "after" each update (the paper) or "before" each denoiser call (its follow-up)
    normalize_start      put x_T on the sphere before the first step
    normalize_items      score against unit-length items
    step_offset          step embedding row = timestep index + offset (the table has T + 1 rows, step t = 1..T)
    """

    method: ClassVar[str] = "dimerec"
    pad_side: ClassVar[str] = "right"

    n_interests: int = 4
    guidance_extractor: str = "self_attention"
    positions_in_values: bool = False
    mlp_widths: tuple[int, ...] = ()
    mlp_activation: str = "gelu"
    mlp_input_order: tuple[str, ...] = ("x", "t", "g")
    noise_scale: str = "sqrt"
    normalize: str = "after"
    normalize_start: bool = True
    normalize_items: bool = False
    step_offset: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "n_interests")
        object.__setattr__(self, "mlp_widths", tuple(self.mlp_widths))
        object.__setattr__(self, "mlp_input_order", tuple(self.mlp_input_order))
        if any(not isinstance(width, int) or isinstance(width, bool) or width < 1 for width in self.mlp_widths):
            raise InvalidArgument(
                f"DimeRecConfig: mlp_widths must hold ints of at least 1 (got {list(self.mlp_widths)!r})"
            )
        _check(self, "guidance_extractor", ("self_attention", "last_items"))
        _check(self, "mlp_activation", ("gelu", "relu", "silu", "tanh"))
        _check(self, "noise_scale", ("sqrt", "literal"))
        _check(self, "normalize", ("after", "before"))
        if sorted(self.mlp_input_order) != ["g", "t", "x"]:
            raise InvalidArgument(
                f"DimeRecConfig: mlp_input_order must hold 'x', 't' and 'g' once each (got {self.mlp_input_order!r})"
            )

    @property
    def metric(self) -> str:
        return "cosine" if self.normalize_items else "dot"


CONFIGS: dict[str, type[ModelConfig]] = {
    config.method: config for config in (ADRecConfig, DreamRecConfig, TARecConfig, CDDRecConfig, DimeRecConfig)
}


def default_generation_config(config: ModelConfig, guidance_scale: float = 1.0) -> GenerationConfig:
    """How each paper samples: TA-Rec and CDDRec in one step, the others along the whole chain."""
    if config.method in ("tarec", "cddrec"):
        return GenerationConfig(scheduler="one_step", guidance_scale=guidance_scale)
    return GenerationConfig(scheduler="ddpm", guidance_scale=guidance_scale)


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The config that `ModelConfig.to_dict` wrote; unknown and missing fields are named."""
    values = dict(values)
    method = values.pop("method", None)
    if not isinstance(method, str) or method not in CONFIGS:
        raise CheckpointError(
            f"config.json: unknown method {method!r}; known methods: {', '.join(sorted(CONFIGS))}; "
            "is this folder one that `fastdiff convert` or `save_pretrained` wrote?"
        )
    kind = CONFIGS[method]
    values["schedule"] = _construct(ScheduleConfig, values.get("schedule"), "config.json: schedule")
    config: ModelConfig = _construct(kind, values, f"config.json ({method})")
    return config


def generation_config_from_dict(values: dict[str, Any]) -> GenerationConfig:
    config: GenerationConfig = _construct(GenerationConfig, values, "generation_config.json")
    return config


def _construct(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: must be a JSON object (got {type(values).__name__})")
    known = {item.name: item.default is MISSING for item in fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise CheckpointError(f"{where}: unknown fields {', '.join(unknown)}; known fields: {', '.join(sorted(known))}")
    missing = [name for name, required in known.items() if required and name not in values]
    if missing:
        raise CheckpointError(f"{where}: missing fields {', '.join(missing)}")
    try:
        config = kind(**values)
        _check_types(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return config


_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an int"),
    "int | None": ((int, type(None)), "an int or null"),
    "float": ((int, float), "a finite number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a string"),
}
"""Annotation of a field -> the types that it accepts, in Python and in words."""


def _check_types(config: Any) -> None:
    """Fields hold what their annotations say: a config may come from a file that somebody edited."""
    for item in fields(config):
        if item.type not in _TYPES:
            continue
        accepted, words = _TYPES[item.type]
        value = getattr(config, item.name)
        wrong = not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidArgument(f"{type(config).__name__}: {item.name} must be {words} (got {value!r})")


def _check(config: object, name: str, accepted: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in accepted:
        raise InvalidArgument(f"{type(config).__name__}: {name} must be one of {', '.join(accepted)} (got {value!r})")


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidArgument(f"{type(config).__name__}: {name} must be an int of at least 1 (got {value!r})")


def _check_heads(config: ModelConfig, n_heads: int) -> None:
    if n_heads < 1 or config.hidden_size % n_heads:
        raise InvalidArgument(
            f"{type(config).__name__}: hidden_size must be a multiple of n_heads "
            f"(got {config.hidden_size} and {n_heads})"
        )
