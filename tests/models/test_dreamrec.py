"""DreamRec: against the authors' recorded outputs, and against their algorithm at random sizes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.published.dreamrec import Diffusion
from bench.published.dreamrec import DreamRec as PublishedDreamRec
from fastdiff import plan as plans
from fastdiff.config import DreamRecConfig, ScheduleConfig
from fastdiff.errors import InvalidArgument
from fastdiff.models.base import Histories
from fastdiff.models.dreamrec import DreamRec
from fastdiff.noise import GivenNoise
from tests.devices import GPU, place_all, places
from tests.tolerances import FLOOR, GOLDEN, assert_agree, relative_error

BASE = DreamRecConfig(
    n_items=19, hidden_size=12, max_seq_len=6, schedule=ScheduleConfig("exp", 15, arithmetic="float32")
)


def make(
    config: DreamRecConfig, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[DreamRec, PublishedDreamRec]:
    torch.manual_seed(seed)
    published = PublishedDreamRec(config.hidden_size, config.n_items, config.max_seq_len, config.denoiser)
    with torch.no_grad():  # biases and norms away from 0 and 1, so that their places show
        for parameter in published.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    published = published.to(dtype).eval()
    unused = DreamRec.unused_weights()
    weights = {name: value.detach() for name, value in published.state_dict().items() if not name.startswith(unused)}
    return DreamRec(config, weights), published


def random_histories(config: DreamRecConfig, lengths: list[int]) -> Histories:
    items = torch.full((len(lengths), config.max_seq_len), config.pad_id)
    for row, length in enumerate(lengths):
        items[row, :length] = torch.randint(0, config.n_items, (length,))
    return Histories(items[:, : max(lengths, default=0)], torch.tensor(lengths, dtype=torch.int64))


def published_condition(published: PublishedDreamRec, histories: Histories) -> Tensor:
    """Padded to the full window; an empty history is one pad. Returns h `[B, D]`."""
    states = torch.full((histories.batch_size, published.state_size), published.item_num)
    states[:, : histories.items.shape[1]] = histories.items
    with torch.no_grad():
        return published.condition(states, histories.lengths.clamp(min=1))


def first_layer(published: PublishedDreamRec, h: Tensor) -> Tensor:
    """What the first layer of the denoiser makes of h, with its bias."""
    first, dim = published.diffuser[0], h.shape[-1]
    return (h @ first.weight[:, dim : 2 * dim].T + first.bias).detach()


def run(model: DreamRec, histories: Histories, noise: Tensor, guidance: float = 1.0, plan=None, on_step=None) -> Tensor:
    plan = model.plan("ddpm") if plan is None else plan
    state = model.prepare(model.encode(histories, model.item_table), plan, guidance)
    return model.sample(state, plan, GivenNoise(noise), on_step)


# --- the authors' recorded outputs ------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("place", [place for place in places(*DreamRec.ops) if place != "triton" or GPU])  # T = 500
def test_equals_what_the_authors_code_returned(golden, place):
    record = golden("dreamrec_zhihu")
    args = record["args"]
    config = DreamRecConfig(
        n_items=args["item_num"],
        hidden_size=args["hidden_factor"],
        max_seq_len=args["seq_size"],
        schedule=ScheduleConfig(args["beta_sche"], args["timesteps"], arithmetic="float32"),
        denoiser=args["diffuser_type"],
    )
    unused = DreamRec.unused_weights()
    weights = {name: value for name, value in record["weights"].items() if not name.startswith(unused)}
    model = DreamRec(config, weights, place_all(DreamRec.ops, place))
    # the data loader gives an empty history the length 1
    empty = record["history"][:, 0] == config.pad_id
    histories = Histories(record["history"], record["history_len"].masked_fill(empty, 0))

    condition = model.encode(histories, model.item_table)
    first, dim = weights["diffuser.0.weight"], config.hidden_size
    share = record["condition"] @ first[:, dim : 2 * dim].T + weights["diffuser.0.bias"]
    assert relative_error(condition, share) < GOLDEN
    cold = weights["ln_3.bias"] @ first[:, dim : 2 * dim].T + weights["diffuser.0.bias"]
    assert relative_error(condition[empty], cold.expand(int(empty.sum()), -1)) < GOLDEN

    for on_step in (None, lambda step, timestep, x: None):
        x_0 = run(model, histories, record["noise"], 1.0 + args["w"], on_step=on_step)
        assert relative_error(x_0, record["x0"]) < GOLDEN
        scores = x_0 @ model.item_table.T
        top = torch.topk(scores, 20)
        differs = top.indices != record["topk_items"]
        recorded = torch.gather(scores, 1, record["topk_items"])
        ties = (top.values - recorded).abs() <= GOLDEN * record["topk_scores"].abs().max()
        assert bool((~differs | ties).all())


@pytest.mark.golden
def test_the_yardstick_equals_the_authors_code(golden):
    record = golden("dreamrec_zhihu")
    args = record["args"]
    published = PublishedDreamRec(args["hidden_factor"], args["item_num"], args["seq_size"], args["diffuser_type"])
    published.load_state_dict(record["weights"])
    diffusion = Diffusion(args["timesteps"], w=args["w"], beta_schedule=args["beta_sche"])
    scores = published.predict(record["history"], record["history_len"], diffusion, record["noise"])
    # bits of a matrix product may change with the CPU, so a rounding is allowed
    top = torch.topk(scores, 20)
    assert relative_error(top.values, record["topk_scores"]) < GOLDEN
    assert float((top.indices == record["topk_items"]).double().mean()) > 0.99


# --- the authors' algorithm at random sizes ---------------------------------------------------------------------------


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 6]), min_size=1, max_size=6),
    hidden_size=st.sampled_from([4, 10, 16]),
    denoiser=st.sampled_from(["mlp1", "mlp2"]),
    family=st.sampled_from(["linear", "exp", "cosine", "sqrt"]),
    steps=st.sampled_from([1, 2, 13, 40]),
    w=st.sampled_from([0.0, 0.5, 2.0, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_equals_the_published_algorithm(lengths, hidden_size, denoiser, family, steps, w, dtype, seed):
    schedule = ScheduleConfig(family, steps, arithmetic="float32")
    config = replace(BASE, hidden_size=hidden_size, denoiser=denoiser, schedule=schedule)
    model, published = make(config, seed, dtype)
    diffusion = Diffusion(steps, w=w, beta_schedule=family)
    histories = random_histories(config, lengths)
    noise = torch.randn(steps, len(lengths), hidden_size, dtype=dtype)

    h = published_condition(published, histories)
    assert_agree(model.encode(histories, model.item_table), first_layer(published, h), dtype)
    truth = diffusion.sample(published.forward, published.forward_uncon, h, noise)
    assert_agree(run(model, histories, noise, 1.0 + w), truth, dtype, factor=4)


def test_an_empty_history_is_the_bias_of_the_last_norm():
    model, published = make(BASE)
    for lengths in ([0], [0, 4]):
        histories = random_histories(BASE, lengths)
        c = model.encode(histories, model.item_table)
        assert_agree(c[0], first_layer(published, model.weights["ln_3.bias"]), torch.float64)
        assert_agree(c, first_layer(published, published_condition(published, histories)), torch.float64)
    assert model.encode(random_histories(BASE, []), model.item_table).shape == (0, 12)


def zero_sum_embeddings(published: PublishedDreamRec, items: list[int]) -> None:
    """Integer features, so that those of `items` sum to exactly 0 at every place."""
    with torch.no_grad():
        embeddings = published.item_embeddings.weight
        embeddings.copy_(torch.randint(-3, 4, embeddings.shape))
        embeddings[:, 0] += 1 - embeddings.sum(dim=1)
        embeddings[items, 0] -= 1
        positions = published.positional_embeddings.weight
        positions.copy_(torch.randint(-3, 4, positions.shape))
        positions[:, 0] -= positions.sum(dim=1)


@pytest.mark.parametrize("history", [[3], [3, 5], [5, 3], [3, 5, 3, 7], [5, 3, 7, 3], [3, 3, 3, 3, 3, 3]])
def test_items_whose_features_sum_to_zero_are_masked_as_published(history):
    _, published = make(BASE)
    zero_sum_embeddings(published, items=[3])
    unused = DreamRec.unused_weights()
    model = DreamRec(BASE, {n: v.detach() for n, v in published.state_dict().items() if not n.startswith(unused)})
    histories = Histories(torch.tensor([history]), torch.tensor([len(history)]))
    ours = model.encode(histories, model.item_table)
    assert_agree(ours, first_layer(published, published_condition(published, histories)), torch.float64)


def test_a_query_whose_norm_sums_to_zero_attends_to_nothing():
    _, published = make(BASE)
    with torch.no_grad():  # LN1 gives (1, -1, 0, ..) for every item
        published.ln_1.weight.zero_()
        published.ln_1.bias.zero_()
        published.ln_1.bias[:2] = torch.tensor([1.0, -1.0])
    unused = DreamRec.unused_weights()
    weights = {n: v.detach().clone() for n, v in published.state_dict().items() if not n.startswith(unused)}
    histories = random_histories(BASE, [2, 6])
    c = DreamRec(BASE, weights).encode(histories, weights["item_embeddings.weight"])
    assert_agree(c, first_layer(published, published_condition(published, histories)), torch.float64)
    weights["mh_attn.linear_v.bias"] += 1  # nothing that attention returns can matter
    assert torch.equal(c, DreamRec(BASE, weights).encode(histories, weights["item_embeddings.weight"]))


def test_half_precision_keeps_items_whose_rounded_features_sum_to_zero():
    _, published = make(BASE)
    zero_sum_embeddings(published, items=[3])
    unused = DreamRec.unused_weights()
    weights = {n: v.detach().bfloat16() for n, v in published.state_dict().items() if not n.startswith(unused)}
    model = DreamRec(BASE, weights)
    both, first = (Histories(torch.tensor([items]), torch.tensor([2])) for items in ([3, 5], [4, 5]))
    assert not torch.equal(model.encode(both, model.item_table), model.encode(first, model.item_table))


@pytest.mark.parametrize("denoiser", ["mlp1", "mlp2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near(dtype, denoiser):
    model, _ = make(replace(BASE, denoiser=denoiser), dtype=torch.float32)
    half = DreamRec(model.config, {name: value.to(dtype) for name, value in model.weights.items()})
    histories, noise = random_histories(BASE, [0, 1, 3, 6]), torch.randn(15, 4, 12)
    x_0 = run(half, histories, noise.to(dtype), 3.0)
    assert x_0.dtype == dtype
    assert relative_error(x_0, run(model, histories, noise, 3.0)) < 8 * FLOOR[dtype]


# --- laws -------------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6), denoiser=st.sampled_from(["mlp1", "mlp2"]))
def test_a_user_does_not_depend_on_the_batch(lengths, denoiser):
    model, _ = make(replace(BASE, denoiser=denoiser))
    histories = random_histories(BASE, lengths)
    noise = torch.randn(15, len(lengths), 12, dtype=torch.float64)
    together = run(model, histories, noise, 3.0)
    for row, length in enumerate(lengths):
        alone = Histories(histories.items[row : row + 1, :length], histories.lengths[row : row + 1])
        assert_agree(run(model, alone, noise[:, row : row + 1], 3.0), together[row : row + 1], torch.float64)


def test_padding_beyond_the_longest_history_does_not_matter():
    model, _ = make(BASE)
    items = torch.tensor([[4, 2, 7], [1, 19, 19]])
    wide = torch.cat([items, torch.full((2, 3), 19)], dim=1)
    lengths = torch.tensor([3, 1])
    tight = model.encode(Histories(items, lengths), model.item_table)
    assert_agree(model.encode(Histories(wide, lengths), model.item_table), tight, torch.float64)


@pytest.mark.parametrize("denoiser", ["mlp1", "mlp2"])
def test_guidance_of_one_is_none(denoiser):
    model, _ = make(replace(BASE, denoiser=denoiser))
    histories = random_histories(BASE, [0, 2, 6])
    plan = model.plan("ddpm")
    state = model.prepare(model.encode(histories, model.item_table), plan, 1.0)
    assert state.uncond is None
    noise = torch.randn(15, 3, 12, dtype=torch.float64)
    nearly = run(model, histories, noise, 1.0 + 1e-13)
    assert_agree(nearly, run(model, histories, noise, 1.0), torch.float64)


@pytest.mark.parametrize("denoiser", ["mlp1", "mlp2"])
def test_the_loop_op_equals_the_steps_taken_one_by_one(denoiser):
    model, _ = make(replace(BASE, denoiser=denoiser))
    histories = random_histories(BASE, [0, 2, 6])
    noise = torch.randn(15, 3, 12, dtype=torch.float64)
    timesteps: list[int] = []
    stepped = run(model, histories, noise, 3.0, on_step=lambda step, t, x: timesteps.append(t))
    assert torch.equal(stepped, run(model, histories, noise, 3.0))
    assert timesteps == list(range(15))[::-1]
    assert run(model, histories, noise, on_step=lambda step, t, x: torch.zeros_like(x)).abs().max() == 0


@pytest.mark.parametrize("denoiser", ["mlp1", "mlp2"])
def test_samples_of_a_user_share_its_state(denoiser):
    model, _ = make(replace(BASE, denoiser=denoiser))
    histories = random_histories(BASE, [1, 4])
    noise = torch.randn(15, 2, 3, 12, dtype=torch.float64)
    plan = model.plan("ddpm")
    state = model.repeat(model.prepare(model.encode(histories, model.item_table), plan, 3.0), 3)
    together = model.sample(state, plan, GivenNoise(noise.flatten(1, 2))).view(2, 3, 12)
    for sample in range(3):
        assert_agree(run(model, histories, noise[:, :, sample], 3.0), together[:, sample], torch.float64)


def test_the_affine_form_is_the_denoiser():
    model, _ = make(BASE)
    plan = model.plan("ddpm")
    state = model.prepare(model.encode(random_histories(BASE, [0, 3]), model.item_table), plan, 3.0)
    form = model.affine(state, plan)
    x = torch.randn(2, 12, dtype=torch.float64)
    share = form.uncond + form.guidance_scale * (form.cond - form.uncond)
    for step in (0, 7, 14):
        assert_agree(x @ form.w_x.T + share + form.time[step], model.denoise(x, step, state), torch.float64)
    two_layers, _ = make(replace(BASE, denoiser="mlp2"))
    assert two_layers.affine(state, plan) is None


def test_a_shifted_grid_may_feed_the_timestep_one_past_the_chain():
    model, published = make(BASE)
    plan = plans.shifted_ddim(model.schedule, 5)
    assert int(plan.timesteps[0]) == 15
    histories = random_histories(BASE, [0, 3])
    state = model.prepare(model.encode(histories, model.item_table), plan, 1.0)
    x = torch.randn(2, 12, dtype=torch.float64)
    with torch.no_grad():
        truth = published(x, published_condition(published, histories), torch.full((2,), 15))
    assert_agree(model.denoise(x, 0, state), truth, torch.float64)
    with pytest.raises(InvalidArgument, match=r"timesteps must lie in 0\.\.15, what this dreamrec"):
        model.prepare(state.cond, replace(plan, timesteps=plan.timesteps + 1), 1.0)


def test_items_added_later_are_read_from_the_table_that_is_handed_over():
    model, _ = make(BASE)
    table = torch.cat([model.item_table, model.item_table[3:4]])
    later = Histories(torch.tensor([[5, 20]]), torch.tensor([2]))
    known = Histories(torch.tensor([[5, 3]]), torch.tensor([2]))
    assert torch.equal(model.encode(later, table), model.encode(known, table))


@pytest.mark.parametrize("denoiser", ["mlp1", "mlp2"])
def test_weights_are_named_and_shaped_as_the_config_says(denoiser):
    config = replace(BASE, denoiser=denoiser)
    _, published = make(config)
    shapes = {name: tuple(value.shape) for name, value in published.state_dict().items()}
    unused = DreamRec.unused_weights()
    assert DreamRec.weight_shapes(config) == {n: s for n, s in shapes.items() if not n.startswith(unused)}
    assert {n.split(".")[0] for n in shapes if n.startswith(unused)} == {"s_fc", "emb_mlp", "diff_mlp"}
