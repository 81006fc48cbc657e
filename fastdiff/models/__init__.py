"""One file per paper. `MODELS` maps a method's name to its class, imported when asked for."""

from __future__ import annotations

import importlib
from typing import Any

from fastdiff.models.base import Model

MODELS = {
    "adrec": "ADRec",
    "dreamrec": "DreamRec",
    "tarec": "TARec",
    "cddrec": "CDDRec",
    "dimerec": "DimeRec",
}


def model_class(method: str) -> type[Model[Any, Any]]:
    """The class of a method in `MODELS`."""
    kind: type[Model[Any, Any]] = getattr(importlib.import_module(f"fastdiff.models.{method}"), MODELS[method])
    return kind
