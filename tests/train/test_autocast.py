"""Losses in bfloat16, as the CPU's autocast runs them and as CUDA's would: they cast other operations."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastdiff.train.run import recipe_class
from tests.train.small import VARIANTS, small_settings, variant_name
from tests.train.tiny import tiny_data


class CudaAutocast(TorchFunctionMode):
    """`torch.autocast("cuda", torch.bfloat16)` for tensors of the CPU, of the operations that recipes use. The lists
    are those of torch's "CUDA Ops that can autocast"; of the indexed writes, only index_put and scatter_add promote."""

    NARROW = frozenset(
        ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "scaled_dot_product_attention")
    )
    WIDE = frozenset(
        ("softmax", "layer_norm", "cumsum", "sum", "exp", "log", "norm", "normalize", "pow", "reciprocal", "softplus")
    ) | frozenset(("cross_entropy", "mse_loss", "cosine_similarity"))
    PROMOTED = frozenset(("index_put", "scatter_add"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, dtype = kwargs or {}, func.__name__, None
        if name in self.NARROW:
            dtype = torch.bfloat16
        elif name in self.WIDE or name in self.PROMOTED:
            dtype = torch.float32

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if floating and dtype is not None else value

        return func(*tree_map(cast, args), **tree_map(cast, kwargs))


def autocast(device: str) -> AbstractContextManager[Any]:
    return CudaAutocast() if device == "cuda" else torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("method", "changes"), VARIANTS, ids=variant_name)
def test_losses_in_bfloat16_are_those_of_float32_and_have_gradients(
    method: str, changes: dict[str, Any], device: str
) -> None:
    torch.manual_seed(0)
    recipe = recipe_class(method)(small_settings(method, changes), tiny_data())
    for stage in recipe.stages():
        recipe.enter(stage)
        examples = torch.arange(min(recipe.n_examples(stage), 30))
        recipe.eval()  # without dropout
        torch.manual_seed(1)
        expected = recipe.losses(stage, examples)
        torch.manual_seed(1)
        with autocast(device):
            found = recipe.losses(stage, examples)
        for name, loss in expected.items():
            torch.testing.assert_close(found[name].float(), loss, rtol=0.05, atol=1e-3)
        recipe.zero_grad()
        recipe.backward(stage, found)
        gradients = [parameter.grad for parameter in recipe.parameters() if parameter.grad is not None]
        assert gradients
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
