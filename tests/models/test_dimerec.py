"""DimeRec: the restructured sampler against the paper's algorithm with everything inside its loop."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.published.dimerec import DimeRec as PublishedDimeRec
from fastdiff.config import DimeRecConfig, ScheduleConfig
from fastdiff.errors import InvalidArgument
from fastdiff.models.base import Histories
from fastdiff.models.dimerec import DimeRec
from fastdiff.noise import GivenNoise, PhiloxNoise
from fastdiff.ops.encode_interests import encode_interests
from tests.tolerances import AGREE, FLOOR, assert_agree, relative_error

BASE = DimeRecConfig(
    n_items=23, hidden_size=10, max_seq_len=7, schedule=ScheduleConfig("linear", 9, beta_end=0.2), n_interests=3
)


def make(config: DimeRecConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[DimeRec, PublishedDimeRec]:
    torch.manual_seed(seed)
    published = PublishedDimeRec(config).to(dtype).eval()
    weights = {name: value.detach() for name, value in published.state_dict().items()}
    return DimeRec(config, weights), published


def random_histories(config: DimeRecConfig, lengths: list[int]) -> Histories:
    items = torch.full((len(lengths), config.max_seq_len), config.pad_id)
    for row, length in enumerate(lengths):
        items[row, :length] = torch.randint(1, config.n_items + 1, (length,))
    longest = max(lengths, default=0)
    return Histories(items[:, :longest], torch.tensor(lengths))


def padded(histories: Histories, config: DimeRecConfig) -> Tensor:
    states = torch.full((histories.batch_size, config.max_seq_len), config.pad_id)
    states[:, : histories.items.shape[1]] = histories.items
    return states


def run(model: DimeRec, histories: Histories, noise: Tensor, on_step=None) -> Tensor:
    plan = model.plan("ddpm")
    state = model.prepare(model.encode(histories, model.item_table), plan, 1.0)
    return model.sample(state, plan, GivenNoise(noise), on_step)


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    extractor=st.sampled_from(["self_attention", "last_items"]),
    positions_in_values=st.booleans(),
    widths=st.sampled_from([(), (13,), (8, 17)]),
    activation=st.sampled_from(["gelu", "relu", "silu", "tanh"]),
    order=st.permutations(["x", "t", "g"]),
    noise_scale=st.sampled_from(["sqrt", "literal"]),
    normalize=st.sampled_from(["after", "before"]),
    normalize_start=st.booleans(),
    step_offset=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_equals_the_algorithm_of_the_paper_under_every_setting(
    lengths, extractor, positions_in_values, widths, activation, order, noise_scale, normalize, normalize_start,
    step_offset, dtype, seed,
):  # fmt: skip
    config = replace(
        BASE,
        guidance_extractor=extractor,
        positions_in_values=positions_in_values,
        mlp_widths=widths,
        mlp_activation=activation,
        mlp_input_order=tuple(order),
        noise_scale=noise_scale,
        normalize=normalize,
        normalize_start=normalize_start,
        step_offset=step_offset,
    )
    model, published = make(config, seed, dtype)
    histories = random_histories(config, lengths)
    noise = torch.randn(config.schedule.num_train_timesteps + 1, len(lengths), config.hidden_size, dtype=dtype)

    truth = published.sample(padded(histories, config), histories.lengths, noise)
    ours = run(model, histories, noise)

    assert ours.dtype == dtype
    assert_agree(ours, truth, dtype, factor=4)


def test_the_loop_op_equals_the_steps_taken_one_by_one():
    for normalize in ("after", "before"):
        model, _ = make(replace(BASE, normalize=normalize))
        histories, noise = random_histories(BASE, [0, 3, 7]), torch.randn(10, 3, 10, dtype=torch.float64)
        seen: list[tuple[int, int]] = []

        def watch(step: int, timestep: int, x: Tensor, seen=seen) -> None:
            seen.append((step, timestep))

        assert torch.equal(run(model, histories, noise), run(model, histories, noise, watch))
        assert seen == [(i, 8 - i) for i in range(9)]


def test_a_callback_may_replace_the_state():
    for normalize in ("after", "before"):
        model, _ = make(replace(BASE, normalize=normalize))
        histories, noise = random_histories(BASE, [2]), torch.randn(10, 1, 10, dtype=torch.float64)
        assert run(model, histories, noise, lambda step, t, x: torch.zeros_like(x)).abs().max() == 0


def test_the_result_lies_on_the_sphere_unless_normalised_before():
    histories, noise = random_histories(BASE, [0, 2, 7]), torch.randn(10, 3, 10, dtype=torch.float64)
    model, _ = make(BASE)
    assert_agree(run(model, histories, noise).norm(dim=1), torch.ones(3, dtype=torch.float64), torch.float64)
    before, _ = make(replace(BASE, normalize="before"))
    raw = run(before, histories, noise)
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
    # the two readings differ in that alone
    assert_agree(torch.nn.functional.normalize(raw, dim=1), run(model, histories, noise), torch.float64)


@pytest.mark.parametrize("extractor", ["self_attention", "last_items"])
def test_an_empty_history_has_no_interests(extractor):
    model, _ = make(replace(BASE, guidance_extractor=extractor, positions_in_values=True))
    alone = model.encode(random_histories(BASE, [0, 0]), model.item_table)
    beside_others = model.encode(random_histories(BASE, [0, 5]), model.item_table)
    assert torch.equal(alone, torch.zeros(2, 3, 10, dtype=torch.float64))
    assert torch.equal(beside_others[0], alone[0])


def test_last_items_come_oldest_first_with_zeros_before_them():
    model, _ = make(replace(BASE, guidance_extractor="last_items"))
    histories = Histories(torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]]), torch.tensor([4, 2]))
    interests = model.encode(histories, model.item_table)
    table = model.item_table
    assert torch.equal(interests[0], table[[5, 6, 7]])
    assert torch.equal(interests[1, 1:], table[[8, 9]])
    assert interests[1, 0].abs().max() == 0


@given(lengths=st.lists(st.integers(0, 7), min_size=2, max_size=6), seed=st.integers(0, 50))
def test_a_user_does_not_depend_on_the_batch(lengths, seed):
    model, _ = make(BASE, seed)
    histories = random_histories(BASE, lengths)
    noise = torch.randn(10, len(lengths), 10, dtype=torch.float64)
    together = run(model, histories, noise)
    for row, length in enumerate(lengths):
        alone = Histories(histories.items[row : row + 1, :length], histories.lengths[row : row + 1])
        assert_agree(run(model, alone, noise[:, row : row + 1]), together[row : row + 1], torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near(dtype):
    model, _ = make(BASE, dtype=torch.float32)
    half = DimeRec(BASE, {name: value.to(dtype) for name, value in model.weights.items()})
    histories, noise = random_histories(BASE, [0, 1, 3, 7]), torch.randn(10, 4, 10)
    x_0 = run(half, histories, noise.to(dtype))
    assert x_0.dtype == dtype
    assert relative_error(x_0, run(model, histories, noise)) < 8 * FLOOR[dtype]


def test_samples_of_a_user_share_its_state():
    model, _ = make(BASE)
    plan = model.plan("ddpm")
    state = model.prepare(model.encode(random_histories(BASE, [2, 5]), model.item_table), plan, 1.0)
    repeated = model.repeat(state, 3)
    assert torch.equal(repeated.cond, state.cond[[0, 0, 0, 1, 1, 1]])


def test_items_added_later_are_read_from_the_table_that_is_handed_over():
    model, _ = make(BASE)
    table = torch.cat([model.item_table, torch.randn(2, 10, dtype=torch.float64)])
    histories = Histories(torch.tensor([[25]]), torch.tensor([1]))
    assert_agree(model.encode(histories, table)[0], table[25].expand(3, 10), torch.float64)


def test_literal_noise_uses_the_variance_itself():
    sqrt, _ = make(BASE)
    literal, _ = make(replace(BASE, noise_scale="literal"))
    variance = sqrt.schedule.posterior_variance.flip(0)
    assert relative_error(literal.plan("ddpm").coef[:, 2], variance) < AGREE[torch.float64]
    assert torch.equal(literal.plan("ddpm").coef[:, :2], sqrt.plan("ddpm").coef[:, :2])


def test_weights_are_named_and_shaped_as_the_config_says():
    for config in (
        BASE,
        replace(BASE, guidance_extractor="last_items"),
        replace(BASE, mlp_widths=(13, 5), mlp_input_order=("g", "x", "t")),
    ):
        _, published = make(config)
        shapes = {name: tuple(value.shape) for name, value in published.state_dict().items()}
        assert DimeRec.weight_shapes(config) == shapes


def test_what_cannot_be_meant_is_refused():
    model, _ = make(BASE)
    plan = model.plan("ddpm")
    interests = model.encode(random_histories(BASE, [2]), model.item_table)
    with pytest.raises(InvalidArgument, match=r"guidance_scale must be 1 \(got 2\)"):
        model.prepare(interests, plan, 2.0)
    with pytest.raises(InvalidArgument, match=r"timesteps must lie in -1\.\.8, what this dimerec"):
        model.prepare(interests, replace(plan, timesteps=plan.timesteps + 1), 1.0)


@pytest.mark.skipif("cpu" not in encode_interests.available("cpu"), reason="the C++ ops are not built")
@pytest.mark.parametrize("extractor", ["self_attention", "last_items"])
@pytest.mark.parametrize("normalize", ["after", "before"])
@pytest.mark.parametrize("widths", [(), (13,)])
def test_a_user_has_the_same_bits_in_any_batch_in_cpp(extractor, normalize, widths):
    config = replace(BASE, guidance_extractor=extractor, normalize=normalize, mlp_widths=widths)
    plain, _ = make(config, dtype=torch.float32)
    model = DimeRec(config, plain.weights, {op.name: op.bind("cpu", "cpu") for op in DimeRec.ops})
    histories, plan = random_histories(config, [0, 3, 7, 1, 5] * 8), model.plan("ddpm")

    def philox(rows: slice, made_by: DimeRec) -> PhiloxNoise:
        keys = torch.arange(40)[rows]
        return PhiloxNoise(5, keys, keys % 2, config.hidden_size, torch.float32, made_by.bound["philox_normals"])

    def x_0(made_by: DimeRec, rows: slice) -> Tensor:
        part = Histories(histories.items[rows], histories.lengths[rows])
        state = made_by.prepare(made_by.encode(part, made_by.item_table), plan, 1.0)
        return made_by.sample(state, plan, philox(rows, made_by))

    together = x_0(model, slice(0, 40))
    assert_agree(together, x_0(plain, slice(0, 40)), torch.float32, factor=4)
    for rows in (slice(0, 1), slice(1, 2), slice(7, 29)):
        assert torch.equal(x_0(model, rows), together[rows])


def test_philox_starts_are_drawn_inside_the_loop():
    """The loop is handed the noise, not x_T."""
    model, _ = make(BASE, dtype=torch.float32)
    given: list[object] = []
    loop = model.bound["denoise_mlp_loop"]

    def watched(x_t: Tensor | None, *rest: object) -> Tensor:
        given.append(x_t)
        return loop(x_t, *rest)

    bound = model.bound | {"denoise_mlp_loop": replace(loop, function=watched)}
    watched_model = DimeRec(BASE, model.weights, bound)
    keys = torch.arange(2)
    noise = PhiloxNoise(5, keys, keys, BASE.hidden_size, torch.float32)
    plan = model.plan("ddpm")
    condition = model.encode(random_histories(BASE, [2, 5]), model.item_table)
    x_0 = watched_model.sample(watched_model.prepare(condition, plan, 1.0), plan, noise)
    assert given == [None]
    assert_agree(x_0, model.sample(model.prepare(condition, plan, 1.0), plan, noise, lambda *_: None), torch.float32)
