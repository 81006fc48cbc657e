"""CUDA graphs: plain PyTorch as fast as it can be launched, which is what our kernels have to beat on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.baselines import Calls
from bench.cases import GRAPHED, Absent, Gate, Options, Provider
from fastdiff.noise import GivenNoise, Noise
from fastdiff.ops.backend import BoundOp
from fastdiff.ops.denoise_attention_loop import BlockWeights, CausalPrefix, denoise_attention_loop_ref

WARM_UPS = 3
"""Runs before a capture, in which libraries choose their kernels and take their workspaces."""


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raises where the host would wait for the device, which no capture survives; nor does the process, which with
    PyTorch 2.11 can capture no more after one that failed (https://github.com/pytorch/pytorch/pull/180395)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Replayed:
    """A function of tensors as a CUDA graph: a call copies its inputs to where the graph reads them, and replays it.
    What it returns is overwritten by the next call."""

    def __init__(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                function(*self._inputs)
            with waiting_is_an_error():
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._output


def graphed_only(
    make: Callable[[], Calls],
    check: Callable[[Any], Gate],
    options: Options,
    name: str = "fastdiff" + GRAPHED,
    backend: str = "eager",
    **facts: Any,
) -> Iterator[Provider | Absent]:
    """The provider `name`, on a GPU only: `make()` captures and returns the calls that replay."""
    if options.device.type != "cuda" or not options.wants(name):
        return
    try:
        with torch.inference_mode():
            run, gated = make()
            run()  # what captures in its first call does so here
    except Exception as error:  # what waits for the device, or copies from pageable memory, cannot be captured
        yield Absent(name, f"it cannot be captured: {type(error).__name__}: {str(error).splitlines()[0]}")
        return
    yield Provider(name, run, check, gated, backend=backend, **facts)


def loop_in_a_graph() -> BoundOp:
    """denoise_attention_loop in plain PyTorch with cached keys and values, its steps one CUDA graph, captured in the
    first call and replayed in those after it, which must be of the same shapes. The draws are given."""
    kept: list[Replayed] = []

    def loop(
        x_t: Tensor,
        blocks: tuple[BlockWeights, ...],
        prefix: CausalPrefix,
        guidance_scale: float,
        input_scale: float,
        time: Tensor,
        coef: Tensor,
        normalize: bool,
        noise: Noise,
    ) -> Tensor:
        assert isinstance(noise, GivenNoise)

        def steps(x_t: Tensor, draws: Tensor, cond: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
            bias, scale = rest if len(rest) == 2 else (rest[0], None)
            static = replace(prefix, cond=cond)
            vars(static).update(by_head=(keys, values), flat_bias=bias, flat_query_scale=scale)
            given = GivenNoise(draws)
            return denoise_attention_loop_ref(
                x_t, blocks, static, guidance_scale, input_scale, time, coef, normalize, given
            )

        scale = prefix.flat_query_scale
        inputs = [x_t, noise.noise, prefix.cond, *prefix.by_head, prefix.flat_bias, *([] if scale is None else [scale])]
        if not kept:
            kept.append(Replayed(steps, *inputs))
        x_0: Tensor = kept[0](*inputs)
        return x_0

    return BoundOp("denoise_attention_loop", "torch", loop)
