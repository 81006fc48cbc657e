"""A CUDA device, played on a machine without one: tensors that say that they are on it, and compute on the CPU.

    with PlayedGpu() as gpu:                    # torch.cuda says that there is a device
        engine = Engine.from_checkpoint(checkpoint, device="cuda")
        with waiting_is_an_error():             # torch.cuda.set_sync_debug_mode
            output = engine.generate(histories)

What mixes devices is an error, as it is there; and so is, where asked for and while a graph is captured, what would
make the host wait for the device: a look at a value, a result whose shape depends on values, a copy from memory that is
not pinned. A graph must copy nothing from the host at all, whose memory will be another's when it is replayed; a replay
does nothing. Triton's kernels cannot be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.syncs import waits

GPU = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="A GPU", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 << 10
)


class OnGpu(torch.Tensor):
    """A tensor of the device; `here` is where its numbers are."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> OnGpu:
        # on "meta" for all that looks in C++, where a build without CUDA knows no CUDA device
        there: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device="meta",
            requires_grad=here.requires_grad,
        )
        there.here = here.detach()
        return there

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.here.__reduce_ex__(protocol)

    def record_stream(self, stream: Any) -> None: ...

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func._schema.name} on a tensor of a device that is played no longer")


class PlayedGpu(TorchDispatchMode):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        # with a mode of this kind active, torch does not initialise the device that an argument names
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self._pinned: dict[int, Tensor] = {}
        self.strict = self.capturing = False
        self._patches = ExitStack()

    def __enter__(self) -> PlayedGpu:
        self._patches = ExitStack()
        for name, stand_in in _stand_ins(self).items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        self._patches.enter_context(mock.patch.object(torch, "tensor", _tensor_of(torch.tensor)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def waits(self, why: str) -> None:
        if self.strict:
            raise RuntimeError(f"{why} would wait for the device")

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if isinstance(tensor, OnGpu)]
        if name == "aten::_fused_sdp_choice":
            return 0  # the plain formula
        asked = kwargs.get("device")
        gives_there = bool(there) if asked is None else torch.device(asked).type in ("cuda", "meta")
        self._check(name, func, args, kwargs, there, given, gives_there)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        pinned = bool(kwargs.pop("pin_memory", False))
        kwargs.pop("non_blocking", None) if name == "aten::_to_copy" else None
        wrappers = {id(tensor.here): tensor for tensor in there}
        made = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        if "empty" in name and gives_there:
            made.zero_()  # else what a kernel would have written is anything
        if pinned:
            self._pinned[made.untyped_storage().data_ptr()] = made
        if not gives_there:
            return made
        return tree_map(lambda x: wrappers[id(x)] if id(x) in wrappers else _wrapped(x), made)

    def _check(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        there: list[OnGpu],
        given: list[Tensor],
        gives_there: bool,
    ) -> None:
        generator = kwargs.get("generator")
        if gives_there and generator is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            target_there = isinstance(args[0], OnGpu) if name == "aten::copy_" else gives_there
            non_blocking = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
            if isinstance(source, OnGpu) and not target_there:
                self.waits(f"{name} to the host")
            elif target_there and not isinstance(source, OnGpu):
                if self.capturing:
                    raise RuntimeError(f"{name} from the host would be captured")
                pinned = source.numel() == 0 or source.untyped_storage().data_ptr() in self._pinned
                if not (pinned and non_blocking):
                    self.waits(f"{name} from memory that is not pinned, or without non_blocking,")
            return
        if not there:
            return
        if waits(func, args, kwargs):
            self.waits(name)
        here = [tensor for tensor in given if not isinstance(tensor, OnGpu)]
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            if here:  # allowed, and copied up
                self.waits(f"{name} with indices of the CPU")
            if not isinstance(args[0], OnGpu) and any(isinstance(index, OnGpu) for index in args[1]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            return
        if any(tensor.dim() for tensor in here):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} got tensors of cuda:0 and cpu")


def _unwrapped(value: Any) -> Any:
    return value.here if isinstance(value, OnGpu) else value


def _wrapped(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) else value


def _tensor_of(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor`, which copies up what it makes on the CPU."""

    def tensor(*args: Any, device: Any = None, **keywords: Any) -> Tensor:
        made = make(*args, **keywords)
        return made if device is None else made.to(GPU if torch.device(device).type == "cuda" else device)

    return tensor


# --- torch.cuda -------------------------------------------------------------------------------------------------------


def _stand_ins(gpu: PlayedGpu) -> dict[str, Any]:
    class Stream:
        cuda_stream = 0

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait_stream(self, stream: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

        def synchronize(self) -> None:
            gpu.waits("Stream.synchronize")

    class Event:
        def __init__(self, enable_timing: bool = False) -> None: ...

        def record(self, stream: Any = None) -> None: ...

        def synchronize(self) -> None:
            gpu.waits("Event.synchronize")

        def elapsed_time(self, end: Any) -> float:
            return 0.0

    class Graph:
        def replay(self) -> None: ...

    @contextmanager
    def capture(graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        gpu.capturing, before = True, gpu.strict
        gpu.strict = True
        try:
            yield
        finally:
            gpu.capturing, gpu.strict = False, before

    stream = Stream()
    state = torch.zeros(16, dtype=torch.uint8)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "device": lambda device: nullcontext(),
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "set_sync_debug_mode": lambda mode: setattr(gpu, "strict", mode in ("error", 2)),
        "get_sync_debug_mode": lambda: 2 if gpu.strict else 0,
        "synchronize": lambda device=None: gpu.waits("synchronize"),
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": state.clone(),
        "set_rng_state": lambda new, device="cuda": None,
        "graph_pool_handle": lambda: (0, 1),
        "memory_snapshot": lambda pool: [{"total_size": 1 << 20}],
        "graph": capture,
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
    }
