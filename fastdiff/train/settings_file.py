"""Settings of a recipe: its defaults, then a named set of the shipped files, then a file, then single values.

`settings/<method>.yaml` holds named sets of fields that differ from the dataclass's defaults, one per data set:

    amazon-office: {num_train_timesteps: 20, beta_end: 0.04}      # the authors' README
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastdiff.errors import InvalidArgument
from fastdiff.train.recipe import Settings

FOLDER = Path(__file__).parent / "settings"


def presets(method: str) -> dict[str, dict[str, Any]]:
    """The named sets that ship with a method; {} where it has none."""
    path = FOLDER / f"{method}.yaml"
    return {} if not path.exists() else {name: values or {} for name, values in _read(path).items()}


def load_settings(
    method: str,
    kind: type[Settings],
    preset: str | None = None,
    file: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of a run; each source overrides those before it.

    begun   those of the run that is resumed
    preset  a name in the method's shipped file
    file    a YAML file of fields
    values  single fields; text is read as YAML reads it
    """
    given: dict[str, Any] = _checked(kind, begun or {}, "--resume")
    if preset is not None:
        known = presets(method)
        if preset not in known:
            have = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise InvalidArgument(f"--preset: {method} has no settings named {preset!r}; {have}")
        given |= _checked(kind, known[preset], f"{method}.yaml: {preset}")
    if file is not None:
        given |= _checked(kind, _read(Path(file)), str(file))
    given |= _checked(kind, values or {}, "--set")
    return kind(**given)


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """["epochs=3", "loss=bce"] -> {"epochs": 3, "loss": "bce"}."""
    values: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise InvalidArgument(f"--set: must be NAME=VALUE (got {text!r}), such as epochs=20")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidArgument(f"--set: {name.strip()} is not a plain value (got {value!r})") from error
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be opened ({error.strerror}); give a YAML file of settings") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InvalidArgument(f"{path}: must hold `name: value` lines (got {type(values).__name__})")
    return values


def _checked(kind: type[Settings], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {field.name: _annotation(field.type) for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InvalidArgument(f"{where}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    return {name: _converted(value, fields[name], f"{where}: {name}") for name, value in values.items()}


def _annotation(kind: Any) -> str:
    """As it is written in the class, whether that postpones the evaluation of annotations or not."""
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _converted(value: Any, annotation: str, where: str) -> Any:
    """A value of YAML as the field's type has it: 1e-4, text to YAML 1.1, is a number; a list is a tuple."""
    optional = annotation.endswith(" | None")
    kind = annotation.removesuffix(" | None")
    if value is None and optional:
        return None
    if kind == "float":
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif kind == "int":
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind == "str":
        if isinstance(value, str):
            return value
    elif kind.startswith("tuple[") and isinstance(value, (list, tuple)):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_converted(item, inner, where) for item in value)
    words = {"float": "a finite number", "int": "a whole number", "bool": "true or false", "str": "text"}
    wanted = words.get(kind, f"a list ({kind})") + (", or null" if optional else "")
    raise InvalidArgument(f"{where} must be {wanted} (got {value!r})")
