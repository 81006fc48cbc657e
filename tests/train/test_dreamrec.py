"""DreamRec's recipe: the network is the model that runs, the losses are their formulas, and it learns."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff.data import UserSequence
from fastdiff.engine import Engine
from fastdiff.errors import InvalidArgument
from fastdiff.evaluate import evaluate
from fastdiff.models.base import Histories
from fastdiff.train.data import TrainingData, leave_one_out
from fastdiff.train.dreamrec import DreamRecRecipe, DreamRecSettings, Passes
from fastdiff.train.recipe import Recipe, Stage
from tests.tolerances import assert_agree
from tests.train.tiny import tiny_data

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "max_seq_len": 4,
    "num_train_timesteps": 20,
    "beta_schedule": "linear",
    "beta_start": 0.01,
    "beta_end": 0.4,
}


def small(dropout: float = 0.0, **changes: Any) -> DreamRecRecipe:
    return shaken(DreamRecRecipe(DreamRecSettings(**(SMALL | {"dropout": dropout} | changes)), tiny_data()))


def shaken(recipe: Any) -> Any:
    """A fresh norm can put a row's sum at exactly 0, which the authors' code masks; a trained one does not."""
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return recipe


def fit(recipe: Recipe, stage: Stage, epochs: int, learning_rate: float) -> list[float]:
    """A plain loop; the losses of its epochs."""
    recipe.enter(stage)
    optimizer = torch.optim.AdamW(list(recipe.trained(stage)), lr=learning_rate, weight_decay=0.0)
    means = []
    for _ in range(epochs):
        total = 0.0
        batches = torch.randperm(recipe.n_examples(stage)).split(stage.batch_size)
        for examples in batches:
            losses = recipe.losses(stage, examples)
            optimizer.zero_grad()
            recipe.backward(stage, losses)
            optimizer.step()
            total += sum(loss.item() for loss in losses.values())
        means.append(total / len(batches))
    return means


def weighted_gradients(recipe: Recipe, stage: Stage, examples: Tensor, check: dict[str, nn.Parameter]) -> None:
    """Gradients of the sum of the losses against central differences, at three entries of each weight; in float64."""

    def value() -> Tensor:
        torch.manual_seed(5)
        return torch.stack(list(recipe.losses(stage, examples).values())).sum()

    def number() -> float:
        return value().item()

    gradients = torch.autograd.grad(value(), list(check.values()), allow_unused=True)
    for (name, parameter), gradient in zip(check.items(), gradients, strict=True):
        assert gradient is not None, name
        flat = parameter.data.view(-1)
        for at in gradient.abs().flatten().argsort(descending=True)[:3].tolist():
            before, step = float(flat[at]), 1e-5
            flat[at] = before + step
            above = number()
            flat[at] = before - step
            below = number()
            flat[at] = before
            slope = (above - below) / (2 * step)
            assert math.isclose(slope, float(gradient.view(-1)[at]), rel_tol=1e-5, abs_tol=1e-9), name


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoiser", ["mlp1", "mlp2"])
def test_the_network_that_is_trained_is_the_model_that_runs(denoiser: str) -> None:
    """Its own encoder and its own chain, guidance included, against the engine on the same noise."""
    recipe = small(denoiser=denoiser)
    network, config = recipe.network.eval(), recipe.config
    engine = Engine.from_checkpoint(recipe.model(recipe.stages()[0]))
    items = torch.randint(0, config.n_items, (5, config.max_seq_len))
    total, dim = config.schedule.num_train_timesteps, config.hidden_size
    noise = torch.randn(total, 5, dim)
    schedule = config.schedule.build()
    with torch.no_grad():
        h = network.encode_prefixes(items)
        assert_agree(network.encode_windows(items), h[:, -1], torch.float32)
        first, bias = engine.model.weights["diffuser.0.weight"], engine.model.weights["diffuser.0.bias"]
        for n in range(config.max_seq_len + 1):
            histories = Histories(items[:, : max(n, 1)], torch.full((5,), n))
            ours = engine.model.encode(histories, engine.model.item_table)
            assert_agree(h[:, n] @ first[:, dim : 2 * dim].T + bias, ours, torch.float32)

            x = noise[0]
            for i, step in enumerate(reversed(range(total))):
                t = torch.full((5,), step)
                guided = 3.0 * network.denoise(x, h[:, n], t)
                x_start = guided - 2.0 * network.denoise(x, network.none_embedding.weight.expand(5, -1), t)
                x = schedule.posterior_mean_coef1[step] * x_start + schedule.posterior_mean_coef2[step] * x
                if step:
                    x = x + schedule.posterior_variance[step].sqrt() * noise[1 + i]
            output = engine.generate(items[:, :n].tolist(), noise=noise, output_embeddings=True)
            assert output.embeddings is not None
            assert_agree(output.embeddings, x, torch.float32, factor=10)


# --- the instances ----------------------------------------------------------------------------------------------------


def test_every_item_is_the_target_of_the_window_before_it_once() -> None:
    sequences = [np.arange(n) + 10 * n for n in (1, 2, 5, 6, 9)]
    passes = Passes(sequences, 4, pad=999)
    found = []
    for row, length in zip(passes.heads.tolist(), passes.lengths.tolist(), strict=True):
        assert row[length:] == [999] * (5 - length)
        found += [(tuple(row[max(0, at - 4) : at]), row[at]) for at in range(length)]
    found += [(tuple(row[:4]), row[4]) for row in passes.tails.tolist()]
    wanted = [(tuple(s[max(0, at - 4) : at].tolist()), int(s[at])) for s in sequences for at in range(len(s))]
    assert sorted(found) == sorted(wanted)
    assert len(passes) == 5 + 1 + 4


def test_a_pass_over_a_sequence_is_a_pass_per_instance() -> None:
    recipe = small()
    network, passes = recipe.network.eval(), recipe.passes
    chosen = torch.randperm(len(passes))[:25]
    with torch.no_grad():
        h, targets = passes.encode(network, chosen, recipe.device)
        one_by_one: list[Tensor] = []
        wanted: list[int] = []
        for row in (row for row in chosen.tolist() if row < len(passes.heads)):
            items = passes.heads[row, : passes.lengths[row]]
            for at in range(len(items)):
                one_by_one.append(network.encode_prefixes(items[None, :at])[0, -1])
                wanted.append(int(items[at]))
        for row in (row for row in chosen.tolist() if row >= len(passes.heads)):
            items = passes.tails[row - len(passes.heads)]
            one_by_one.append(network.encode_prefixes(items[None, :-1])[0, -1])
            wanted.append(int(items[-1]))
    assert targets.tolist() == wanted
    assert_agree(h, torch.stack(one_by_one), torch.float32)


@pytest.mark.parametrize("only", ["heads", "tails"])
def test_a_batch_of_one_kind_of_pass(only: str) -> None:
    recipe = small()
    n_heads = len(recipe.passes.heads)
    examples = torch.tensor([1, 2]) if only == "heads" else torch.tensor([n_heads, n_heads + 3])
    losses = recipe.losses(recipe.stages()[0], examples)
    assert torch.isfinite(losses["diffusion"])


# --- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("denoiser", "ranking_at"), [("mlp1", "drawn"), ("mlp2", "drawn"), ("mlp1", "last")])
def test_the_losses_are_their_formulas(denoiser: str, ranking_at: str) -> None:
    temperature = {"drawn": None, "last": 2.0}[ranking_at]
    recipe = small(denoiser=denoiser, ranking_weight=0.7, ranking_at=ranking_at, ranking_temperature=temperature)
    network, config, stage = recipe.network, recipe.config, recipe.stages()[0]
    examples = torch.arange(3)
    torch.manual_seed(3)
    losses = recipe.losses(stage, examples)

    torch.manual_seed(3)
    abar = torch.cumprod(1 - torch.linspace(0.01, 0.4, 20), 0)
    with torch.no_grad():
        h, targets = recipe.passes.encode(network, examples, recipe.device)
        t, noise = torch.randint(0, 20, (len(h),)), torch.randn(len(h), 16)
        dropped = torch.rand(len(h), 1)[:, 0] < 0.1
        last_noise = torch.randn(len(h), 16)
        assert 0 < int(dropped.sum()) < len(h)
        squares = entropies = 0.0
        for row in range(len(h)):
            x = network.item_embeddings.weight[targets[row]]
            x_t = abar[t[row]].sqrt() * x + (1 - abar[t[row]]).sqrt() * noise[row]
            guidance = network.none_embedding.weight[0] if dropped[row] else h[row]
            estimate = network.denoise(x_t[None], guidance[None], t[row : row + 1])[0]
            squares += float(((x - estimate) ** 2).sum()) / 16
            if ranking_at == "last":
                estimate = network.denoise(last_noise[row][None], guidance[None], torch.tensor([19]))[0]
            divisor = temperature or 4.0
            scores = [float(network.item_embeddings.weight[i] @ estimate) / divisor for i in range(config.n_items)]
            entropies += math.log(sum(map(math.exp, scores))) - scores[int(targets[row])]
    assert math.isclose(losses["diffusion"].item(), squares / len(h), rel_tol=1e-5)
    assert math.isclose(losses["ranking"].item(), 0.7 * entropies / len(h), rel_tol=1e-5)


def test_the_papers_loss_has_one_term_that_moves_the_table_and_stop_gradient_holds_it() -> None:
    pure, held = small(), small(stop_gradient=True)
    for recipe, moves in ((pure, True), (held, False)):
        stage = recipe.stages()[0]
        losses = recipe.losses(stage, torch.arange(4))
        assert list(losses) == ["diffusion"]
        recipe.backward(stage, losses)
        gradient = recipe.network.item_embeddings.weight.grad
        assert gradient is not None
        n_heads = recipe.passes.heads[:4]
        # an item that is the last of its sequence is only ever a target
        last = n_heads[0, recipe.passes.lengths[0] - 1]
        assert last not in n_heads[:, :-1]
        assert bool(gradient[last].any()) == moves


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gradients(stop_gradient: bool) -> None:
    """All but the table under `stop_gradient`, where the gradient is not that of the value, on purpose."""
    recipe = small(ranking_weight=0.5, stop_gradient=stop_gradient).double()
    check = dict(recipe.network.named_parameters())
    if stop_gradient:
        del check["item_embeddings.weight"]
    n_heads = len(recipe.passes.heads)
    weighted_gradients(recipe, recipe.stages()[0], torch.tensor([0, 1, n_heads, n_heads + 1]), check)


# --- training ---------------------------------------------------------------------------------------------------------


def cycle_data(n_items: int = 12, length: int = 8) -> TrainingData:
    """Items that always follow each other."""
    users = [
        UserSequence(str(user), [(user + at) % n_items for at in range(length)], f"cycle:{user + 1}")
        for user in range(2 * n_items)
    ]
    return leave_one_out(users)


def hit_rate_at_1(recipe: Recipe, **arguments: Any) -> float:
    with torch.no_grad():
        engine = Engine.from_checkpoint(recipe.model(recipe.stages()[-1]))
    return evaluate(engine, recipe.data.valid, top_ks=(1,), show_progress=False, **arguments).metrics["HR@1"]


@pytest.mark.parametrize("ours", [False, True])
def test_it_learns_a_cycle(ours: bool) -> None:
    """By the paper's loss alone, and with ours: after seconds the full chain, from noise, puts the next item first.
    The paper's shrinks the table all the while, and is stopped before all items are one."""
    changes: dict[str, Any] = {"ranking_weight": 1.0, "stop_gradient": True} if ours else {}
    recipe = DreamRecRecipe(DreamRecSettings(**(SMALL | changes), batch_size=48), cycle_data())
    assert hit_rate_at_1(recipe) < 0.5
    losses = fit(recipe, recipe.stages()[0], *((100, 0.02) if ours else (250, 0.003)))
    assert losses[-1] < 0.6 * losses[0]
    assert hit_rate_at_1(recipe) > (0.9 if ours else 0.7)


def test_an_unknown_place_of_the_ranking_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="ranking_at must be one of drawn, last"):
        DreamRecSettings(ranking_at="first")


def test_one_seed_one_result() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(9)
        recipe = DreamRecRecipe(DreamRecSettings(**SMALL, batch_size=16), tiny_data())
        fit(recipe, recipe.stages()[0], 2, 0.01)
        weights.append(copy.deepcopy(recipe.state_dict()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_checkpoint_takes_guidance_and_schedule_from_the_settings() -> None:
    recipe = small(guidance_scale=5.0, beta_schedule="exp", num_train_timesteps=30)
    checkpoint = recipe.model(recipe.stages()[0])
    assert checkpoint.generation_config.guidance_scale == 5.0
    assert checkpoint.generation_config.scheduler == "ddpm"
    assert checkpoint.config.schedule.to_dict() == {
        "family": "exp",
        "num_train_timesteps": 30,
        "arithmetic": "float32",
        "beta_start": 0.01,
        "beta_end": 0.4,
    }
