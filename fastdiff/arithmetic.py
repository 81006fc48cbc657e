"""The arithmetic that answers are promised for: no gradients, no autocast around it, and the right CUDA device current.

Evaluation loops often run under `torch.autocast`, which would let matrix products round to bfloat16 behind the back of
a float32 model and of the bounds by which the top-K is exact. Triton launches on the device that is current, where its
streams and events belong too, so an engine on another CUDA device makes its own current.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


device_type = lru_cache(lambda device: str(device.type))  # "cpu", "cuda": torch makes a new string each time


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradients are recorded, autocast is off for `device`, and a CUDA device is the current one inside."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _current(device):
        yield


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device_type(device) == "cuda" else nullcontext()


def in_plain_arithmetic(method: Method) -> Method:
    """A method that runs in plain arithmetic on its object's `device`."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = device_type(self.device)
        if kind != "cpu" or torch.is_autocast_enabled(kind):
            with plain_arithmetic(self.device):
                return method(self, *args, **kwargs)
        if not torch.is_grad_enabled():
            return method(self, *args, **kwargs)
        # the same as the two context managers, which take several times as long as the switch itself
        torch.set_grad_enabled(False)
        try:
            return method(self, *args, **kwargs)
        finally:
            torch.set_grad_enabled(True)

    return cast(Method, run)
