"""The cross-entropy over the whole catalogue, which is most of a recommender's training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256
"""Rows whose scores exist at a time on a CPU: 256 of a catalogue of 10,000 are 10 MB, and stay in its cache."""


def cross_entropy(rows: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows of -log softmax(row . table^T)[target].

    rows     [R, D]
    table    [N, D]
    targets  [R] int64, rows of the table

    On a CPU the scores [R, N] are never held: `F.cross_entropy` writes and reads them eight times or so, and they are
    hundreds of megabytes. Both gradients are made chunk by chunk beside the loss, in a third of the time; so there is
    no second derivative. Elsewhere, and under autocast, PyTorch's own.
    """
    if rows.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.cross_entropy(rows @ table.T, targets)
    loss: Tensor = _Chunked.apply(rows, table, targets)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    """The gradient of the loss by a score is (softmax - [it is the target's]) / R."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        n_rows = len(rows)
        total = rows.new_zeros(())
        learns_rows, learns_table, _ = ctx.needs_input_grad
        of_rows = torch.empty_like(rows)
        of_table = table.new_zeros(table.shape[::-1])  # transposed: the longer side last is what oneDNN is fast at
        columns = table.T.contiguous()
        for start in range(0, n_rows, CHUNK):
            chunk, target = rows[start : start + CHUNK], targets[start : start + CHUNK, None]
            scores = _times(chunk, table)
            top = scores.amax(dim=1, keepdim=True)
            wanted = scores.gather(1, target)
            sums = scores.sub_(top).exp_().sum(dim=1, keepdim=True)
            total += (sums.log() + top - wanted).sum()

            gradient = scores.div_(sums * n_rows)
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1 / n_rows))
            if learns_rows:
                of_rows[start : start + CHUNK] = _times(gradient, columns)
            if learns_table:
                of_table += _times(chunk.T.contiguous(), gradient.T)
        ctx.save_for_backward(of_rows, of_table.T)
        return total / n_rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(of_loss * gradient for gradient in ctx.saved_tensors), None


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b^T. In float32 by oneDNN, which is twice as fast as MKL on processors that are not Intel's; `F.linear` does
    not choose it, torch.compile does."""
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T
