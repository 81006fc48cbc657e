"""The ops: one file each, contract and reference together.

`ALL` is the tuple of every op record, from which the backend matrix is made. It is put together when first asked for,
so that importing `fastdiff.ops.backend`, as every op does, imports no other op.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdiff.ops.backend import Op

    ALL: tuple[Op, ...]

_NAMES = (
    "sampler_step",
    "philox_normals",
    "row_linear",
    "encode_last_item",
    "encode_interests",
    "denoise_mlp_loop",
    "sample_affine",
    "encode_causal_history",
    "prepare_causal_prefix",
    "denoise_attention_loop",
    "encode_padded_history",
    "decode_context",
    "score_topk",
)


def __getattr__(name: str) -> tuple[Op, ...]:
    if name != "ALL":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    ops: tuple[Op, ...] = tuple(getattr(importlib.import_module(f"{__name__}.{op}"), op) for op in _NAMES)
    globals()["ALL"] = ops
    return ops
