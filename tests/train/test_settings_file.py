"""Settings of recipes: defaults, presets, files, single values; what is wrong is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from fastdiff.errors import InvalidArgument
from fastdiff.train import settings_file
from fastdiff.train.recipe import Settings
from fastdiff.train.run import METHODS, recipe_class
from fastdiff.train.settings_file import load_settings, parse_assignments, presets


@dataclass(frozen=True)
class Own(Settings):
    epochs: int = 3
    rate: float = 0.1
    loss: str = "ce"
    pcgrad: bool = False
    patience: int | None = 5
    widths: tuple[int, ...] = ()


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text("# comments\noffice: {epochs: 9, rate: 1e-4}\nempty:\n")
    monkeypatch.setattr(settings_file, "FOLDER", tmp_path)


@pytest.mark.usefixtures("shipped")
def test_later_sources_override_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 20\nwidths: [64, 32]\npatience: null\n")
    assert load_settings("own", Own) == Own()
    assert load_settings("own", Own, "empty") == Own()
    assert load_settings("own", Own, "office") == Own(epochs=9, rate=1e-4)
    assert load_settings("own", Own, "office", file) == Own(20, 1e-4, patience=None, widths=(64, 32))
    values = parse_assignments(["epochs=1", "loss=bce", "pcgrad=true", "rate=2"])
    assert load_settings("own", Own, "office", file, values) == Own(1, 2.0, "bce", True, None, (64, 32))


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, r"unknown settings epoch; known are epochs, loss"),
        ({"epochs": 3.5}, r"epochs must be a whole number \(got 3.5\)"),
        ({"epochs": True}, r"epochs must be a whole number \(got True\)"),
        ({"epochs": None}, r"epochs must be a whole number \(got None\)"),
        ({"patience": "long"}, r"patience must be a whole number, or null"),
        ({"rate": "fast"}, r"rate must be a finite number"),
        ({"rate": float("nan")}, r"rate must be a finite number"),
        ({"pcgrad": 1}, r"pcgrad must be true or false"),
        ({"loss": 3}, r"loss must be text"),
        ({"widths": 64}, r"widths must be a list"),
        ({"widths": [64, "x"]}, r"widths must be a whole number"),
    ],
)
def test_wrong_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"--set.*{message}"):
        load_settings("own", Own, values=values)


@pytest.mark.usefixtures("shipped")
def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no settings named 'beauty'; it has empty, office"):
        load_settings("own", Own, "beauty")
    with pytest.raises(InvalidArgument, match=r"missing\.yaml"):
        load_settings("own", Own, file=tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InvalidArgument, match="must hold `name: value` lines"):
        load_settings("own", Own, file=tmp_path / "list.yaml")
    with pytest.raises(InvalidArgument, match="must be NAME=VALUE"):
        parse_assignments(["epochs"])
    with pytest.raises(InvalidArgument, match="not a plain value"):
        parse_assignments(["epochs=[1"])


@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_preset_loads(method: str) -> None:
    kind = recipe_class(method)
    for name in presets(method):
        assert isinstance(load_settings(method, kind.Settings, name), kind.Settings)
