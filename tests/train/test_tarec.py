"""TA-Rec's recipe: both stages' losses are their formulas, stage 2 moves the denoiser alone, one step learns."""

import math
from typing import Any

import pytest
import torch

from fastdiff.engine import Engine
from fastdiff.errors import InvalidArgument
from fastdiff.train.recipe import Stage
from fastdiff.train.tarec import ALIGNMENT, NEGATIVES, PRETRAINING, TARecRecipe, TARecSettings
from tests.tolerances import assert_agree
from tests.train.test_dreamrec import SMALL, cycle_data, fit, hit_rate_at_1, shaken, weighted_gradients
from tests.train.tiny import tiny_data


def small(dropout: float = 0.0, **changes: Any) -> TARecRecipe:
    return shaken(TARecRecipe(TARecSettings(**(SMALL | {"dropout": dropout} | changes)), tiny_data()))


def stage_of(recipe: TARecRecipe, name: str) -> Stage:
    (found,) = [stage for stage in recipe.stages() if stage.name == name]
    return found


@pytest.mark.parametrize("denoiser", ["mlp1", "mlp2"])
def test_one_step_of_the_network_is_one_step_of_the_engine(denoiser: str) -> None:
    recipe = small(denoiser=denoiser)
    network, config = recipe.network.eval(), recipe.config
    engine = Engine.from_checkpoint(recipe.model(recipe.stages()[0]))
    items, x_t = torch.randint(0, config.n_items, (6, 4)), torch.randn(6, 16)
    with torch.no_grad():
        wanted = network.denoise(x_t, network.encode_windows(items), torch.full((6,), 19))
    output = engine.generate(items.tolist(), noise=x_t, output_embeddings=True)
    assert output.embeddings is not None
    assert_agree(output.embeddings, wanted, torch.float32)


def test_stage_1_is_its_formula() -> None:
    recipe = small(consistency_weight=0.4, ranking_weight=0.7)
    network, config, stage = recipe.network, recipe.config, stage_of(recipe, PRETRAINING)
    examples = torch.arange(3)
    torch.manual_seed(3)
    losses = recipe.losses(stage, examples)

    torch.manual_seed(3)
    abar = torch.cumprod(1 - torch.linspace(0.01, 0.4, 20), 0)
    reconstruction = consistency = entropies = 0.0
    with torch.no_grad():
        h, targets = recipe.passes.encode(network, examples, recipe.device)
        t, noise = torch.randint(1, 20, (len(h),)), torch.randn(len(h), 16)
        dropped = torch.rand(len(h), 1)[:, 0] < 0.1
        assert 0 < int(dropped.sum()) < len(h)
        for row in range(len(h)):
            x = network.item_embeddings.weight[targets[row]]
            guidance = network.none_embedding.weight[0] if dropped[row] else h[row]
            estimates = []
            for step in (int(t[row]), int(t[row]) - 1):
                x_t = abar[step].sqrt() * x + (1 - abar[step]).sqrt() * noise[row]
                estimates.append(network.denoise(x_t[None], guidance[None], torch.tensor([step]))[0])
            reconstruction += float(((x - estimates[0]) ** 2).sum()) / 16
            consistency += float(((estimates[0] - estimates[1]) ** 2).sum()) / 16
            scores = [float(network.item_embeddings.weight[i] @ estimates[0]) / 4 for i in range(config.n_items)]
            entropies += math.log(sum(map(math.exp, scores))) - scores[int(targets[row])]
    assert math.isclose(losses["diffusion"].item(), reconstruction / len(h), rel_tol=1e-5)
    assert math.isclose(losses["consistency"].item(), 0.4 * consistency / len(h), rel_tol=1e-4)
    assert math.isclose(losses["ranking"].item(), 0.7 * entropies / len(h), rel_tol=1e-5)
    assert list(recipe_terms(small())) == ["diffusion", "consistency"], "the paper's stage 1"


def recipe_terms(recipe: TARecRecipe) -> dict[str, torch.Tensor]:
    return recipe.losses(stage_of(recipe, PRETRAINING), torch.arange(2))


def test_stage_2_is_its_formula() -> None:
    recipe = small(alignment_weight=0.8)
    network, stage = recipe.network, stage_of(recipe, ALIGNMENT)
    recipe.enter(stage)
    with torch.no_grad():
        for parameter in recipe.trained(stage):
            parameter += 0.05 * torch.randn_like(parameter)
    examples = torch.arange(3)
    torch.manual_seed(4)
    loss = recipe.losses(stage, examples)["alignment"].item()

    torch.manual_seed(4)
    abar = torch.cumprod(1 - torch.linspace(0.01, 0.4, 20), 0)
    total = 0.0
    with torch.no_grad():
        h, targets = recipe.passes.encode(network, examples, recipe.device)
        others = recipe.draw_negatives(h, targets)
        t, noise = torch.randint(0, 20, (len(h),)), torch.randn(len(h), 16)
        for row in range(len(h)):
            step = int(t[row])
            gains, items = [], []
            for item in (targets[row], others[row]):
                x = network.item_embeddings.weight[item]
                x_t = (abar[step].sqrt() * x + (1 - abar[step]).sqrt() * noise[row])[None]
                mine, its = (
                    net.denoise(x_t, h[row : row + 1], t[row : row + 1])[0] for net in (network, recipe.reference)
                )
                gains.append(float(((x - mine) ** 2).sum()) - float(((x - its) ** 2).sum()))
                items.append(x)
            cosine = float(items[0] @ items[1] / (items[0].norm() * items[1].norm()))
            weight = 0.8 * ((1 - step / 20) + (1 - cosine))
            total += math.log(1 + math.exp(weight * (gains[0] - gains[1])))
    assert math.isclose(loss, total / len(h), rel_tol=1e-4)


def test_stage_2_begins_at_its_reference_and_moves_the_denoiser_alone() -> None:
    recipe = small(dropout=0.1)
    stage = stage_of(recipe, ALIGNMENT)
    recipe.enter(stage)
    loss = recipe.losses(stage, torch.arange(4))["alignment"].item()
    assert math.isclose(loss, math.log(2), rel_tol=1e-6), "f is f_ref"
    before = {name: weight.clone() for name, weight in recipe.state_dict().items()}
    fit_from_here(recipe, stage)
    moved = {name for name, weight in recipe.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith(("network.diffuser.", "network.step_mlp."))}
    recipe.enter(stage)
    assert torch.equal(recipe.reference.diffuser[0].weight, recipe.network.diffuser[0].weight)


def fit_from_here(recipe: TARecRecipe, stage: Stage) -> None:
    losses = fit(recipe, stage, 3, 1e-3)
    assert losses[-1] < losses[0] < math.log(2)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_negatives_are_items_but_not_the_target(negatives: str) -> None:
    recipe = small(negatives=negatives)
    recipe.enter(stage_of(recipe, ALIGNMENT))
    h, targets = torch.randn(400, 16), torch.randint(0, 5, (400,))
    with torch.no_grad():
        drawn = recipe.draw_negatives(h, targets)
        assert not (drawn == targets).any()
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) < recipe.config.n_items
        if negatives == "batch":
            assert (drawn < 5).float().mean() > 0.7, "all but those that met their own target"
        else:
            assert len(drawn.unique()) > 20
        if negatives == "ranked":
            table = recipe.network.item_embeddings.weight[: recipe.config.n_items]
            scores = recipe.reference.denoise(torch.randn_like(h), h, torch.full_like(targets, 19)) @ table.T
            rows = torch.arange(400)
            assert scores[rows, drawn].mean() > scores.mean() + 0.3 * scores.std()


def test_unknown_negatives_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="negatives must be one of random, batch, ranked"):
        TARecSettings(negatives="hard")


@pytest.mark.parametrize("name", [PRETRAINING, ALIGNMENT])
def test_gradients(name: str) -> None:
    recipe = small(ranking_weight=0.5).double()
    stage = stage_of(recipe, name)
    recipe.enter(stage)
    with torch.no_grad():
        for parameter in recipe.network.diffuser.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    trained = {id(parameter) for parameter in recipe.trained(stage)}
    check = {key: value for key, value in recipe.named_parameters() if id(value) in trained}
    n_heads = len(recipe.passes.heads)
    weighted_gradients(recipe, stage, torch.tensor([0, 1, n_heads, n_heads + 1]), check)


def test_it_learns_a_cycle_in_one_step() -> None:
    settings = TARecSettings(**SMALL, batch_size=48, ranking_weight=1.0, stop_gradient=True)
    recipe = TARecRecipe(settings, cycle_data())
    assert hit_rate_at_1(recipe) < 0.5
    fit(recipe, stage_of(recipe, PRETRAINING), 100, 0.02)
    fit(recipe, stage_of(recipe, ALIGNMENT), 10, 1e-3)
    assert hit_rate_at_1(recipe) > 0.9
    assert hit_rate_at_1(recipe, scheduler="ddpm") > 0.9
    assert [stage.name for stage in TARecRecipe(TARecSettings(alignment_epochs=0), cycle_data()).stages()] == [
        PRETRAINING
    ]
