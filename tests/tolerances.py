"""The only numbers by which tests forgive.

House rule: err(ours, float64) <= 2 * err(torch at the same dtype, float64) + FLOOR[dtype], errors relative to the
largest magnitude. Where there is no torch twin, two evaluations of one formula agree within AGREE[dtype]. They hold on
every device: conftest.py turns TF32 off for torch's products, and our kernels multiply float32 as IEEE does.
"""

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
AGREE = {torch.float32: 5e-6, torch.float64: 1e-11}
GOLDEN = 5e-6
"""x_0 against the authors' recorded outputs, relative to the largest magnitude."""


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """The largest absolute difference over the largest magnitude of `truth`."""
    if ours.shape != truth.shape:
        raise AssertionError(f"shapes differ: {tuple(ours.shape)} and {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    scale = max(float(truth.abs().max()), 1e-30)
    return float((ours.double() - truth.double()).abs().max()) / scale


def assert_agree(ours: Tensor, truth: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    error = relative_error(ours, truth)
    assert error <= factor * AGREE[dtype], f"relative error {error:.3g} exceeds {factor * AGREE[dtype]:.3g}"
