"""The files of a saved catalogue: catalog.safetensors holds its tensors, catalog.json everything else.

Each file takes its name only when it is whole. Both carry the mark of one save, so that a save that was cut short
between the two names is found out, and files of two saves are never read as one catalogue.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.errors import CatalogError

TENSORS_FILE, FACTS_FILE = "catalog.safetensors", "catalog.json"
_FORMAT = "fastdiff item catalogue, version 1"


def write(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files into a folder, which is made where it is missing; files of an earlier save are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    fresh = {name: folder / f".{name}.{mark}" for name in (TENSORS_FILE, FACTS_FILE)}
    try:
        save_file(tensors, fresh[TENSORS_FILE], metadata={"format": "pt", "mark": mark})
        text = json.dumps({"format": _FORMAT, "mark": mark, **facts}, ensure_ascii=False)
        fresh[FACTS_FILE].write_text(text, encoding="utf-8")
        shutil.copymode(fresh[FACTS_FILE], fresh[TENSORS_FILE])  # safetensors lets nobody but the owner read
        for name, path in fresh.items():
            os.replace(path, folder / name)
    finally:
        for path in fresh.values():
            path.unlink(missing_ok=True)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` was given; raises CatalogError naming the file and what is wrong with it."""
    facts = _read_facts(folder / FACTS_FILE)
    try:
        with safe_open(folder / TENSORS_FILE, framework="pt") as file:
            mark = (file.metadata() or {}).get("mark")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise CatalogError(f"{folder / TENSORS_FILE}: cannot be read ({error}); save the catalogue again") from error
    if mark != facts.get("mark"):
        raise CatalogError(
            f"{folder}: {TENSORS_FILE} and {FACTS_FILE} are not of one save; save the catalogue again, "
            "or take both files from one place"
        )
    return facts, tensors


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CatalogError(
            f"{path}: no such file; give a folder that ItemCatalog.save wrote, with {TENSORS_FILE} and {FACTS_FILE}"
        ) from error
    except (OSError, ValueError) as error:
        raise CatalogError(f"{path}: cannot be read ({error}); save the catalogue again") from error
    found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
    if found != _FORMAT:
        raise CatalogError(f"{path}: must be of the format {_FORMAT!r} (got {found!r}); save the catalogue again")
    return dict(facts)
