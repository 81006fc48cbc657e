"""What the files of models share: published modules with our weights, and the providers that every subject has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import COMPILED, Absent, Gate, Options, Provider
from fastdiff.config import ModelConfig
from fastdiff.models import model_class

Call = Callable[[], Any]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Calls = tuple[Call, Call | None]
"""(the call that is timed, the call with its draws given or None where that is the same one)."""


def load_weights(module: nn.Module, config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A published module with our weights; only parameters that inference never reads may stay undefined."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    unread = model_class(config.method).unused_weights()
    wrong = [name for name in missing if not name.startswith(unread)] + unexpected
    if wrong:
        raise ValueError(f"{type(module).__name__}: its parameters differ from fastdiff's: {', '.join(wrong)}")
    return module.to(device).eval().requires_grad_(False)


def in_float64(module: nn.Module) -> nn.Module:
    """A copy in float64, on the CPU: the truth that every provider is held against."""
    return copy.deepcopy(module).cpu().double()


def eager_and_compiled(
    name: str, make: Callable[[Wrap], Calls], check: Callable[[Any], Gate], options: Options, **facts: Any
) -> Iterator[Provider | Absent]:
    """The provider `name`, and the same under torch.compile: `make(wrap)` builds its calls, its functions wrapped."""
    run, gated = make(lambda function: function)
    yield Provider(name, run, check, gated, **facts)
    yield from compiled_only(name + COMPILED, make, check, options, **facts)


def compiled_only(
    name: str, make: Callable[[Wrap], Calls], check: Callable[[Any], Gate], options: Options, **facts: Any
) -> Iterator[Provider | Absent]:
    """The second half of `eager_and_compiled` alone."""
    if options.compile and options.wants(name):
        run, gated = make(static_compile())
        yield Provider(name, run, check, gated, **facts)
    else:
        yield Absent(name, "torch.compile takes minutes; --compile includes it")


def static_compile() -> Wrap:
    """torch.compile for one shape, as a service that always runs one batch size would use it."""
    torch._dynamo.reset()
    return lambda function: torch.compile(function, dynamic=False)
