"""fastdiff's own side of a case: every way to run its ops here, as models and as engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import GenerationConfig, ModelConfig, default_generation_config
from fastdiff.engine import Engine
from fastdiff.models import model_class
from fastdiff.models.base import Model
from fastdiff.ops.backend import BACKENDS, Op
from fastdiff.ops.score_topk import score_topk


def bindings(ops: Iterable[Op], device: torch.device) -> dict[str, str]:
    """Each different way to run `ops` here: label -> the backend to ask for.

    A backend is listed where it has all of the ops; "auto" where it mixes backends, for example as "cpu+torch".
    """
    ops = list(ops)
    ways = {name: name for name in BACKENDS if all(op.why_not(name, device) is None for op in ops)}
    chosen = sorted({op.bind("auto", device).backend for op in ops})
    if len(chosen) > 1:
        ways["+".join(chosen)] = "auto"
    return ways


def our_models(config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> dict[str, Model[Any, Any]]:
    """The model of `config` once per way to run it: label -> model."""
    kind = model_class(config.method)
    placed = {name: weight.to(device) for name, weight in weights.items()}
    return {
        label: kind(config, placed, {op.name: op.bind(backend, device) for op in kind.ops})
        for label, backend in bindings(kind.ops, device).items()
    }


def engine_ops(config: ModelConfig) -> tuple[Op, ...]:
    """What an engine runs: the model's ops and the ranking."""
    return (*model_class(config.method).ops, score_topk)


def our_engines(
    config: ModelConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    generation_config: GenerationConfig | None = None,
) -> dict[str, Engine]:
    """An engine per way to run the model's ops and the ranking: label -> engine."""
    generation_config = generation_config or default_generation_config(config)
    checkpoint = Checkpoint(config, generation_config, weights)
    return {
        label: Engine.from_checkpoint(checkpoint, device=device, backend=backend)
        for label, backend in bindings(engine_ops(config), device).items()
    }
