"""The arithmetic that answers are promised for: no gradients, and no autocast around it.

Evaluation loops often run under `torch.autocast`, which would let matrix products round to bfloat16 behind the back of
a float32 model and of the bounds by which the top-K is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


device_type = lru_cache(lambda device: str(device.type))  # "cpu", "cuda": torch makes a new string each time


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradients are recorded and autocast is off for `device` inside."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def in_plain_arithmetic(method: Method) -> Method:
    """A method that runs in plain arithmetic on its object's `device`."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled(device_type(self.device)):
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
