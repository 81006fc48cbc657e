"""Reading settings and sizes of weights, where everything that is wrong with them is said at once."""

from __future__ import annotations

import logging
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdiff.author_settings import Settings, same_value, shortened
from fastdiff.errors import CheckpointError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Reader:
    """Reads settings and sizes of weights, and keeps what is wrong with them until `finish` says it all at once.

    A value that is missing or wrong is replaced by one of the right type, which `finish` keeps from being used.
    """

    settings: Settings
    weights: Mapping[str, Tensor]
    where: str
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        return self.settings.values.get(name) is not None

    def integer(self, name: str, meaning: str, default: int | None = None) -> int:
        return self._read(name, meaning, default, 1, _as_int, "a whole number")

    def number(self, name: str, meaning: str, default: float | None = None) -> float:
        return self._read(name, meaning, default, 1.0, _as_float, "a finite number")

    def flag(self, name: str, meaning: str, default: bool | None = None) -> bool:
        return self._read(name, meaning, default, False, _as_bool, "true or false")

    def choice(self, name: str, meaning: str, accepted: Iterable[str], default: str | None = None) -> str:
        accepted = tuple(accepted)

        def convert(value: Any) -> str:
            if value not in accepted:
                raise ValueError
            return str(value)

        return self._read(name, meaning, default, accepted[0], convert, f"one of {', '.join(accepted)}")

    def _read(
        self, name: str, meaning: str, default: T | None, stand_in: T, convert: Callable[[Any], T], what: str
    ) -> T:
        if not self.has(name):
            if default is not None:
                return default
            self.missing.append(f"{name} ({meaning})")
            return stand_in
        value = self.settings.values[name]
        try:
            return convert(value)
        except (TypeError, ValueError):
            self.problems.append(f"{name} must be {what} (got {shortened(value)})")
            return stand_in

    def betas(self) -> Tensor | None:
        """The chain itself, [T] float64, where it is given (a live model holds it)."""
        if not self.has("betas"):
            return None
        try:
            betas = torch.as_tensor(self.settings.values["betas"]).detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError):
            betas = torch.zeros(0)
        if betas.ndim != 1 or betas.numel() == 0:
            self.problems.append(f"betas must be a row of numbers (got {shortened(self.settings.values['betas'])})")
            return None
        return betas

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a weight that sizes are read from."""
        shape = tuple(self.weights[name].shape) if name in self.weights else ()
        if len(shape) == 2 and min(shape) > 0:
            return shape[0], shape[1]
        got = f"{list(shape)}" if name in self.weights else "none"
        self.problems.append(f"the weights must hold a matrix {name}, from which sizes are read (got {got})")
        return 1, 1

    def count(self, prefix: str) -> int:
        """How many numbered parts `prefix.0.`, `prefix.1.`, .. the weights hold."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        numbers = [int(match[1]) for match in map(pattern.match, self.weights) if match]
        return max(numbers, default=-1) + 1

    def agree(self, name: str, actual: Any, source: str, holder: str = "the weights") -> None:
        """A setting that restates what the weights show must say the same."""
        if self.has(name) and not same_value(self.settings.values[name], actual):
            stated = shortened(self.settings.values[name])
            self.problems.append(f"{name} is {stated} in the settings and {actual} in {holder} ({source})")

    def finish(self, known: frozenset[str]) -> None:
        parts = list(self.problems)
        if self.missing:
            parts.insert(
                0,
                f"missing settings, which the weights cannot tell: {', '.join(self.missing)}; add them to the settings",
            )
        if parts:
            raise CheckpointError(f"{self.where}: {'; '.join(parts)}")
        unknown = sorted(self.settings.stated - known - {"method", "betas"})
        if unknown:
            logger.warning(
                "%s: settings that fastdiff does not know and did not use: %s", self.where, ", ".join(unknown)
            )


def _as_int(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        return int(value)
    return int(value) if isinstance(value, str) else operator.index(value)


def _as_float(value: Any) -> float:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    number = float(value)  # a str too: YAML 1.1 reads 1e-4, without a dot, as text
    if not math.isfinite(number):
        raise ValueError
    return number


def _as_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "1", "t", "y", "yes", "false", "0", "f", "n", "no"):
        return value.lower() in ("true", "1", "t", "y", "yes")
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError
