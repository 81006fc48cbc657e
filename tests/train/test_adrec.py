"""ADRec: losses and gradients against the padded network, their merging, the warm-up, and the engine on the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.engine import Engine
from fastdiff.errors import InvalidArgument
from fastdiff.train.adrec import ADRec, ADRecSettings, diffuse, drop_condition, project_conflicting
from fastdiff.train.layers import CausalTransformer, Packed
from fastdiff.train.run import train
from fastdiff.train.sasrec import SASRec, SASRecSettings
from tests.tolerances import AGREE, assert_agree, relative_error
from tests.train.padded import padded_transformer, ring_data

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "max_seq_len": 6,
    "n_heads": 2,
    "num_train_timesteps": 24,
    "lambda_uncertainty": 0.3,  # so much that an error in x_t or the time shows
    "batch_size": 4,
    "learning_rate": 5e-3,
}
STILL = {**SMALL, "dropout": 0.0, "emb_dropout": 0.0}
VARIANTS = {
    "plain": {},
    "geodesic": {"geodesic": True},
    "guided": {"guidance_scale": 2.5},
    "mlp": {"decoder": "mlp"},
    "mlp, guided": {"decoder": "mlp", "guidance_scale": 2.5},
    "raw timesteps": {"rescale_timesteps": False},
}


def _recipe(**changes: Any) -> ADRec:
    torch.manual_seed(1)
    recipe = ADRec(ADRecSettings(**(STILL | changes)), ring_data())
    torch.nn.init.normal_(recipe.network.item_embedding.weight)  # the pad's row too, as after the first stage
    return recipe


def _stage(recipe: ADRec, name: str) -> Any:
    return next(stage for stage in recipe.stages() if stage.name == name)


def _exact(recipe: ADRec) -> ADRec:
    """All in float64, the tables too, which are float32 as in inference."""
    settings = recipe.settings
    recipe.double()
    recipe.alphas_cumprod = torch.cumprod(1 - recipe.config.schedule.build().betas, 0)
    fed = torch.arange(24, dtype=torch.float64) * (1000 / 24 if settings.rescale_timesteps else 1)
    angles = fed.unsqueeze(1) * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    recipe.network.sinusoids = torch.cat([angles.cos(), angles.sin()], 1)
    return recipe


def _tau(recipe: ADRec, t: Tensor) -> Tensor:
    """tau [.., D] of timesteps [..]."""
    first, _, second = recipe.network.diffu.net.time_embed
    hidden = first(recipe.network.sinusoids[t])
    return second(hidden * hidden.sigmoid())


def _padded_losses(recipe: ADRec, table: Tensor, noise: Tensor, t: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """CE and MSE of rows [B, L + 1], every slot computed; noise [B, L, D], t [B, L], dropped [B]."""
    network, settings = recipe.network, recipe.settings
    embedding = network.item_embedding  # gives its pad no gradient
    items, targets, real = table[:, :-1], table[:, 1:].clone(), table[:, :-1] > 0
    targets[~real] = 0

    x = embedding(items)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-12)
    c = padded_transformer(network.diffu.ag_encoder, network.hist_norm.weight * scaled + network.hist_norm.bias, real)
    c = torch.where(dropped[:, None, None], 0.0, c)

    y = embedding(targets)
    if settings.geodesic:
        y = y / y.norm(dim=-1, keepdim=True)
    a = recipe.alphas_cumprod[t].unsqueeze(-1)
    x_t = a.sqrt() * y + (1 - a).sqrt() * noise
    if settings.geodesic:
        length = x_t.norm(dim=-1, keepdim=True)
        x_t = length.cos() * y + length.sin() * x_t / (length + 1e-8)
    x_t = torch.where(real.unsqueeze(-1), x_t, y)
    u = c + settings.lambda_uncertainty * (x_t + _tau(recipe, t * real))
    decoder = network.diffu.net.decoder
    out = padded_transformer(decoder, u, real) if isinstance(decoder, CausalTransformer) else decoder(u)

    ce, mse = [], []
    for user in range(len(items)):
        own = []
        for slot in real[user].nonzero().flatten().tolist():
            ce.append(-(out[user, slot] @ embedding.weight.T).log_softmax(0)[targets[user, slot]])
            own.append((out[user, slot] - y[user, slot]).square().sum() / y.shape[-1])
        mse.append(torch.stack(own).mean())
    return torch.stack(ce).mean(), torch.stack(mse).mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_the_padded_network(variant: str) -> None:
    recipe = _exact(_recipe(**VARIANTS[variant]))
    chosen = torch.tensor([7, 0, 3, 5, 1])
    batch, targets = recipe.examples.batch(chosen)
    table = recipe.examples.table[chosen][batch.order]
    real = table[:, :-1] > 0
    dropped = torch.zeros(5, dtype=torch.bool)
    if "guided" in variant:
        dropped[[1, 4]] = True
    t, noise = torch.randint(0, 24, real.shape), torch.randn(*real.shape, 8, dtype=torch.float64)
    weights = list(recipe.network.parameters())

    terms = recipe.terms(
        recipe.network.item_embedding.weight,
        batch,
        targets,
        t[real],
        noise[real],
        dropped if "guided" in variant else None,
    )
    expected = _padded_losses(recipe, table, noise, t, dropped)
    for ours, theirs in zip((terms["ce"], terms["mse"]), expected, strict=True):
        assert_agree(2 * ours.detach(), theirs.detach(), torch.float64)
        gradients = (
            torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True) for loss in (ours, theirs)
        )
        for one, two in zip(*gradients, strict=True):
            assert (2 * one - two).abs().max() <= 1e-12  # absolute: the gradient of a key's bias is 0


def test_loss_is_half_of_each_and_its_gradient_is_right() -> None:
    """Central differences in float64 along random directions, of everything that is trained."""
    recipe = _exact(_recipe(geodesic=True, mse_weight=0.7))
    batch, targets = recipe.examples.batch(torch.tensor([2, 6]))
    t, noise = torch.randint(0, 24, targets.shape), torch.randn(len(targets), 8, dtype=torch.float64)

    def loss() -> Tensor:
        return sum(recipe.terms(recipe.network.item_embedding.weight, batch, targets, t, noise, None).values())

    recipe.backward(_stage(recipe, "full"), {"loss": loss()})
    for name, weight in recipe.network.named_parameters():
        direction = torch.randn_like(weight)
        if name == "item_embedding.weight":
            direction[0] = 0  # the pad's row in histories has no gradient, by the authors' padding_idx
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                weight += step * direction
                values.append(loss().item())
        with torch.no_grad():
            weight += 1e-6 * direction
        assert weight.grad is not None
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((weight.grad * direction).sum().item(), abs=1e-7), name


def test_projection_of_conflicting_gradients() -> None:
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    # one . two = -1: (1, 0) + (-1, 1) / 2 = (.5, .5) and (-1, 1) + (1, 0) = (0, 1)
    assert torch.allclose(project_conflicting(one, two), torch.tensor([0.5, 1.5]))
    assert torch.equal(project_conflicting(one, -two), one - two)
    assert torch.equal(project_conflicting(one, torch.zeros(2)), one)


def test_pcgrad_merges_the_gradients_of_all_weights_at_once() -> None:
    plain, projected = _recipe(mse_weight=5.0), _recipe(mse_weight=5.0, pcgrad=True)
    merged, flat = [], []
    for recipe in (plain, projected):
        torch.manual_seed(3)
        losses = recipe.losses(_stage(recipe, "full"), torch.arange(8))
        if recipe is plain:
            weights = list(recipe.network.parameters())
            for loss in losses.values():
                parts = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
                flat.append(torch.cat([part.flatten() for part in parts]))
        recipe.backward(_stage(recipe, "full"), losses)
        merged.append(torch.cat([weight.grad.flatten() for weight in recipe.network.parameters()]))  # type: ignore
    assert relative_error(merged[0], flat[0] + flat[1]) < AGREE[torch.float32]
    assert relative_error(merged[1], project_conflicting(*flat)) < AGREE[torch.float32]


@pytest.mark.parametrize("shrink", [True, False])
def test_the_frozen_table_shrinks_as_the_authors_does_or_stays(shrink: bool) -> None:
    recipe = _recipe(shrink_frozen=shrink)
    torch.nn.init.normal_(recipe.pretrained.item_embedding.weight)
    stage = _stage(recipe, "warmup")
    recipe.enter(stage)
    before = recipe.pretrained.item_embedding.weight.detach().clone()
    table = recipe.network.item_embedding.weight
    assert torch.equal(table, before)
    trained = list(recipe.trained(stage))
    assert any(weight is table for weight in trained) == shrink
    # the authors' optimizer, and enough steps that Adam's ratio of moments is exactly +-1
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=1e-5)
    for _ in range(3):
        optimizer.zero_grad()
        recipe.backward(stage, recipe.losses(stage, torch.arange(4)))
        optimizer.step()
    far = before.abs() > 0.1  # there the decay is large beside Adam's epsilon
    moved = (before - table.detach())[far]
    assert torch.allclose(moved, 3e-3 * before[far].sign() if shrink else torch.zeros_like(moved), atol=5e-5)


def test_conditions_are_dropped_for_the_share_asked() -> None:
    recipe = _recipe(guidance_scale=2.0, condition_dropout=1.0)
    batch, targets = recipe.examples.batch(torch.arange(8))
    c, pads = recipe.network.encode(batch, recipe.network.item_embedding.weight)
    everyone = torch.ones(8, dtype=torch.bool)
    zero, zero_pads = drop_condition(c, pads, everyone, batch)
    assert not zero.any()
    assert not zero_pads.hidden[zero_pads.kind].any()

    stage = _stage(recipe, "full")
    torch.manual_seed(4)
    losses = recipe.losses(stage, torch.arange(8))
    torch.manual_seed(4)
    t, noise = torch.randint(0, 24, targets.shape), torch.randn(len(targets), 8)
    expected = recipe.terms(recipe.network.item_embedding.weight, batch, targets, t, noise, everyone)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    network = recipe.network.diffu.ag_encoder
    assert not any(
        g.any()
        for g in torch.autograd.grad(losses["ce"], list(network.parameters()), allow_unused=True)
        if g is not None
    )


def _sample(recipe: ADRec, histories: list[list[int]], noise: Tensor, guidance: float) -> Tensor:
    """x_0 [B, D] by the training network, a step at a time; noise [T + 1, B, D]."""
    network, schedule = recipe.network.eval(), recipe.config.schedule.build()
    table = network.item_embedding.weight
    batch = Packed.of_histories(histories, recipe.settings.max_seq_len)
    ends = batch.lengths.cumsum(0) - 1
    c, pads = network.encode(batch, table)
    everyone = torch.ones(len(histories), dtype=torch.bool)
    clean = network.target(
        table[torch.cat([batch.items[1:], batch.items[:1]])]
    )  # each row's next; the last is replaced
    x = noise[0, batch.order]
    for i, step in enumerate(reversed(range(schedule.num_train_timesteps))):
        rows, t = clean.clone(), torch.zeros(len(clean), dtype=torch.int64)
        rows[ends], t[ends] = x, step
        out = network.denoise(c, pads, rows, t, batch, table)[ends]
        if guidance != 1.0:
            free = network.denoise(*drop_condition(c, pads, everyone, batch), rows, t, batch, table)[ends]
            out = free + guidance * (out - free)
        x = schedule.posterior_mean_coef1[step] * out + schedule.posterior_mean_coef2[step] * x
        if step:
            x = x + schedule.betas[step].sqrt() * noise[1 + i, batch.order]
        if recipe.settings.geodesic:
            x = x / x.norm(dim=1, keepdim=True)
        x = x.float()
    return torch.empty_like(x).index_copy(0, batch.order, x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_runs_what_is_trained(variant: str) -> None:
    recipe = _recipe(**VARIANTS[variant])
    histories = [[3, 4, 5], [7], list(range(10)), [1, 2, 0, 9, 8, 7], [4, 4]]
    noise = torch.randn(25, len(histories), 8)
    engine = Engine.from_checkpoint(recipe.model(_stage(recipe, "full")))
    ids = [[recipe.data.item_ids[item] for item in history] for history in histories]
    with torch.no_grad():
        expected = _sample(recipe, histories, noise, recipe.settings.guidance_scale)
    embeddings = engine.generate(ids, noise=noise, output_embeddings=True).embeddings
    assert_agree(torch.as_tensor(embeddings), expected, torch.float32, factor=4)


def test_the_first_stage_is_sasrec_without_positions() -> None:
    """The same weights and draws give the loss of the recipe `sasrec` whose positions are zero."""
    recipe = _recipe()
    sasrec = SASRec(SASRecSettings(hidden_size=8, max_seq_len=6, n_heads=2, dropout=0.0, emb_dropout=0.0), ring_data())
    position = sasrec.network.position_embedding
    assert position is not None
    torch.nn.init.zeros_(position.weight)
    sasrec.network.load_state_dict(recipe.pretrained.state_dict(), strict=False)
    ours = recipe.losses(_stage(recipe, "pretrain"), torch.arange(8))["ce"]
    (theirs,) = sasrec.losses(sasrec.stages()[0], torch.arange(8)).values()
    assert_agree(ours.detach(), theirs.detach(), torch.float32)


def _run(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = ADRecSettings(**(SMALL | {"num_train_timesteps": 4, "beta_schedule": "cosine"} | changes))
    return train("adrec", ring_data(24), folder, settings, seed=3, show_progress=False, say=lambda line: None)


def test_it_learns_a_ring(tmp_path: Path) -> None:
    lengths = {"pretrain_epochs": 20, "warmup_epochs": 2, "epochs": 25, "validate_every": 25}
    result = _run(tmp_path / "run", learning_rate=2e-2, batch_size=8, **lengths)
    assert result["valid"]["NDCG@5"] > 0.6


def test_one_seed_gives_one_result(tmp_path: Path) -> None:
    lengths = {"pretrain_epochs": 1, "warmup_epochs": 1, "epochs": 2, "validate_every": 1}
    results = [_run(tmp_path / name, guidance_scale=1.5, **lengths)["valid"] for name in ("a", "b")]
    weights = [torch.load(tmp_path / name / "state.pt", weights_only=True)["recipe"] for name in ("a", "b")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert results[0] == results[1]


def test_the_noise_of_a_row_is_as_the_schedule_says() -> None:
    x, noise = torch.randn(4, 8), torch.randn(4, 8)
    a = torch.tensor([1.0, 0.25, 0.0, 0.64])
    x_t = diffuse(x, a, noise, geodesic=False)
    assert torch.equal(x_t[0], x[0])
    assert torch.equal(x_t[2], noise[2])
    assert torch.allclose(x_t[3], 0.8 * x[3] + 0.6 * noise[3])
    on_sphere = torch.nn.functional.normalize(x, dim=1)
    turned = diffuse(on_sphere, torch.zeros(4), torch.pi * noise / noise.norm(dim=1, keepdim=True), geodesic=True)
    assert torch.allclose(turned, -on_sphere, atol=1e-6)  # a step of length pi leads to the other side


def test_errors() -> None:
    with pytest.raises(InvalidArgument, match="must be at least 1"):
        ADRecSettings(warmup_epochs=0)
    with pytest.raises(InvalidArgument, match="decoder must be one of"):
        _recipe(decoder="att")
