"""Small engines with drawn weights, one per method."""

from __future__ import annotations

from typing import Any

import torch

from bench.weights import random_weights
from fastdiff.checkpoint import Checkpoint
from fastdiff.config import (
    ADRecConfig,
    CDDRecConfig,
    DimeRecConfig,
    DreamRecConfig,
    ModelConfig,
    TARecConfig,
    default_generation_config,
)
from fastdiff.engine import Engine
from fastdiff.schedule import ScheduleConfig

METHODS = ("adrec", "dreamrec", "tarec", "cddrec", "dimerec")


def small_config(method: str, **changes: Any) -> ModelConfig:
    """50 items, D = 16, a window of 8, T = 12."""
    sizes: dict[str, Any] = {"n_items": 50, "hidden_size": 16, "max_seq_len": 8}
    linear = ScheduleConfig("linear", 12, beta_start=0.01, beta_end=0.4)
    kinds: dict[str, type[ModelConfig]] = {
        "adrec": ADRecConfig,
        "dreamrec": DreamRecConfig,
        "tarec": TARecConfig,
        "cddrec": CDDRecConfig,
        "dimerec": DimeRecConfig,
    }
    if method == "adrec":
        sizes |= {"schedule": ScheduleConfig("trunc_lin", 24), "lambda_uncertainty": 0.3}
    elif method == "cddrec":
        sizes |= {"schedule": linear, "batch_coupling": "none"}
    else:
        sizes |= {"schedule": linear}
    return kinds[method](**(sizes | changes))


def small_engine(
    method: str,
    guidance_scale: float = 1.0,
    item_ids: list[Any] | None = None,
    dtype: torch.dtype | None = None,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    backend: str = "auto",
    **changes: Any,
) -> Engine:
    config = small_config(method, **changes)
    defaults = default_generation_config(config, guidance_scale)
    if generation:
        defaults = type(defaults)(**(defaults.to_dict() | generation))
    checkpoint = Checkpoint(config, defaults, random_weights(config, seed), item_ids)
    return Engine.from_checkpoint(checkpoint, dtype=dtype, backend=backend)


def first_id(engine: Engine) -> int:
    """The smallest item id of a small engine whose ids are row numbers."""
    return engine.config.first_item_row
