"""The chunked cross-entropy against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.train import softmax


def drawn(n_rows, n_items, dim, dtype=torch.float32):
    torch.manual_seed(n_rows)
    rows, table = torch.randn(n_rows, dim, dtype=dtype), torch.randn(n_items, dim, dtype=dtype)
    return rows.requires_grad_(), table.requires_grad_(), torch.randint(0, n_items, (n_rows,))


@pytest.mark.parametrize("n_rows", [1, softmax.CHUNK, 2 * softmax.CHUNK + 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_loss_and_gradients_are_those_of_pytorch(n_rows, dtype, tolerance):
    rows, table, targets = drawn(n_rows, 37, 16, dtype)
    wanted = F.cross_entropy(rows @ table.T, targets)
    gradients = torch.autograd.grad(3 * wanted, (rows, table))
    loss = softmax.cross_entropy(rows, table, targets)
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=0)
    for got, gradient in zip(torch.autograd.grad(3 * loss, (rows, table)), gradients, strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=tolerance * gradient.abs().max().item())


def test_gradients_by_finite_differences(monkeypatch):
    monkeypatch.setattr(softmax, "CHUNK", 3)
    rows, table, targets = drawn(7, 5, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *given: softmax.cross_entropy(*given, targets), (rows, table))


def test_only_what_learns_gets_a_gradient():
    rows, table, targets = drawn(5, 7, 4)
    softmax.cross_entropy(rows, table.detach(), targets).backward()
    assert rows.grad is not None
    softmax.cross_entropy(rows.detach(), table, targets).backward()
    assert table.grad is not None
    with torch.no_grad():
        assert not softmax.cross_entropy(rows, table, targets).requires_grad


def test_scores_of_a_thousand_and_more_do_not_overflow():
    rows, table = torch.full((2, 1), 1000.0), torch.tensor([[3.0], [2.0], [-3.0]])
    loss = softmax.cross_entropy(rows, table, torch.tensor([0, 1]))
    assert loss.item() == 500.0


def test_what_is_not_finite_is_seen():
    rows, table, targets = drawn(4, 6, 3)
    with torch.no_grad():
        rows[2, 1] = float("nan")
    assert softmax.cross_entropy(rows, table, targets).isnan()
