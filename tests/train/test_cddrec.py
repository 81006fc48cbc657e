"""CDDRec's recipe: losses against loops, the published slips against the published network, the checkpoint against the
engine, learning, one seed."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.published.cddrec import CDDRecModel
from fastdiff.engine import Engine
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.train.augmentations import crop, mask_out, reorder
from fastdiff.train.cddrec import CDDRecRecipe, CDDRecSettings, cross_divergence
from fastdiff.train.data import TrainingData, leave_one_out
from fastdiff.train.settings_file import load_settings, presets
from fastdiff.train.softmax import contrast, linear_contrast
from tests.tolerances import assert_agree
from tests.train.padded import ring_data
from tests.train.tiny import walks

SMALL = {
    "hidden_size": 8,
    "max_seq_len": 6,
    "n_heads": 2,
    "num_train_timesteps": 4,
    "beta_end": 0.2,
    "batch_size": 8,
    "init_std": 0.4,
}
STILL = {**SMALL, "attention_dropout": 0.0}


def _recipe(data: TrainingData | None = None, **changes: object) -> CDDRecRecipe:
    torch.manual_seed(3)
    recipe = CDDRecRecipe(CDDRecSettings(**{**STILL, **changes}), data or leave_one_out(walks(20, 15)))
    with torch.no_grad():
        for parameter in recipe.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return recipe.double()


def _published(recipe: CDDRecRecipe) -> CDDRecModel:
    own = recipe.settings
    args = SimpleNamespace(
        hidden_size=own.hidden_size,
        num_hidden_layers=own.n_layers,
        num_attention_heads=own.n_heads,
        hidden_act=own.hidden_act,
        max_seq_length=own.max_seq_len,
        item_size=recipe.data.n_items + 2,
        T=own.num_train_timesteps,
        beta_1=own.beta_start,
        beta_T=own.beta_end,
    )
    model = CDDRecModel(args).double().eval()
    model.load_state_dict(recipe.network.state_dict())
    model.decoder.train()  # the written-out path, which has gradients; its dropout is off
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.decoder.self_attn.dropout = model.decoder.multihead_attn.dropout = 0.0
    return model


# --- losses -----------------------------------------------------------------------------------------------------------


def test_cross_divergence_is_the_formula() -> None:
    x, positive, negative = torch.randn(3, 5, 4, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    total = 0.0
    for r in range(5):
        p, q = (1 / (1 + math.exp(-float(x[r] @ e[r]))) for e in (positive, negative))
        total += float(weights[r]) * (-math.log(p) - math.log(1 - q))
    expected = torch.tensor(total / float(weights.sum()), dtype=torch.float64)
    assert_agree(cross_divergence(x, positive, negative, weights), expected, torch.float64)


def _info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    rows = [row / row.norm() for row in (*a, *b)]
    n, losses = len(a), []
    for i, row in enumerate(rows):
        others = torch.stack([torch.exp(row @ other / temperature) for j, other in enumerate(rows) if j != i])
        losses.append(-torch.log(torch.exp(row @ rows[(i + n) % (2 * n)] / temperature) / others.sum()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("n", [1, 7, 130])  # 260 rows: two strips
@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_contrast_is_the_formula_with_its_gradient(n: int, temperature: float) -> None:
    torch.manual_seed(n)
    a, b = torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True)
    loss, expected = contrast(a, b, temperature), _info_nce(a, b, temperature)
    assert abs(float(loss.detach() - expected.detach())) <= 1e-12 / temperature  # absolute: a lone pair's loss is 0
    gradients = (torch.autograd.grad(value, (a, b)) for value in (2 * loss, 2 * expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-11 / temperature
    if n == 7:
        assert torch.autograd.gradcheck(lambda a, b: contrast(a, b, temperature), (a, b))


def test_contrast_stays_finite_at_the_smallest_temperature() -> None:
    a = torch.tensor([[1.0, 0.0]])
    b = -a.clone()
    assert abs(float(contrast(a, b, 0.03))) < 1e-4  # the only other row is the partner
    assert contrast(torch.randn(6, 4), torch.randn(6, 4), 0.03).isfinite()


def test_linear_contrast_is_the_formula_and_approaches_the_exact_one() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 9, 4, dtype=torch.float64)
    z = torch.cat([F.normalize(a, dim=1), F.normalize(b, dim=1)])
    losses = []
    for i in range(18):  # the row itself stays in the denominator
        total = sum(math.exp(float(z[i] @ z[j]) / 0.5) for j in range(18))
        losses.append(-math.log(math.exp(float(z[i] @ z[(i + 9) % 18]) / 0.5) / total))
    found = linear_contrast(a, b, 0.5, 200_000)
    assert abs(float(found) - np.mean(losses)) < 0.01

    torch.manual_seed(4)
    found = linear_contrast(a, b, 0.5, 16)
    torch.manual_seed(4)
    w = torch.randn(4, 16, dtype=torch.float64) / math.sqrt(0.5)
    phi = [torch.cat([torch.cos(row @ w), torch.sin(row @ w)]) / 4 for row in z]
    expected = torch.stack(
        [
            -torch.log(torch.exp(z[i] @ z[(i + 9) % 18] * 2) / (math.e**2 * sum(phi[i] @ f for f in phi)))
            for i in range(18)
        ]
    ).mean()
    assert_agree(found, expected, torch.float64)


# --- the whole loss, from the published network -----------------------------------------------------------------------


def _expected_losses(recipe: CDDRecRecipe, examples: Tensor, seed: int) -> dict[str, Tensor]:
    """The published arithmetic on whole padded tensors; without slips, on one batch per user where uncoupled."""
    model, own, slips = _published(recipe), recipe.settings, recipe.settings.published_slips
    items, targets = recipe.inputs[examples], recipe.targets[examples]
    augmented, negatives = recipe._augment(items), recipe._negatives(examples, items)
    table = model.item_embeddings.weight
    torch.manual_seed(seed)
    real = (items > 0).flatten()
    rows = torch.ones_like(real) if slips else real
    terms = dict.fromkeys(("divergence", "augmented", "in_view", "cross_view"), torch.zeros((), dtype=torch.float64))
    for t in reversed(range(own.num_train_timesteps)):
        sigma = torch.exp(0.5 * model.posterior_log_variance_clipped[t])
        abar, weight = model.alphas_cumprod[t], 1 / (t + 1)

        def mean(histories: Tensor, t: int = t) -> Tensor:
            embedded, mask = model.add_position_embedding(histories)
            c = model.conditional_encoder(embedded, mask.double())
            time = model.time_embeddings.weight[t].expand_as(c)
            if own.batch_coupling == "none":
                users = zip(c.split(1), time.split(1), strict=True)
                return torch.cat([model.decoder(*user) for user in users]).flatten(0, 1)[rows]
            return model.decoder(c, time).flatten(0, 1)[rows]

        def draw(like: Tensor) -> Tensor:
            return torch.randn(int(rows.sum()), like.shape[1], dtype=torch.float64)

        x = mean(items)
        x = x + sigma * draw(x)
        target = table[targets].flatten(0, 1)[rows]
        positive = abar.sqrt() * target + (1 - abar).sqrt() * draw(target)
        other = mean(augmented)
        other = other + sigma * draw(other)
        negative = table[negatives].flatten(0, 1)[rows]

        def divergence(x: Tensor, weights: Tensor, positive: Tensor = positive, negative: Tensor = negative) -> Tensor:
            p, q = torch.sigmoid((x * positive).sum(1)), torch.sigmoid((x * negative).sum(1))
            return ((-p.log() - (1 - q).log()) * weights).sum() / weights.sum()

        ids = augmented.flatten()[rows].double()
        counts = real[rows]
        terms["divergence"] = terms["divergence"] + weight * divergence(x, counts.double())
        terms["augmented"] = terms["augmented"] + weight * divergence(other, ids if slips else counts.double())
        terms["in_view"] = terms["in_view"] + 0.3 * weight * _info_nce(x[counts], positive[counts], 0.5)
        terms["cross_view"] = terms["cross_view"] + 0.3 * weight * _info_nce(x, other, 0.5)
    recipe.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**{name: term.detach() for name, term in terms.items()}, **gradients}


@pytest.mark.parametrize(
    ("coupling", "slips", "users"),
    # without slips, coupled users attend to items alone: with full histories there is no padding to tell the two apart
    [("published", True, "short"), ("published", False, "full"), ("none", False, "short")],
)
def test_losses_and_gradients_are_those_of_the_published_network(coupling: str, slips: bool, users: str) -> None:
    sequences = walks(20, 15, 9)
    if users == "short":
        sequences = [user._replace(items=user.items[at % 5 :]) for at, user in enumerate(sequences)]
    recipe = _recipe(leave_one_out(sequences), batch_coupling=coupling, published_slips=slips)
    examples = torch.tensor([4, 0, 11, 7])
    items = recipe.inputs[examples]
    augmented, negatives = reorder(items), recipe._negatives(examples, items)

    recipe._augment = lambda items: augmented[:, -items.shape[1] :]  # type: ignore[method-assign]
    recipe._negatives = lambda examples, items: negatives[:, -items.shape[1] :]  # type: ignore[method-assign]
    expected = _expected_losses(recipe, examples, seed=5)
    torch.manual_seed(5)
    terms = recipe.losses(recipe.stages()[0], examples)
    recipe.backward(recipe.stages()[0], terms)
    for name, term in terms.items():
        # the published noise levels go through an exponential of a logarithm
        assert abs(float(term.detach()) / float(expected[name]) - 1) < 1e-9, name
    for name, parameter in recipe.network.named_parameters():
        scale = float(expected[name].abs().max())
        assert float((parameter.grad - expected[name]).abs().max()) <= 1e-9 * scale + 1e-12, name


def test_a_batch_of_steps_is_an_unbiased_sample_of_the_sum() -> None:
    recipe, total = _recipe(num_train_timesteps=20, steps_per_batch=3), np.zeros(20)
    torch.manual_seed(0)
    for _ in range(4000):
        steps = recipe._steps()
        assert len(steps) == 3
        assert steps == sorted(steps, reverse=True)
        for t, weight in steps:
            total[t] += weight / 4000
    assert np.abs(total - 1 / np.arange(1, 21)).max() < 0.03
    assert _recipe()._steps() == [(3, 1 / 4), (2, 1 / 3), (1, 1 / 2), (0, 1.0)]


# --- examples ---------------------------------------------------------------------------------------------------------


def test_training_reads_the_authors_split() -> None:
    data = leave_one_out(walks(3, 15, 7))
    recipe = _recipe(data)
    for user, instance in enumerate(data.test):
        items = [data.numbers[item] + 1 for item in (*instance.history, instance.target)]
        assert recipe.inputs[user].tolist() == [0, 0, *items[:-3]]
        assert recipe.targets[user].tolist() == [0, 0, *items[1:-2]]


@pytest.mark.parametrize("slips", [False, True])
def test_negatives_are_all_that_the_user_has_not(slips: bool) -> None:
    recipe = _recipe(published_slips=slips)
    examples = torch.arange(3).repeat(300)
    negatives = recipe._negatives(examples, recipe.inputs[examples])
    for user in range(3):
        rows = set(range(1, recipe.data.n_items + 1 + slips)) - {int(item) + 1 for item in recipe.data.sequences[user]}
        assert set(negatives[examples == user].flatten().tolist()) == rows


def test_augmentations() -> None:
    torch.manual_seed(1)
    items = torch.zeros(200, 10, dtype=torch.int64)
    for user, n in enumerate(torch.randint(1, 11, (200,)).tolist()):
        items[user, 10 - n :] = torch.arange(1, n + 1)
    lengths = (items != 0).sum(1)
    changed = 0
    for before, after, n in zip(items, reorder(items), lengths.tolist(), strict=True):
        assert sorted(before.tolist()) == sorted(after.tolist())
        moved = (before != after).nonzero()[:, 0]
        changed += len(moved) > 0
        assert len(moved) == 0 or int(moved[-1] - moved[0]) < int(0.6 * n)
    assert changed > 100
    masked = mask_out(items, 99)
    assert torch.equal((masked == 99).sum(1), (0.3 * lengths.double()).floor().long())
    assert torch.equal(masked[masked != 99], items[masked != 99])
    for before, after, n in zip(items, crop(items), lengths.tolist(), strict=True):
        kept = after.nonzero()[:, 0]
        assert len(kept) == max(1, int(0.6 * n))
        assert int(kept[-1] - kept[0]) == len(kept) - 1
        assert torch.equal(after[kept], before[kept])


@pytest.mark.parametrize("changes", [{"augmentation": "random"}, {"linear_infonce": True}, {"augmentation": "crop"}])
@pytest.mark.parametrize("coupling", ["published", "none"])
def test_every_form_of_the_loss_has_finite_gradients(changes: dict[str, object], coupling: str) -> None:
    data = leave_one_out([user._replace(items=user.items[at % 5 :]) for at, user in enumerate(walks(20, 15))])
    recipe = _recipe(data, batch_coupling=coupling, attention_dropout=0.2, hidden_dropout=0.1, **changes)
    stage = recipe.stages()[0]
    recipe.backward(stage, recipe.losses(stage, torch.arange(recipe.n_examples(stage))))
    assert all(parameter.grad.isfinite().all() for parameter in recipe.parameters())  # type: ignore[union-attr]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["published", "none"])
def test_the_engine_runs_the_network_that_was_trained(coupling: str) -> None:
    recipe = _recipe(batch_coupling=coupling, n_layers=2).float().eval()
    histories = [list(instance.history) for instance in recipe.data.test][:7]
    histories[2], histories[5] = histories[2][-1:], histories[5][-3:]
    noise = torch.randn(2, 7, 8)
    engine = Engine.from_checkpoint(recipe.model(recipe.stages()[0]))
    output = engine.generate(histories, noise=noise, output_embeddings=True)

    items = torch.zeros(7, 6, dtype=torch.int64)
    for row, history in zip(items, histories, strict=True):
        known = torch.tensor([recipe.data.numbers[item] + 1 for item in history[-6:]])
        row[6 - len(known) :] = known
    network, rows = recipe.network, items != 0
    last = torch.zeros_like(rows)
    last[:, -1] = True
    with torch.no_grad():
        x = network.step(network.attend(network.encode(items, rows), rows), 0)[last[rows]] + recipe._sigma[0] * noise[1]
    assert_agree(torch.as_tensor(output.embeddings).float(), x, torch.float32)


@pytest.mark.parametrize("coupling", ["published", "none"])
def test_it_learns_a_ring(coupling: str) -> None:
    settings = {**SMALL, "hidden_size": 16, "batch_coupling": coupling, "attention_dropout": 0.0, "init_std": 0.1}
    torch.manual_seed(0)
    users = [user._replace(items=[(at + place) % 30 for place in range(8)]) for at, user in enumerate(walks(60, 12))]
    recipe = CDDRecRecipe(CDDRecSettings(**settings), leave_one_out(users))
    stage, optimizer = recipe.stages()[0], torch.optim.Adam(recipe.parameters(), 1e-2)
    for _ in range(30):
        for examples in torch.randperm(60).split(20):
            optimizer.zero_grad()
            recipe.backward(stage, recipe.losses(stage, examples))
            optimizer.step()
    recipe.eval()
    engine = Engine.from_checkpoint(recipe.model(stage))
    learned = [row.history for row in recipe.data.valid]
    output = engine.generate([items[:-1] for items in learned], top_k=1, seed=0)
    hits = np.asarray(output.item_ids)[:, 0] == np.array([items[-1] for items in learned])
    assert hits.mean() > 0.8


def test_one_seed_one_result() -> None:
    def run() -> list[float]:
        torch.manual_seed(9)
        recipe = CDDRecRecipe(CDDRecSettings(**SMALL, steps_per_batch=2, augmentation="random"), ring_data())
        stage = recipe.stages()[0]
        return [term.item() for term in recipe.losses(stage, torch.arange(recipe.n_examples(stage))).values()]

    assert run() == run()


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(InvalidArgument, match="augmentation must be one of"):
        CDDRecSettings(augmentation="shuffle")
    with pytest.raises(InvalidArgument, match=r"temperature must be at least 0\.03"):
        CDDRecSettings(temperature=0.01)
    with pytest.raises(InvalidArgument, match=r"1\.\.20"):
        CDDRecSettings(steps_per_batch=21)
    with pytest.raises(DataError, match="no user has two items"):
        CDDRecRecipe(CDDRecSettings(), leave_one_out(walks(4, 15, 3)))
    with pytest.raises(DataError, match="every item of the data"):
        CDDRecRecipe(CDDRecSettings(), leave_one_out([walks(1)[0]._replace(items=[1, 2, 3, 1, 2])]))


@pytest.mark.parametrize("name", sorted(presets("cddrec")))
def test_shipped_settings_are_valid(name: str) -> None:
    settings = load_settings("cddrec", CDDRecSettings, preset=name)
    assert isinstance(settings, CDDRecSettings)
    settings.config(10)
