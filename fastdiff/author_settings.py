"""Settings under the authors' own names: from files, from live models, and both together.

A file is ADRec's config.yaml, JSON, or a text with the `Namespace(...)` that argparse prints; it is parsed, never run.
What the settings mean is in `author_methods.py`.
"""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastdiff.config import DimeRecConfig
from fastdiff.errors import CheckpointError, InvalidArgument

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Settings by the authors' names. `stated`: those that a person wrote down, reported where nobody knows them."""

    values: dict[str, Any]
    stated: frozenset[str]


# --- files ------------------------------------------------------------------------------------------------------------


def read_settings(path: str | Path, method: str) -> Settings:
    """The settings in a .yaml, .json or text file. Raises CheckpointError where it is none of these."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: does not exist; give the file with the settings of the training run")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from error
    if path.suffix == ".json":
        values = _parse_json(text, path)
    elif path.suffix in (".yaml", ".yml"):
        values = _parse_yaml(text, path)
    else:
        values = _parse_namespace(text, path)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{path}: must hold names and values (got {type(values).__name__})")
    of = values.get("method", method)
    if of != method and (of, method) != ("dreamrec", "tarec"):
        raise CheckpointError(f"{path}: holds the settings of {of!r}, and {method!r} was asked for")
    if isinstance(values.get("args"), dict):
        values = values["args"]
    return Settings(values, frozenset(values))


def _parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml  # only this kind of file needs it

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as YAML ({error})") from error


def _parse_namespace(text: str, path: Path) -> dict[str, Any]:
    """The keyword values of the first `Namespace(...)` in a text, which is parsed and never evaluated."""
    start = text.find("Namespace(")
    if start < 0:
        raise CheckpointError(
            f"{path}: holds no Namespace(...); accepted are .yaml and .json files, and text files with the Namespace "
            "that argparse prints"
        )
    text = text[start:]
    try:
        call = ast.parse(text[: _end_of_call(text)], mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the parser's words for "nested too deeply"
        call = None
    if isinstance(call, ast.Call) and not call.args:
        return dict(_literals(call.keywords, path))
    line = text.partition("\n")[0]
    raise CheckpointError(
        f"{path}: the Namespace(...) cannot be parsed (got {line[:60]!r}); write the settings as .json"
    )


_STRING_OR_BRACKET = re.compile(r"""'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|[()\[\]{}]""")


def _end_of_call(text: str) -> int:
    """Where the first bracket of the text closes, on whichever line; brackets inside strings do not count."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if depth == 0 and match[0] in ")]}":
            return match.end()
    return len(text)


def _literals(keywords: Iterable[ast.keyword], path: Path) -> Iterable[tuple[str, Any]]:
    for keyword in keywords:
        try:
            yield str(keyword.arg), ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError):  # device(type='cuda') and the like: objects of the training run
            logger.info("%s: the value of %s is not a literal and is not read", path, keyword.arg)


# --- live models ------------------------------------------------------------------------------------------------------


def live_settings(method: str, model: nn.Module) -> dict[str, Any]:
    """What a live model of the authors' code holds: its `args`, overruled by the attributes that it computes with."""
    args = getattr(model, "args", None)
    found: dict[str, Any] = dict(args) if isinstance(args, Mapping) else dict(getattr(args, "__dict__", {}))
    for name, path in LIVE_ATTRIBUTES[method].items():
        value = _attribute(model, path)
        if value is not None:
            found[name] = value
    if method == "adrec" and "rescale_timesteps" in found:
        found["rescale_timesteps"] = bool(_as_used("rescale_timesteps", found["rescale_timesteps"]))
    if method == "cddrec":
        activation = getattr(_attribute(model, "decoder.activation"), "__name__", None)
        found |= {"hidden_act": activation} if activation in ("gelu", "relu") else {}
    config = getattr(model, "config", None)
    if method == "dimerec" and isinstance(config, DimeRecConfig):
        found |= config.to_dict()
    return found


LIVE_ATTRIBUTES: dict[str, dict[str, str]] = {
    "adrec": {
        "betas": "diffu.betas",
        "rescale_timesteps": "diffu.rescale_timesteps",
        "cfg_scale": "diffu.cfg_scale",
        "geodesic": "diffu.geodesic",
        "lambda_uncertainty": "diffu.net.lambda_uncertainty",
        "is_causal": "diffu.ag_encoder.transformer_blocks.0.is_causal",
        "n_heads": "diffu.ag_encoder.transformer_blocks.0.attention.num_heads",
    },
    "dreamrec": {
        "hidden_factor": "hidden_size",
        "seq_size": "state_size",
        "item_num": "item_num",
        "diffuser_type": "diffuser_type",
    },
    "cddrec": {
        "betas": "betas",
        "T": "T",
        "beta_1": "beta_1",
        "beta_T": "beta_T",
        "num_attention_heads": "decoder.self_attn.num_heads",
    },
    "dimerec": {},
}
"""Setting -> where a live model holds it."""
LIVE_ATTRIBUTES["tarec"] = LIVE_ATTRIBUTES["dreamrec"]


def _attribute(model: Any, path: str) -> Any:
    """The attribute at a dotted path, through compiled parts too; None where there is none."""
    for part in path.split("."):
        if isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        model = getattr(model, part, None)
    return model


def _as_used(name: str, value: Any) -> Any:
    """The authors' command line leaves `rescale_timesteps` as text, and any text is true to their code."""
    return True if name == "rescale_timesteps" and isinstance(value, str) and value else value


def given_settings(settings: object) -> Settings:
    """The settings that a caller holds: a mapping, or an object with attributes.

    Arrays among the attributes of an object are what it computed from its settings, and not what a person stated.
    """
    if settings is None:
        return Settings({}, frozenset())
    if isinstance(settings, Mapping):
        values = dict(settings)
        stated = frozenset(values)
    elif hasattr(settings, "__dict__") and not callable(settings) and not isinstance(settings, Tensor):
        values = dict(vars(settings))
        stated = frozenset(name for name, value in values.items() if not isinstance(value, (Tensor, np.ndarray)))
    else:
        raise InvalidArgument(
            "accelerate: settings must be a mapping from names to values, or an object that has them as attributes, "
            f"such as an argparse.Namespace or the authors' diffusion object (got {type(settings).__name__}); put them "
            "into a dict"
        )
    foreign = [name for name in values if not isinstance(name, str)]
    if foreign:
        raise InvalidArgument(f"accelerate: the names of settings must be strings (got {foreign[0]!r})")
    return Settings({name: value for name, value in values.items() if value is not None}, stated)


def merge_settings(live: dict[str, Any], given: Settings, where: str) -> Settings:
    """Both together; a setting that says something else than the model itself is an error."""
    contradicted = [
        f"{name} is {shortened(value)} in the settings and {shortened(live[name])} in the model"
        for name, value in given.values.items()
        if live.get(name) is not None and not same_value(_as_used(name, value), live[name])
    ]
    if contradicted:
        raise CheckpointError(f"{where}: {'; '.join(contradicted)}; leave out of the settings what the model holds")
    return Settings({**live, **given.values}, given.stated)


def same_value(a: Any, b: Any) -> bool:
    try:
        return np.array_equal(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    except (TypeError, ValueError):
        return str(a).lower() == str(b).lower()


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
