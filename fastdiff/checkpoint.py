"""Checkpoints: native folders, and the conversion of the authors' own files and live models, strictly.

A native folder holds

    config.json             what the weights cannot tell (`ModelConfig`)
    generation_config.json  what `generate()` does by default (`GenerationConfig`)
    model.safetensors       the weights under the authors' parameter names, without those that inference never reads
    item_ids.json           the external ids of the real items in row order; absent where ids are row numbers
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.author_methods import describe
from fastdiff.author_settings import given_settings, live_settings, merge_settings, read_settings, shortened
from fastdiff.config import CONFIGS, GenerationConfig, ModelConfig, config_from_dict, generation_config_from_dict
from fastdiff.errors import CatalogError, CheckpointError, InvalidArgument
from fastdiff.item_ids import as_id_array, check_new_ids
from fastdiff.weights_file import (
    Weights,
    check_method,
    check_storage,
    check_weights,
    looks_like,
    plain_names,
    read_weights,
)

__all__ = ["Checkpoint", "convert", "from_module", "looks_like", "read_folder", "write_folder"]

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
ITEM_IDS_FILE = "item_ids.json"
RUN_FILE, MODEL_FOLDER = "run.json", "model"
"""In the folder of a training run (`fastdiff.train.run_folder`): its record, and where its native folder is."""
NATIVE_FILES = frozenset((CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE, ITEM_IDS_FILE))

ItemIds = list[int] | list[str]


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in memory.

    weights   exactly the parameters of `config`, under the authors' names
    item_ids  external ids of the real items in row order, all ints or all strings; None: ids are row numbers
    """

    config: ModelConfig
    generation_config: GenerationConfig
    weights: Weights
    item_ids: Sequence[int] | Sequence[str] | None = None


# --- native folders ---------------------------------------------------------------------------------------------------


def read_folder(folder: str | Path) -> Checkpoint:
    """The checkpoint in a native folder. Raises CheckpointError naming the file and what is wrong with it."""
    folder = _path(folder, "from_pretrained: folder")
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"from_pretrained: {folder} {state}; give a folder that `fastdiff convert` or `save_pretrained` wrote"
        )
    absent = [name for name in (CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if absent and (folder / RUN_FILE).is_file():
        model = folder / MODEL_FOLDER
        has = f"give its model, {model}" if model.is_dir() else "it has no model (yet): sasrec leaves none"
        raise CheckpointError(f"from_pretrained: {folder} is a run of `fastdiff train`; {has}")
    if absent:
        raise CheckpointError(
            f"from_pretrained: {folder} has no {', '.join(absent)}; a native folder holds {CONFIG_FILE}, "
            f"{GENERATION_FILE} and {WEIGHTS_FILE}: make one from the authors' files with `fastdiff convert`"
        )
    config = config_from_dict(_read_object(folder / CONFIG_FILE))
    generation_config = generation_config_from_dict(_read_object(folder / GENERATION_FILE))
    weights = check_weights(config, read_weights(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    ids_file = folder / ITEM_IDS_FILE
    item_ids = read_item_ids(ids_file, config.n_items) if ids_file.exists() else None
    return Checkpoint(config, generation_config, weights, item_ids)


def write_folder(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a native folder, whole or not at all.

    The files are written into a new folder beside it, which then takes its name. A folder that exists is replaced only
    where it holds nothing but the files of a native folder; anything else in it is a CheckpointError, and nothing is
    touched.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    fresh, former = (folder.parent / f".{folder.name}.{state}-{token}" for state in ("new", "old"))
    fresh.mkdir()
    try:
        _write_object(fresh / CONFIG_FILE, checkpoint.config.to_dict())
        _write_object(fresh / GENERATION_FILE, checkpoint.generation_config.to_dict())
        # a copy of each: safetensors refuses tensors that share storage, and views may be of any layout
        weights = {name: w.detach().to("cpu", copy=True).contiguous() for name, w in checkpoint.weights.items()}
        save_file(weights, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copymode(fresh / CONFIG_FILE, fresh / WEIGHTS_FILE)  # safetensors lets nobody but the owner read
        if checkpoint.item_ids is not None:
            ids = check_item_ids(list(checkpoint.item_ids), checkpoint.config.n_items, "save_pretrained: item_ids")
            _write_object(fresh / ITEM_IDS_FILE, ids)
        if folder.exists():
            folder.rename(former)
        fresh.rename(folder)
    finally:
        if former.exists() and not folder.exists():
            former.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the name of a folder for the checkpoint")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in NATIVE_FILES)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise CheckpointError(
            f"{folder}: holds files that are not of a checkpoint ({', '.join(others[:5])}{more}); only an empty folder "
            "or an earlier checkpoint is replaced: give a new folder"
        )


def _write_object(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _read_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object (got {type(value).__name__})")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error


def _path(value: Any, where: str) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidArgument(f"{where} must be a path, a str or a pathlib.Path (got {value!r})")
    return Path(value)


# --- item ids ---------------------------------------------------------------------------------------------------------


def read_item_ids(path: str | Path, n_items: int) -> ItemIds:
    """External ids of the real items in row order: a JSON list, or any other file with one id per line.

    In a text file, ids are ints where every line is one, else strings as they stand.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: does not exist; give the file with the external ids of the items, in row order")
    if path.suffix == ".json":
        return check_item_ids(_read_json(path), n_items, str(path))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from error
    if not all(map(_PLAIN_INT.fullmatch, lines)):
        return check_item_ids(lines, n_items, str(path))
    too_long = next((at for at, line in enumerate(lines) if len(line) > len(str(-(1 << 63)))), None)
    if too_long is not None:  # said here, because Python refuses to read thousands of digits
        raise CheckpointError(
            f"{path}[{too_long}]: integers must have 64 bits (got {shortened(lines[too_long])}); use strings, in a "
            ".json file"
        )
    return check_item_ids([int(line) for line in lines], n_items, str(path))


_PLAIN_INT = re.compile(r"0|-?[1-9][0-9]*", re.ASCII)
"""A text that survives int and back: "007" is a name."""


def check_item_ids(ids: Any, n_items: int, where: str) -> ItemIds:
    """Raise a CheckpointError for ids that a catalogue would refuse."""
    if not isinstance(ids, list):
        raise CheckpointError(f"{where}: must be a list of item ids (got {type(ids).__name__})")
    if "" in ids:
        raise CheckpointError(f"{where}[{ids.index('')}]: an id must not be empty; give each item a name")
    try:
        values = as_id_array(ids, where)
        if len(ids) != n_items:
            raise CheckpointError(
                f"{where}: must hold one id per real item, in row order, {n_items} of them (got {len(ids)}); pad and "
                "mask rows have none"
            )
        check_new_ids(values, where)
    except CatalogError as error:
        raise CheckpointError(str(error)) from error
    return ids


# --- the authors' files and models ------------------------------------------------------------------------------------


def convert(
    method: str,
    weights_file: str | Path,
    settings_file: str | Path,
    output: str | Path,
    item_ids_file: str | Path | None = None,
) -> Checkpoint:
    """Turn the authors' checkpoint into a native folder at `output`, and return what was written.

    method         "adrec", "dreamrec", "tarec", "cddrec" or "dimerec"
    weights_file   a state dict with the authors' names: .safetensors, .pth or .pt
    settings_file  what the weights cannot tell, under the authors' own names: .yaml (ADRec's config.yaml), .json, or a
                   text file with the `Namespace(...)` that argparse prints, on one line or several
    item_ids_file  see `read_item_ids`; None leaves the row numbers as ids
    Raises CheckpointError naming everything that is missing, unexpected, misshapen or contradictory.
    """
    _check_known(method, "convert")
    weights_file = _path(weights_file, "convert: weights_file")
    settings_file = _path(settings_file, "convert: settings_file")
    output = _path(output, "convert: output")
    weights = read_weights(weights_file)
    check_method(method, weights, str(weights_file))
    settings = read_settings(settings_file, method)
    config, generation_config = describe(method, settings, weights, str(settings_file))
    weights = check_weights(config, weights, str(weights_file))
    item_ids = None
    if item_ids_file is not None:
        item_ids = read_item_ids(_path(item_ids_file, "convert: item_ids_file"), config.n_items)
    checkpoint = Checkpoint(config, generation_config, weights, item_ids)
    write_folder(output, checkpoint)
    return checkpoint


def from_module(model: nn.Module, settings: object = None) -> Checkpoint:
    """The checkpoint of a live model of the authors' code, with a copy of its weights.

    model     recognised by its parameters; schedule and sizes are read from its attributes where it holds them
    settings  what it does not hold, under the authors' names, as a mapping or as attributes of an object; "method"
              tells TA-Rec from DreamRec
    Raises CheckpointError naming the settings that are missing, or that contradict the model.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(
            f"accelerate: needs a torch.nn.Module of the authors' code (got {type(model).__name__}); a checkpoint on "
            "disk is for convert and from_pretrained"
        )
    model = _unwrap(model)
    given = given_settings(settings)
    weights = plain_names({name: w for name, w in model.state_dict().items() if isinstance(w, Tensor)})
    method = given.values.pop("method", None) or looks_like(weights)
    if method is None:
        raise CheckpointError(
            f"accelerate: {type(model).__name__} is not a model that fastdiff knows by its parameters; known are those "
            f"of {', '.join(sorted(CONFIGS))}, under their authors' names"
        )
    _check_known(method, "accelerate")
    where = f"accelerate: {type(model).__name__}"
    check_method(method, weights, where)
    check_storage(weights, where)
    merged = merge_settings(live_settings(method, model), given, where)
    config, generation_config = describe(method, merged, weights, where)
    used = check_weights(config, weights, where)
    # copies: an engine folds weights into new ones, so one that shared the rest would, after further training of the
    # model, be neither the old model nor the new one
    return Checkpoint(config, generation_config, {name: weight.detach().clone() for name, weight in used.items()})


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _check_known(method: Any, where: str) -> None:
    if not isinstance(method, str) or method not in CONFIGS:
        raise CheckpointError(f"{where}: unknown method {method!r}; known methods: {', '.join(sorted(CONFIGS))}")
