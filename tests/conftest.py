"""What all tests share: one thread, fixed seeds, and the authors' recorded outputs where a machine has them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from safetensors.torch import load_file

hypothesis.settings.register_profile("fastdiff", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("fastdiff")

ROOT = Path(__file__).resolve().parents[1]


def _material(kind: str) -> Path | None:
    """FASTDIFF_MATERIAL, or a folder `shared` beside the repository; it holds `golden/` and `data/`."""
    base = Path(os.environ.get("FASTDIFF_MATERIAL", ROOT.parent / "shared"))
    return base / kind if (base / kind).is_dir() else None


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(42)
    torch.set_float32_matmul_precision("highest")  # no TF32: tolerances are those of float32


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """golden(name) -> {"args": settings, "weights": state dict, "weights_file", "args_file", + recorded tensors}."""
    folder = _material("golden")
    if folder is None:
        pytest.skip("the authors' recorded outputs are not here (set FASTDIFF_MATERIAL to the folder of golden/)")

    def load(name: str, weights_of: str | None = None) -> dict[str, Any]:
        weights_file = folder / (weights_of or name) / "weights.safetensors"
        record: dict[str, Any] = dict(load_file(folder / name / "golden.safetensors"))
        record["args_file"] = folder / name / "args.json"
        record["args"] = json.loads(record["args_file"].read_text())["args"]
        record["weights_file"] = weights_file
        record["weights"] = load_file(weights_file)
        return record

    return load


@pytest.fixture(scope="session")
def dataset() -> Callable[[str], Path]:
    """dataset(name) -> its folder, e.g. "adrec-ml-100k"."""
    folder = _material("data")
    if folder is None:
        pytest.skip("the real datasets are not here (set FASTDIFF_MATERIAL to the folder of data/)")
    return lambda name: folder / name


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten memory looks like NaN (floating) or a large negative number (integers)."""
    real_empty, real_empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(-77) if tensor.dtype != torch.bool else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_empty_like(*a, **k)))
