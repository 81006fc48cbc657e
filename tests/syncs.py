"""A detector, on the CPU, of operations that would make the host wait for a CUDA device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAIT = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
"""Operations whose result, or its shape, the host has to know."""


def waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation on tensors of a CUDA device would wait for it."""
    name = func._schema.name
    indices = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else ()
    by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    lengths_unknown = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
    return name in _WAIT or by_mask or lengths_unknown


class no_syncs(TorchDispatchMode):  # noqa: N801 (used like a function)
    """Raises where an operation would wait for a CUDA device, were its tensors there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args, kwargs):
            raise AssertionError(f"{func._schema.name} would wait for the device")
        return func(*args, **kwargs)
