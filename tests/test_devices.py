"""The mover of tests/devices.py: a GPU is played by the device "meta", which holds no numbers, and by copies."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.calls import SOURCES, record, tensors_in
from fastdiff import ops
from fastdiff.noise import GeneratorNoise, GivenNoise, Noise, PhiloxNoise, StartNoise
from fastdiff.ops.backend import Op
from fastdiff.per_object import PerObject
from tests import devices
from tests.devices import move, moving

OPS = [op for op in ops.ALL if op.name in SOURCES]


def whose_device_is_not(value: Any, device: str) -> list[str]:
    """The names of tensors in a value that are elsewhere; a plan's coefficients stay on the CPU."""
    if isinstance(value, Tensor):
        return [] if value.device.type == device else ["it"]
    if isinstance(value, (tuple, list)):
        return [f"[{i}] {name}" for i, part in enumerate(value) for name in whose_device_is_not(part, device)]
    parts: dict[str, Any] = {}
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, Noise):
        parts = vars(value)
    return [
        f"{name}.{where}"
        for name, part in parts.items()
        for where in whose_device_is_not(part, "cpu" if name == devices.STAYS else device)
    ]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_tensor_of_a_call_is_moved_and_the_result_is_the_same(op: Op) -> None:
    call = record(op, 3, torch.device("cpu"), torch.float32)
    arguments = dict(call.arguments)
    expected = op.reference(**{name: move(value, "cpu") for name, value in arguments.items()})

    seen: dict[str, Any] = {}

    def elsewhere(**moved: Any) -> Any:
        seen.update(moved)
        return op.reference(**{name: move(value, "cpu") for name, value in arguments.items()})

    got = moving(op, elsewhere, "meta")(**arguments)
    assert {name: where for name, value in seen.items() if (where := whose_device_is_not(value, _of(name)))} == {}
    copied = moving(op, op.reference, "cpu")(*arguments.values())
    for result in (got, copied):
        for ours, truth in zip(tensors_in(result), tensors_in(expected), strict=True):
            assert torch.equal(ours.nan_to_num(), truth.nan_to_num())


def _of(name: str) -> str:
    return "cpu" if name == devices.STAYS else "meta"


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.T,
        lambda x: x[:, 1:5:2],
        lambda x: x[2],
        lambda x: x[:1].expand(4, 6),
        lambda x: x[:0],
        lambda x: x[:, :1],
    ],
)
def test_strides_and_offsets_are_kept(view: Any) -> None:
    tensor = view(torch.arange(24.0).view(4, 6))
    moved = move(tensor, "meta")
    assert moved.shape == tensor.shape
    if not tensor.is_contiguous():
        assert moved.stride() == tensor.stride()
        assert moved.storage_offset() == tensor.storage_offset()
    assert torch.equal(move(tensor, "cpu"), tensor)


def test_noise_is_moved_by_kind() -> None:
    keys, draws = torch.arange(3), torch.randn(4, 3, 2)
    generator = GeneratorNoise(torch.Generator().manual_seed(1), 3, 1, 2, torch.float32, torch.device("cpu"))
    for noise in (
        GivenNoise(draws),
        PhiloxNoise(5, keys, keys, 2, torch.float32),
        PhiloxNoise(torch.tensor([5]), keys, keys, 2, torch.float32),
        StartNoise(draws[0], PhiloxNoise(5, keys, keys, 2, torch.float32)),
        generator,
    ):
        moved = move(noise, "meta")
        assert type(moved) is type(noise)
        assert whose_device_is_not(moved, "meta") == []
        assert moved.draw(1).device.type == "meta"
    assert generator.device.type == "cpu"

    class Own(Noise):
        def draw(self, index: int) -> Tensor:
            return draws[index]

    assert move(Own(), "meta").draw(0).device.type == "meta"


def test_an_object_moves_once() -> None:
    """What a backend keeps of it is found again; another object is another."""
    kept = PerObject[Any]()
    (op,) = (op for op in OPS if op.name == "denoise_mlp_loop")
    sampler = record(op, 1, torch.device("cpu"), torch.float32).arguments["sampler"]
    first = move(sampler, "meta", kept)
    assert move(sampler, "meta", kept) is first
    assert first.mlp is move(sampler.mlp, "meta", kept)
    assert move(replace(sampler), "meta", kept) is not first
