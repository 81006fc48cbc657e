"""SASRec: the packed network against the padded one, both losses against loops, learning, one seed."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.errors import DataError, InvalidArgument
from fastdiff.train.data import TrainingData
from fastdiff.train.layers import _Attention
from fastdiff.train.run import train
from fastdiff.train.sasrec import NextItems, SASRec, SASRecNetwork, SASRecSettings
from fastdiff.train.softmax import cross_entropy
from tests.tolerances import assert_agree
from tests.train.padded import padded_transformer, ring_data

SMALL = {"hidden_size": 8, "max_seq_len": 6, "n_heads": 2, "batch_size": 4, "learning_rate": 5e-3}
STILL = {**SMALL, "dropout": 0.0, "emb_dropout": 0.0}


def _network(n_items: int = 12, positions: bool = True) -> SASRecNetwork:
    return SASRecNetwork(n_items, 8, 6, 2, 2, 0.0, 0.0, positions).double()


def _padded(network: SASRecNetwork, items: Tensor) -> Tensor:
    """o [B, L, D] of left-padded rows [B, L], every slot computed."""
    x = network.item_embedding(items)
    if network.position_embedding is not None:
        x = x + network.position_embedding.weight
    return padded_transformer(network.trm_encoder, network.LayerNorm(x), items > 0)


@pytest.mark.parametrize("positions", [True, False])
def test_loss_and_gradients_are_those_of_the_padded_network(positions: bool) -> None:
    network, data = _network(positions=positions), ring_data()
    examples = NextItems.of(data, 6)
    chosen = torch.tensor([7, 0, 3, 5, 1])  # windows that are full, almost empty, and between
    batch, targets = examples.batch(chosen)
    loss = cross_entropy(network(batch)[0], network.item_embedding.weight, targets)
    gradients = torch.autograd.grad(loss, list(network.parameters()))

    table = examples.table[chosen]
    real = table[:, :-1] > 0
    out = _padded(network, table[:, :-1])
    terms = [
        -(out[user, slot] @ network.item_embedding.weight.T).log_softmax(0)[table[user, slot + 1]]
        for user, slot in real.nonzero().tolist()
    ]
    expected = torch.stack(terms).mean()
    assert_agree(loss.detach(), expected.detach(), torch.float64)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(network.parameters())), strict=True):
        assert (ours - theirs).abs().max() <= 1e-13  # absolute: the gradient of a key's bias is 0


@pytest.mark.parametrize("positions", [True, False])
def test_queries_are_those_of_the_padded_network_in_the_order_given(positions: bool) -> None:
    network = _network(positions=positions)
    histories = [[3, 4, 5], [], list(range(9)), [7], [1, 2, 0]]
    table = torch.zeros(len(histories), 6, dtype=torch.int64)
    for row, history in zip(table, histories, strict=True):
        for place, item in enumerate(reversed(history[-6:])):
            row[5 - place] = item + 1
    assert_agree(network.encode(histories).detach(), _padded(network, table)[:, -1].detach(), torch.float64)


def test_bce_is_the_formula_and_its_negatives_are_items_that_the_user_has_not() -> None:
    recipe = SASRec(SASRecSettings(**STILL, loss="bce"), ring_data())
    (stage,) = recipe.stages()
    examples = torch.tensor([2, 7, 4])
    users = torch.arange(9).repeat(200)
    others = recipe.draw_others(users)
    for user, other in zip(users.tolist(), others.tolist(), strict=True):
        assert 1 <= other <= 12
        assert other - 1 not in recipe.data.sequences[user]
    free = set(range(12)) - set(recipe.data.sequences[8].tolist())
    assert {int(row) - 1 for row in others[users == 8]} == free

    torch.manual_seed(5)
    (loss,) = recipe.losses(stage, examples).values()
    torch.manual_seed(5)
    batch, targets = recipe.examples.batch(examples)
    negatives = recipe.draw_others(batch.per_row(recipe.examples.users[examples][batch.order]))
    rows, table = recipe.network(batch)[0].tolist(), recipe.network.item_embedding.weight.tolist()
    total = 0.0
    for row, wanted, unwanted in zip(rows, targets.tolist(), negatives.tolist(), strict=True):
        good = sum(a * b for a, b in zip(row, table[wanted], strict=True))
        bad = sum(a * b for a, b in zip(row, table[unwanted], strict=True))
        total += math.log(1 + math.exp(-good)) + math.log(1 + math.exp(bad))
    assert loss.item() == pytest.approx(total / len(rows), rel=1e-5)


def test_a_users_targets_are_the_items_after_its_history() -> None:
    data = ring_data()
    examples = NextItems.of(data, 6)
    batch, targets = examples.batch(torch.arange(len(examples)))
    rows = batch.per_row(examples.users[batch.order])
    seen: dict[int, list[tuple[int, int]]] = {}
    for user, item, target in zip(rows.tolist(), batch.items.tolist(), targets.tolist(), strict=True):
        seen.setdefault(user, []).append((item - 1, target - 1))
    expected = {
        user: list(zip(sequence[:-1].tolist(), sequence[1:].tolist(), strict=True))[-6:]
        for user, sequence in enumerate(data.sequences)
        if len(sequence) >= 2
    }
    assert seen == expected


def test_dropout_of_one_key_for_many_pads_is_the_mean_of_theirs() -> None:
    attention = _Attention(4, 2, dropout=0.25)
    weights = torch.full((200_000,), 3.0)
    drawn = attention._drop_pads(weights, 10)
    theirs = torch.nn.functional.dropout(torch.full((200_000, 10), 0.3), 0.25).sum(1)
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.005)
    assert drawn.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    assert torch.equal(attention.eval()._drop_pads(weights, 10), weights)


@pytest.mark.parametrize(("loss", "reached"), [("ce", 0.8), ("bce", 0.5)])
def test_it_learns_a_ring_and_one_seed_gives_one_result(loss: str, reached: float, tmp_path: Path) -> None:
    settings = SASRecSettings(**STILL, loss=loss, epochs=60, validate_every=20)
    results = [
        train("sasrec", ring_data(24), tmp_path / name, settings, seed=3, show_progress=False, say=lambda line: None)
        for name in ("a", "b")
    ]
    weights = [torch.load(tmp_path / name / "state.pt", weights_only=True)["recipe"] for name in ("a", "b")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert results[0]["valid"] == results[1]["valid"]
    assert results[0]["valid"]["NDCG@5"] > reached


def test_errors() -> None:
    with pytest.raises(InvalidArgument, match="'ce' or 'bce'"):
        SASRecSettings(loss="mse")
    short = TrainingData([1, 2, 3], [np.array([0])], [], [])
    with pytest.raises(DataError, match="two items"):
        SASRec(SASRecSettings(**SMALL), short)
    everything = TrainingData([1, 2, 3], [np.array([0, 1, 2])], [], [])
    with pytest.raises(DataError, match="have all 3 items"):
        SASRec(SASRecSettings(**SMALL, loss="bce"), everything)
