"""One call of each op, as the engine makes it: recorded while a model of the benches runs in plain PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.bench_adrec import adrec_config
from bench.bench_cddrec import cddrec_config
from bench.bench_dimerec import dimerec_config
from bench.bench_dreamrec import dreamrec_config
from bench.inputs import draw_histories, padded
from bench.weights import random_weights
from fastdiff.checkpoint import Checkpoint
from fastdiff.config import ModelConfig, default_generation_config
from fastdiff.engine import Engine
from fastdiff.noise import Noise, PhiloxNoise
from fastdiff.ops.backend import BoundOp, Op
from fastdiff.ops.denoise_attention_loop import CausalPrefix
from fastdiff.ops.philox_normals import philox_normals


def _watch(step: int, timestep: int, x_t: Tensor) -> None:
    """With a callback, models run step by step."""


def _adrec_with_mlp(**sizes: int) -> ModelConfig:
    return replace(adrec_config(**sizes), decoder="mlp")


@dataclass(frozen=True)
class Source:
    """Where a call comes from: words for it, the model's config, and what is asked of `generate`."""

    setting: str
    config: Callable[..., ModelConfig]
    arguments: Mapping[str, Any]


SOURCES = {
    "sampler_step": Source("DreamRec, one step", dreamrec_config, {"callback_on_step_end": _watch}),
    "philox_normals": Source("DreamRec, a stretch of draws", dreamrec_config, {}),
    "row_linear": Source("ADRec with an MLP, the condition's share", _adrec_with_mlp, {}),
    "encode_last_item": Source("DreamRec, histories to condition", dreamrec_config, {}),
    "encode_interests": Source("DimeRec, histories to interests", dimerec_config, {}),
    "denoise_mlp_loop": Source("DreamRec, every step, guided", dreamrec_config, {"guidance_scale": 3.0}),
    "sample_affine": Source("DreamRec, the chain as one draw", dreamrec_config, {"scheduler": "closed_form"}),
    "encode_causal_history": Source("ADRec, histories to condition", adrec_config, {}),
    "prepare_causal_prefix": Source("ADRec, keys and values of the clean prefix", adrec_config, {}),
    "denoise_attention_loop": Source("ADRec, every step", adrec_config, {}),
    "encode_padded_history": Source("CDDRec, histories to context", cddrec_config, {}),
    "decode_context": Source("CDDRec, one step, users coupled", cddrec_config, {}),
}
"""Of each op but `score_topk`, which `bench_score_topk.py` measures."""


@dataclass(frozen=True)
class Call:
    """What an op was called with."""

    op: Op
    arguments: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    def on(self, backend: str) -> Callable[[], Any]:
        """The call on a backend. What belongs to one request (noise, a prefix) is handed over as new each time, so that
        nothing that was worked out from it is left from the call before."""
        op, normals = self.op.bind(backend, self.device, self.dtype), None
        if philox_normals.why_not(backend, self.device) is None:
            normals = philox_normals.bind(backend, self.device).function

        def run() -> Any:
            return op(**{name: _as_new(value, normals) for name, value in self.arguments.items()})

        return run

    def in_float64(self) -> Any:
        """What the reference gives for the same numbers in float64."""
        return self.op.reference(**{name: _wide(value) for name, value in self.arguments.items()})

    def bytes(self, output: Any) -> float:
        """What a call has to read and write at least: every tensor once; of an item table only the rows in use."""
        found: dict[tuple[int, int], int] = {}
        for name, value in self.arguments.items():
            for tensor in tensors_in(value):
                size = tensor.numel() * tensor.element_size()
                if name == "item_table":
                    rows = min(tensor.shape[0], self.arguments["items"].numel())
                    size = rows * tensor.shape[1] * tensor.element_size()
                found[tensor.data_ptr(), size] = size
        written = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(output))
        return float(sum(found.values()) + written)


def record(op: Op, batch: int, device: torch.device, dtype: torch.dtype, **sizes: int) -> Call:
    """The last call of `op` while a model answers `batch` histories; `sizes` go to the model's config."""
    source = SOURCES[op.name]
    config = source.config(**sizes)
    checkpoint = Checkpoint(config, default_generation_config(config), random_weights(config))
    engine = Engine.from_checkpoint(checkpoint, device=device, dtype=dtype, backend="torch")
    seen: list[dict[str, Any]] = []

    def watched(*arguments: Any, **keywords: Any) -> Any:
        bound = inspect.signature(op.reference).bind(*arguments, **keywords)
        bound.apply_defaults()
        seen[:] = [{name: _as_new(value, None) for name, value in bound.arguments.items()}]
        return op.reference(*arguments, **keywords)

    engine.model.bound[op.name] = BoundOp(op.name, "torch", watched)
    histories = padded(draw_histories(config, batch, "uniform"), config)
    engine.generate(histories, seed=0, **source.arguments)
    if not seen:
        raise RuntimeError(
            f"record: {config.method} does not call {op.name}; bench/calls.py must name a model that does"
        )
    return Call(op, seen[0], device, dtype)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value: in tuples and lists, in the fields of dataclasses, in noise."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Noise):
        yield from tensors_in(list(vars(value).values()))


def _as_new(value: Any, normals: Callable[..., Tensor] | None) -> Any:
    if isinstance(value, PhiloxNoise):
        return PhiloxNoise(
            value.seed, value.row_key, value.sample, value.dim, value.dtype, *([normals] if normals else [])
        )
    if isinstance(value, CausalPrefix):
        return replace(value)  # what it keeps is worked out again
    return value


def _wide(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_wide(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _wide(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, PhiloxNoise):
        return PhiloxNoise(value.seed, value.row_key, value.sample, value.dim, torch.float64)
    return value
