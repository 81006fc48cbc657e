"""fastdiff: histories in, recommendations out, for diffusion-based sequential recommenders.

    engine = fastdiff.from_pretrained("folder")
    output = engine.generate([[3, 17, 256], [8]], top_k=10)

Importing this package compiles nothing and touches no device.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.catalog import ItemCatalog
    from fastdiff.engine import Engine
    from fastdiff.loading import accelerate, from_pretrained
    from fastdiff.ops.backend import available_backends
    from fastdiff.output import GenerateOutput

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "GenerateOutput",
    "ItemCatalog",
    "__version__",
    "accelerate",
    "available_backends",
    "from_pretrained",
]

_HOMES = {
    "Engine": "fastdiff.engine",
    "GenerateOutput": "fastdiff.output",
    "ItemCatalog": "fastdiff.catalog",
    "accelerate": "fastdiff.loading",
    "available_backends": "fastdiff.ops.backend",
    "from_pretrained": "fastdiff.loading",
}


_MODULES = (
    "catalog",
    "checkpoint",
    "config",
    "data",
    "errors",
    "evaluate",
    "metrics",
    "models",
    "ops",
    "plan",
    "schedule",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastdiff.{name}")
    # with `obj`, Python goes on to say which name was perhaps meant
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__doc__", "__file__", "__name__", "__path__"})
