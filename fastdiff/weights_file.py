"""State dicts: reading them from files, recognising whose they are, and checking them against a config.

Whatever a file holds is data here: a pickled module is refused, because unpickling one runs code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.config import DTYPES, ModelConfig
from fastdiff.errors import CheckpointError
from fastdiff.models import model_class

Weights = dict[str, Tensor]

PICKLED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
NESTED_UNDER = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts put the state dict when they save more than that."""

SIGNATURES = {
    "adrec": ("item_embedding.weight", "hist_norm.weight", "diffu.net.time_embed.0.weight"),
    "cddrec": ("item_embeddings.weight", "time_embeddings.weight", "decoder.multihead_attn.in_proj_weight"),
    "dreamrec": ("item_embeddings.weight", "none_embedding.weight", "step_mlp.1.weight"),
    "dimerec": ("item_embeddings.weight", "step_embeddings.weight", "denoiser.0.weight"),
}
"""Parameters that tell a method; TA-Rec's are DreamRec's."""


def looks_like(weights: Mapping[str, Any]) -> str | None:
    """The method whose parameter names these are, or None; the weights of a TA-Rec look like "dreamrec"."""
    for method, names in SIGNATURES.items():
        if all(name in weights for name in names):
            return method
    return None


def check_method(method: str, weights: Mapping[str, Any], where: str) -> None:
    """Raise where the names are those of another method, or of none."""
    found = looks_like(weights)
    if found == method or (found == "dreamrec" and method == "tarec"):
        return
    if found is not None:
        raise CheckpointError(
            f"{where}: these are the parameters of {found}, not of {method}; give the method {found!r}, or {method}'s "
            "own weights"
        )
    wanted = SIGNATURES["dreamrec" if method == "tarec" else method]
    missing = [name for name in wanted if name not in weights]
    raise CheckpointError(
        f"{where}: these are not the parameters of {method}: {', '.join(missing)} missing "
        f"(got {_some(weights)}); give a state dict of the authors' model, names unchanged"
    )


def read_weights(path: str | Path) -> Weights:
    """The state dict in a .safetensors file, or in a .pth or .pt file (bare, or under "state_dict" or "model").

    Prefixes that DataParallel, DistributedDataParallel and torch.compile put before names are taken off. Raises
    CheckpointError for a missing, truncated or foreign file, for pickled objects, and for tensors that are sparse.
    """
    path = Path(path)
    where = str(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{where}: {kind}; give the file that holds the trained weights")
    if path.suffix == ".safetensors":
        try:
            return plain_names(load_file(path))  # dense tensors are all that it can hold
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{where}: cannot be read as safetensors ({error}); the file is truncated or of another format: copy "
                "or save it again"
            ) from error
    if path.suffix not in PICKLED_SUFFIXES:
        accepted = ", ".join((".safetensors", *PICKLED_SUFFIXES))
        raise CheckpointError(f"{where}: unknown kind of file (got {path.suffix or 'no suffix'}); accepted: {accepted}")
    weights = plain_names(_state_dict_in(_load_pickled(path), where))
    check_storage(weights, where)
    return weights


def _load_pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that reads foreign bytes may raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise CheckpointError(
                f"{path}: cannot be read as a PyTorch file ({type(error).__name__}); the file is truncated or of "
                "another format: copy or save it again"
            ) from error
        raise CheckpointError(
            f"{path}: holds pickled Python objects ({refused[1]}), not only tensors; they are not loaded, because that "
            "runs code from the file. Where you trust it, load it in the authors' code and save its state dict: "
            "torch.save(model.state_dict(), 'weights.pth')"
        ) from error


def _state_dict_in(content: Any, where: str) -> Weights:
    """The mapping from names to tensors that is `content` or stands under one of `NESTED_UNDER`."""
    if isinstance(content, Mapping):
        for candidate in (content, *(content[key] for key in NESTED_UNDER if key in content)):
            if isinstance(candidate, Mapping) and candidate and _is_state_dict(candidate):
                return dict(candidate)
        got = f"a dict with {_some(content)}"
    else:
        got = f"a {type(content).__name__}"
    raise CheckpointError(
        f"{where}: holds no state dict (got {got}); accepted: a dict from names to tensors, bare or under "
        f"{', '.join(NESTED_UNDER)}; save one with torch.save(model.state_dict(), 'weights.pth')"
    )


def _is_state_dict(candidate: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items())


def plain_names(weights: Mapping[str, Tensor]) -> Weights:
    """Without what wrappers add: "_orig_mod" anywhere (torch.compile), "module." in front (data parallel)."""
    plain = {".".join(part for part in name.split(".") if part != "_orig_mod"): w for name, w in weights.items()}
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): weight for name, weight in plain.items()}
    return plain


def check_storage(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise for tensors whose numbers are not there (meta device) or not one beside the other (sparse, nested)."""
    empty = [name for name, weight in weights.items() if weight.is_meta]
    if empty:
        raise CheckpointError(
            f"{where}: parameters without numbers, on the meta device: {_some(empty)}; load the trained weights first "
            "(model.to_empty(device='cpu'), then load_state_dict)"
        )
    scattered = [f"{name} ({w.layout})" for name, w in weights.items() if w.layout != torch.strided or w.is_nested]
    if scattered:
        raise CheckpointError(
            f"{where}: parameters must be dense tensors (got {_some(scattered)}); save them after .to_dense()"
        )


def check_weights(config: ModelConfig, weights: Mapping[str, Tensor], where: str) -> Weights:
    """Exactly the parameters that `config` asks for, in its order; unused ones that the authors save are dropped.

    Raises CheckpointError naming every missing, unexpected or misshapen parameter, and every one that holds NaN or
    infinity or is of another dtype than `DTYPES`.
    """
    kind = model_class(config.method)
    shapes = kind.weight_shapes(config)
    used = {name: w for name, w in weights.items() if name in shapes or not name.startswith(kind.unused_weights())}
    missing = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in used]
    unexpected = [f"{name} {list(weight.shape)}" for name, weight in used.items() if name not in shapes]
    misshapen = [
        f"{name} is {list(used[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in used and tuple(used[name].shape) != shape
    ]
    problems = [
        f"{kind_of}: {', '.join(names)}"
        for kind_of, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{where}: the weights are not those of the {config.method} that the settings describe; "
            f"{'; '.join(problems)}"
        )
    foreign = [f"{name} ({weight.dtype})" for name, weight in used.items() if weight.dtype not in DTYPES.values()]
    if foreign:
        raise CheckpointError(
            f"{where}: parameters must be float32, float64, bfloat16 or float16 (got {', '.join(foreign)}); convert "
            "them with .float(), quantised ones with their scales"
        )
    broken = [name for name, weight in used.items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise CheckpointError(
            f"{where}: NaN or infinity in {', '.join(broken)}; the training diverged or the file is damaged: take an "
            "earlier checkpoint"
        )
    return {name: used[name] for name in shapes}


def _some(names: Iterable[Any], limit: int = 5) -> str:
    """The first few names of many."""
    listed = [str(name) for name in names]
    if not listed:
        return "nothing"
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
