"""Losses with a softmax over very many: over the whole catalogue, over all positions of a batch.

They are most of a recommender's training. Gradients are made with the loss, in one go, so that no matrix of scores
waits for the backward pass; there is no second derivative.
"""

from __future__ import annotations

import math
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
    hundreds of megabytes. Chunk by chunk it takes a third of the time. Elsewhere, and under autocast, it is PyTorch's.
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
    not choose it, torch.compile does. It compiles a kernel for every shape, in milliseconds: so only for whole chunks,
    whose shapes do not change."""
    whole = CHUNK in (*a.shape, *b.shape)
    if whole and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T


# --- over the positions of a batch: InfoNCE -------------------------------------------------------------------------


def contrast(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """InfoNCE of two views [R, D]. With z the 2 R unit rows of both and i* the partner of row i,

    L = mean_i -log [ exp(z_i . z_i* / temperature) / sum_{j != i} exp(z_i . z_j / temperature) ]
    """
    z = torch.cat([F.normalize(a, dim=1), F.normalize(b, dim=1)]) / math.sqrt(temperature)
    loss: Tensor = _Contrast.apply(z, 1 / temperature)  # type: ignore[no-untyped-call]
    return loss


class _Contrast(torch.autograd.Function):
    """The loss above of z [2 R, D] and its gradient in one go: no [2 R, 2 R] matrix waits for the backward pass.

        p_ij = exp(z_i . z_j - top), 0 on the diagonal        r_i = sum_j p_ij
        dL/dz_i = 1/(2 R) [ sum_j p_ij (1/r_i + 1/r_j) z_j - 2 z_i* ]

    p is symmetric: its upper half is computed, in strips of rows.
    """

    STRIP = 256

    @staticmethod
    def forward(ctx: Any, z: Tensor, top: float) -> Tensor:
        n = len(z)
        strips = []
        r = z.new_zeros(n)
        for start in range(0, n, _Contrast.STRIP):
            end = min(start + _Contrast.STRIP, n)
            p = (z[start:end] @ z[start:].T).sub_(top).exp_()
            p[:, : end - start].diagonal().zero_()
            r[start:end] += p.sum(1)
            r[end:] += p[:, end - start :].sum(0)
            strips.append((start, end, p))
        partners = z.roll(n // 2, 0)
        loss = (r.log() + top - (z * partners).sum(1)).mean()
        if ctx.needs_input_grad[0]:
            u, gradient = 1 / r, -2 * partners
            for start, end, p in strips:
                p.mul_(u[start:end, None] + u[start:])
                gradient[start:end] += p @ z[start:]
                gradient[end:] += p[:, end - start :].T @ z[start:end]
            ctx.save_for_backward(gradient.div_(n))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_loss, None


def linear_contrast(a: Tensor, b: Tensor, temperature: float, n_features: int) -> Tensor:
    """`contrast` in time linear in R (Rahimi & Recht 2007), with the row itself left in the denominator, as published:

    exp(z_i . z_j / temperature) ~ e^(1/temperature) phi(z_i) . phi(z_j)
    phi(z) = [cos(z W), sin(z W)] / sqrt(n_features),   W [D, n_features] of variance 1/temperature
    """
    z = torch.cat([F.normalize(a, dim=1), F.normalize(b, dim=1)])
    angles = z @ (torch.randn(z.shape[1], n_features, dtype=z.dtype, device=z.device) / math.sqrt(temperature))
    phi = torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(n_features)
    denominators = (phi @ phi.sum(0)).log() + 1 / temperature
    return (denominators - (z * z.roll(len(a), 0)).sum(1) / temperature).mean()
