"""DimeRec's recipe: the walk on the sphere and every loss against the formulas in loops, and the network against the
model that runs it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastdiff
from bench.published.dimerec import DimeRec as PublishedDimeRec
from fastdiff.engine import Engine
from fastdiff.models.base import Histories
from fastdiff.models.dimerec import DimeRec as DimeRecModel
from fastdiff.train.data import leave_one_out
from fastdiff.train.dimerec import DimeRec, DimeRecSettings, exp_map, start_at_guidance, stretches, walk
from fastdiff.train.run import train
from fastdiff.train.settings_file import load_settings, presets
from tests.tolerances import AGREE, assert_agree, relative_error
from tests.train.tiny import tiny_data, walks

SMALL = DimeRecSettings(
    hidden_size=12, max_seq_len=7, n_interests=3, mlp_widths=(29,), num_train_timesteps=6, batch_size=8, dropout=0.0
)
EXTRACTORS = ("self_attention", "last_items")


def make(seed: int = 0, double: bool = True, **changes: object) -> DimeRec:
    """A recipe whose every weight was drawn, in float64 where the formula is to be compared."""
    torch.manual_seed(seed)
    recipe = DimeRec(replace(SMALL, **changes), tiny_data())
    for weight in recipe.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    with torch.no_grad():
        recipe.network.item_embeddings.weight[0] = 0
    return recipe.double() if double else recipe


def random_rows(recipe: DimeRec, n_rows: int = 5) -> tuple[Tensor, Tensor]:
    """Interests g and targets, as if from histories."""
    config = recipe.config
    g = torch.randn(n_rows, config.n_interests, config.hidden_size, dtype=torch.float64)
    return g, torch.randint(1, config.n_items + 1, (n_rows,))


# --- the walk on the sphere -------------------------------------------------------------------------------------------


def literal_walk(x_0: Tensor, eps: Tensor, spread: float, tangent: bool, quarter_circle: bool) -> Tensor:
    if tangent:
        eps = eps - float(eps @ x_0) * x_0
    v = math.sqrt(spread) * eps
    if quarter_circle:
        v = v * (math.pi / 2) / math.sqrt(len(x_0))
    length = math.sqrt(sum(float(c) ** 2 for c in v))
    return math.cos(length) * x_0 + math.sin(length) * v / length


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("quarter_circle", [False, True])
def test_the_walk_is_the_exponential_map_of_the_paper(tangent, quarter_circle):
    torch.manual_seed(0)
    x_0 = torch.nn.functional.normalize(torch.randn(7, 12, dtype=torch.float64), dim=1)
    eps, spread = torch.randn(7, 12, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    ours = walk(x_0, eps, spread, tangent, quarter_circle)
    truth = [literal_walk(x_0[r], eps[r], float(spread[r]), tangent, quarter_circle) for r in range(7)]
    assert_agree(ours, torch.stack(truth), torch.float64)
    on_sphere = (ours.norm(dim=1) - 1).abs().max() < 1e-12
    assert on_sphere == tangent


def test_the_walk_starts_at_the_item_and_ends_at_right_angles_to_it():
    torch.manual_seed(0)
    x_0 = torch.nn.functional.normalize(torch.randn(4000, 64, dtype=torch.float64), dim=1)
    eps, one = torch.randn(4000, 64, dtype=torch.float64), torch.ones(4000, dtype=torch.float64)
    assert torch.equal(walk(x_0, eps, 0 * one, True, True), x_0)
    cosine = (walk(x_0, eps, one, True, True) * x_0).sum(dim=1)
    assert abs(float(cosine.mean())) < 0.03
    assert float(cosine.square().mean()) < 2 / 64 * 1.5  # a uniform draw has 1 / D
    # as the paper prints it, much of x_0's square is still there, with either sign
    printed = (walk(x_0, eps, one, False, False) * x_0).sum(dim=1)
    assert float(printed.square().mean()) > 0.25


def test_the_exponential_map_has_a_gradient_everywhere():
    x = torch.nn.functional.normalize(torch.randn(3, 5, dtype=torch.float64), dim=1)
    v = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: exp_map(x, v), (v,))
    assert torch.equal(exp_map(x, torch.zeros_like(x)), x)


# --- the losses -------------------------------------------------------------------------------------------------------


def literal_losses(recipe: DimeRec, g: Tensor, targets: Tensor, seed: int) -> dict[str, float]:
    """The formulas of the docstring, item by item, on the draws that the recipe makes after `manual_seed(seed)`."""
    s, network = recipe.settings, recipe.network
    n_items, rows = recipe.config.n_items, len(targets)
    table = network.item_embeddings.weight.detach()[1:]
    torch.manual_seed(seed)
    drawn = torch.randint(0, n_items, (s.negatives * rows,)).tolist() if s.negatives else None
    t = torch.randint(s.first_timestep, s.num_train_timesteps + 1, (rows,))
    eps = torch.randn(rows, s.hidden_size, dtype=torch.float64)
    abar = recipe.config.schedule.build().alphas_cumprod
    sums = {"gem": 0.0, "recon": 0.0, "ssm": 0.0}

    def item(number: int) -> Tensor:
        return table[number] / table[number].norm() if s.normalize_items else table[number]

    def softmax_loss(query: Tensor, target: int) -> float:
        others = [i for i in (range(n_items) if drawn is None else drawn) if i != target]
        own = float(query @ item(target)) / s.temperature
        mass = math.exp(own) + sum(math.exp(float(query @ item(i)) / s.temperature) for i in others)
        return math.log(mass) - own

    for r in range(rows):
        a = int(targets[r]) - 1
        scores = [float(g[r, k] @ item(a)) for k in range(s.n_interests)]
        sums["gem"] += softmax_loss(g[r, scores.index(max(scores))], a)
        x_0 = table[a] / table[a].norm()
        spread = 1 - float(abar[int(t[r]) - 1]) if t[r] > 0 else 0.0
        x_t = literal_walk(x_0, eps[r], spread, s.tangent, s.quarter_circle) if spread else x_0
        h = torch.cat([x_t, network.step_embeddings.weight[t[r]], *g[r]])
        for i, layer in enumerate(network.denoiser):
            h = layer.weight @ (torch.nn.functional.gelu(h) if i else h) + layer.bias
        f = h.detach()
        sums["recon"] += float((x_0 - f).square().sum())
        sums["ssm"] += softmax_loss(f / f.norm() if s.unit_output else f, a)
    weights = {"gem": 1.0, "recon": s.recon_weight, "ssm": s.ssm_weight}
    return {name: weights[name] * value / rows for name, value in sums.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negatives": 3},
        {"tangent": False, "quarter_circle": False, "first_timestep": 0},
        {"unit_output": True, "temperature": 0.3, "recon_weight": 2.0, "ssm_weight": 0.5},
        {"normalize_items": True, "negatives": 2, "temperature": 0.2},
        {"mlp_widths": (), "stop_target": False},
        {"first_timestep": 6, "mlp_widths": (24, 25), "detach_guidance": True},
    ],
    ids=str,
)
def test_losses_are_the_formulas(changes):
    recipe = make(**changes)
    g, targets = random_rows(recipe)
    torch.manual_seed(5)
    ours = recipe.loss_terms(g, targets)
    truth = literal_losses(recipe, g, targets, 5)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert float(value.detach()) == pytest.approx(truth[name], rel=1e-6), name  # abar is float32 in the recipe


def test_a_draw_of_the_target_itself_does_not_count():
    recipe = make(negatives=200)  # every item is drawn, the target too
    g, targets = random_rows(recipe, 1)
    torch.manual_seed(5)
    ours = float(recipe.loss_terms(g, targets)["gem"].detach())
    assert ours == pytest.approx(literal_losses(recipe, g, targets, 5)["gem"], rel=1e-9)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_gradients_are_those_of_finite_differences(extractor):
    recipe = make(guidance_extractor=extractor)
    weights = dict(recipe.network.named_parameters())

    def loss(name: str) -> Tensor:
        torch.manual_seed(3)
        terms = recipe.losses(recipe.stages()[0], torch.arange(3))
        # the other terms hold x_0 and x_t, which are made of the item table, fixed
        return terms["gem"] if name == "item_embeddings.weight" else torch.stack(list(terms.values())).sum()

    for name, weight in weights.items():
        (gradient,) = torch.autograd.grad(loss(name), weight)
        at = int(gradient.abs().argmax())
        flat, h = weight.data.view(-1), 1e-6
        value = float(flat[at])
        sides = []
        for side in (value + h, value - h):
            flat[at] = side
            sides.append(float(loss(name).detach()))
        flat[at] = value
        slope = (sides[0] - sides[1]) / (2 * h)
        assert float(gradient.view(-1)[at]) == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def grad_of(recipe: DimeRec, term: str, of: str) -> Tensor | None:
    torch.manual_seed(1)
    weight = dict(recipe.network.named_parameters())[of]
    loss = recipe.losses(recipe.stages()[0], torch.arange(6))[term]
    return torch.autograd.grad(loss, weight, allow_unused=True)[0]


def test_stop_target_and_detach_guidance_cut_the_gradients_that_they_name():
    assert grad_of(make(detach_guidance=True), "recon", "interest.w_2.weight") is None
    assert grad_of(make(detach_guidance=True), "ssm", "interest.w_2.weight") is None
    assert grad_of(make(detach_guidance=True), "gem", "interest.w_2.weight").abs().max() > 0
    assert grad_of(make(), "recon", "interest.w_2.weight").abs().max() > 0
    # detached as well, what is left of the reconstruction's gradient to the table is its target
    assert grad_of(make(detach_guidance=True), "recon", "item_embeddings.weight") is None
    assert grad_of(make(detach_guidance=True, stop_target=False), "recon", "item_embeddings.weight").abs().max() > 0


# --- examples and networks --------------------------------------------------------------------------------------------


def test_every_item_is_a_target_once_and_never_from_nothing():
    recipe = make()
    sequences = [recipe.data.sequences[0][:n].repeat(1) for n in (1, 2, 6)]
    long = torch.arange(20).numpy()
    for shortest in (0, 1):
        items, is_target = stretches([*sequences, long], 7, 1, shortest)
        assert items.shape[1] == 8
        assert ((items > 0) | ~is_target).all()
        of_long = items[-3:][is_target[-3:]]
        assert sorted(of_long.tolist()) == list(range(1 + shortest, 21))
        targets = sum(max(len(s) - shortest, 0) for s in [*sequences, long])
        assert int(is_target.sum()) == targets
    items, is_target = stretches([long], 7, 1, 1)
    assert items[0].tolist() == list(range(13, 21)), "the last stretch is the last window and what follows it"
    assert not is_target[:, 0].any()


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_all_prefixes_at_once_are_the_model_s_encodings_of_each(extractor):
    recipe = make(double=False, guidance_extractor=extractor)
    network = recipe.network.eval()
    model = DimeRecModel(recipe.config, {name: weight.detach() for name, weight in network.state_dict().items()})
    items, lengths = torch.randint(1, recipe.config.n_items + 1, (4, 7)), torch.tensor([7, 3, 1, 5])
    items = items * (torch.arange(7) < lengths[:, None])
    with torch.no_grad():
        ours = network.interests(items, lengths)
    for user, length in enumerate(lengths.tolist()):
        for n in range(length + 1):
            alone = Histories(items[user : user + 1, :n], torch.tensor([n]))
            assert_agree(ours[user, n], model.encode(alone, model.item_table)[0], torch.float32)


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("widths", [(), (29,), (24, 31)])
def test_the_checkpoint_runs_in_the_engine_and_equals_the_network(extractor, widths):
    recipe = make(double=False, guidance_extractor=extractor, mlp_widths=widths).eval()
    config, network = recipe.config, recipe.network
    histories = [list(instance.history) for instance in recipe.data.test[:6]]
    engine = Engine.from_checkpoint(recipe.model(recipe.stages()[0]))
    noise = torch.randn(config.schedule.num_train_timesteps + 1, 6, config.hidden_size)
    embeddings = torch.as_tensor(engine.generate(histories, noise=noise, output_embeddings=True).embeddings)

    # Algorithm 2, on the recipe's own forward functions
    schedule = config.schedule.build()
    items = torch.zeros(6, 7, dtype=torch.int64)
    for row, history in enumerate(histories):
        items[row, : len(history[-7:])] = torch.tensor([recipe.data.numbers[i] + 1 for i in history[-7:]])
    lengths = (items > 0).sum(dim=1)
    with torch.no_grad():
        g = network.interests(items, lengths)[torch.arange(6), lengths]
        x = torch.nn.functional.normalize(noise[0], dim=1)
        for i, t in enumerate(range(config.schedule.num_train_timesteps, 0, -1)):
            f = network.denoise(x, torch.full((6,), t), g)
            x = schedule.posterior_mean_coef1[t - 1] * f + schedule.posterior_mean_coef2[t - 1] * x
            x = x + schedule.posterior_variance[t - 1].sqrt() * noise[1 + i]
            x = torch.nn.functional.normalize(x.float(), dim=1)
    assert_agree(embeddings, x, torch.float32, factor=4)

    # and the algorithm of the paper with everything inside its loop
    published = PublishedDimeRec(config)
    published.load_state_dict(network.state_dict())
    assert_agree(embeddings, published.sample(items, lengths, noise), torch.float32, factor=4)


@pytest.mark.parametrize("widths", [(), (29,), (24, 31)])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_start_at_guidance_begins_with_the_mean_of_the_interests(widths, activation):
    recipe = make(mlp_widths=widths, mlp_activation=activation)
    network = recipe.network
    start_at_guidance(network)
    for layer, width in zip(network.denoiser, (*widths, 12), strict=True):  # what is beyond the 2 D units adds to it
        if width != 12:
            layer.weight.data[24:], layer.bias.data[24:] = 0, 0
    g, _ = random_rows(recipe)
    x_t, t = torch.randn(5, 12, dtype=torch.float64), torch.randint(0, 7, (5,))
    assert_agree(network.denoise(x_t, t, g).detach(), g.mean(dim=1), torch.float64)


@pytest.mark.parametrize("preset", sorted(presets("dimerec")))
def test_the_shipped_settings_are_settings_of_a_model(preset):
    recipe = DimeRec(load_settings("dimerec", DimeRecSettings, preset), tiny_data())
    losses = recipe.losses(recipe.stages()[0], torch.arange(3))
    assert all(torch.isfinite(term) for term in losses.values())


def test_training_learns_users_who_step_through_the_items(tmp_path):
    data = leave_one_out(walks(n_users=20))
    settings = replace(SMALL, hidden_size=16, mlp_widths=(64,), epochs=20, learning_rate=0.01, validate_every=20)
    result = train("dimerec", data, tmp_path / "a", settings, seed=1, show_progress=False, say=lambda _: None)
    engine = fastdiff.from_pretrained(tmp_path / "a" / "model")
    cases = [(row[:n], row[n]) for row in data.sequences for n in range(1, len(row))]
    lists = engine.generate([[data.item_ids[i] for i in row] for row, _ in cases], top_k=3, filter_seen=False, seed=0)
    hits = [data.item_ids[answer] in ids for (_, answer), ids in zip(cases, lists.item_ids.tolist(), strict=True)]
    assert sum(hits) / len(hits) > 0.7
    again = train("dimerec", data, tmp_path / "b", settings, seed=1, show_progress=False, say=lambda _: None)
    assert again["valid"] == result["valid"]
    weights = [fastdiff.from_pretrained(tmp_path / name / "model").model.weights for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert relative_error(weights[0]["item_embeddings.weight"][:1], torch.zeros(1, 16)) < AGREE[torch.float32]
