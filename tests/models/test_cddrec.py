"""CDDRec: the restructured model against the published algorithm, and both against the authors' recorded outputs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.published.cddrec import CDDRecModel, published_ranking
from fastdiff.config import CDDRecConfig
from fastdiff.errors import InvalidArgument
from fastdiff.models.base import Histories
from fastdiff.models.cddrec import CDDRec
from fastdiff.noise import GivenNoise
from fastdiff.schedule import ScheduleConfig
from tests.devices import GPU, place_all, places
from tests.tolerances import AGREE, FLOOR, GOLDEN, relative_error

PLACES = places(*CDDRec.ops)


class RecordedDraws:
    """The published code's draws, of which only the last slot [B, D] was kept."""

    def __init__(self, draws: Tensor) -> None:
        self.draws = list(draws)

    def __call__(self, like: Tensor) -> Tensor:
        full = torch.zeros_like(like)
        full[:, -1] = self.draws.pop(0)
        return full


def config_of(args: Any, batch_coupling: str = "published") -> CDDRecConfig:
    schedule = ScheduleConfig(
        "linear", args.T, "float64", beta_start=args.beta_1, beta_end=args.beta_T, linspace_dtype="float32"
    )
    return CDDRecConfig(
        n_items=args.item_size - 2,
        hidden_size=args.hidden_size,
        max_seq_len=args.max_seq_length,
        schedule=schedule,
        n_heads=args.num_attention_heads,
        n_layers=args.num_hidden_layers,
        hidden_act=args.hidden_act,
        batch_coupling=batch_coupling,
    )


def left_aligned(padded: Tensor, width: int | None = None) -> Histories:
    """Histories from left-padded rows: a row starts at its first id that is not the pad's."""
    real = padded != 0
    lengths = torch.where(real.any(1), padded.shape[1] - real.int().argmax(1), 0)
    items = torch.zeros(padded.shape[0], int(lengths.max()) if width is None else width, dtype=torch.int64)
    for row, length in enumerate(lengths.tolist()):
        items[row, :length] = padded[row, padded.shape[1] - length :]
    return Histories(items, lengths)


def run(model: CDDRec, histories: Histories, noise: Tensor, **plan: Any) -> Tensor:
    steps = model.plan(plan.pop("scheduler", "one_step"), **plan)
    state = model.prepare(model.encode(histories, model.item_table), steps, 1.0)
    return model.readout(model.sample(state, steps, GivenNoise(noise)))


def drawn_model(dtype: torch.dtype, seed: int, **sizes: Any) -> CDDRecModel:
    """A published model whose weights are large enough for attention to be far from uniform."""
    values = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "max_seq_length": 6,
        "T": 5,
        "beta_1": 1e-4,
        "beta_T": 0.03,
        "item_size": 23,
    }
    torch.manual_seed(seed)
    model = CDDRecModel(SimpleNamespace(**(values | sizes))).eval()
    for parameter in model.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return model.to(dtype)


def restructured(published: CDDRecModel, batch_coupling: str = "published", place: str = "torch") -> CDDRec:
    bindings = place_all(CDDRec.ops, place) if place != "torch" else None
    return CDDRec(config_of(published.args, batch_coupling), dict(published.state_dict()), bindings)


# --- the authors' recorded outputs ------------------------------------------------------------------------------------


@pytest.fixture
def office(golden: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    record = golden("cddrec_office")
    record["args"] = SimpleNamespace(**record["args"])
    return record


def assert_same_ranking(rows: np.ndarray, scores: np.ndarray, record: dict[str, Any], suffix: str = "") -> None:
    truth_rows, truth_scores = record[f"topk_items{suffix}"].numpy(), record[f"topk_scores{suffix}"].numpy()
    np.testing.assert_allclose(scores, truth_scores, rtol=0, atol=GOLDEN)
    for user, place in zip(*np.nonzero(rows != truth_rows), strict=True):
        tied = np.flatnonzero(np.abs(truth_scores[user] - truth_scores[user, place]) <= GOLDEN)
        assert len(tied) > 1 or place == rows.shape[1] - 1, f"user {user}, place {place}: another item without a tie"


def assert_published_rankings(x_0: Tensor, record: dict[str, Any]) -> None:
    table = record["weights"]["item_embeddings.weight"]
    assert_same_ranking(*published_ranking(x_0, table, None, 20), record)
    seen = torch.zeros(x_0.shape[0], table.shape[0], dtype=torch.bool).scatter_(1, record["full_history"], True)
    seen[:, 0] = False  # the padding of full_history
    assert_same_ranking(*published_ranking(x_0, table, seen, 20), record, "_seen_zeroed")


@pytest.mark.golden
def test_the_published_code_gives_the_recorded_outputs(office: dict[str, Any]) -> None:
    model = CDDRecModel(office["args"]).eval()
    model.load_state_dict(office["weights"])
    x_0 = model.inference(office["history"], RecordedDraws(office["noise"]))[:, -1]
    assert relative_error(x_0, office["x0"]) <= GOLDEN
    assert_published_rankings(x_0, office)


@pytest.mark.golden
@pytest.mark.parametrize("place", PLACES)
def test_a_coupled_batch_gives_the_recorded_outputs(office: dict[str, Any], place: str) -> None:
    model = CDDRec(config_of(office["args"]), office["weights"], place_all(CDDRec.ops, place))
    x_0 = run(model, left_aligned(office["history"]), office["noise"])
    assert relative_error(x_0, office["x0"]) <= GOLDEN
    assert_published_rankings(x_0, office)


@pytest.mark.golden
@pytest.mark.parametrize("place", PLACES)
def test_users_alone_give_the_recorded_outputs(office: dict[str, Any], place: str) -> None:
    histories, noise = left_aligned(office["history"]), office["noise_one_by_one"]
    uncoupled = CDDRec(config_of(office["args"], "none"), office["weights"], place_all(CDDRec.ops, place))
    assert relative_error(run(uncoupled, histories, noise), office["x0_one_by_one"]) <= GOLDEN
    coupled = CDDRec(config_of(office["args"]), office["weights"], place_all(CDDRec.ops, place))
    singles = [
        run(coupled, Histories(histories.items[i : i + 1], histories.lengths[i : i + 1]), noise[:, i : i + 1])
        for i in range(histories.batch_size)
    ]
    assert relative_error(torch.cat(singles), office["x0_one_by_one"]) <= GOLDEN


# --- restructured == published ----------------------------------------------------------------------------------------

SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([8, 24]),
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([1, 2, 4]),
        "hidden_act": st.sampled_from(["gelu", "relu"]),
        "max_seq_length": st.integers(1, 9),
        "T": st.sampled_from([2, 7]),
    }
)


@st.composite
def padded_batches(draw: st.DrawFn, slots: int, n_items: int) -> Tensor:
    """Left-padded rows of every length from 0 to full, with id 0 also inside of and at the end of histories."""
    ids = st.one_of(st.just(0), st.integers(1, n_items), st.integers(1, n_items))
    rows = draw(st.lists(st.lists(ids, max_size=slots), min_size=1, max_size=5))
    rows += [[], [0] * slots, [1] * slots]
    return torch.tensor([[0] * (slots - len(row)) + row for row in rows])


@pytest.mark.parametrize(
    ("place", "dtype"),
    [
        ("torch", torch.float64),
        *((place, torch.float32) for place in PLACES if place != "triton" or not GPU),  # each draw compiles kernels
    ],
    ids=str,
)
@given(data=st.data(), sizes=SIZES, seed=st.integers(0, 1000))
def test_the_restructured_model_equals_the_published_one(
    place: str, dtype: torch.dtype, data: st.DataObject, sizes: dict[str, Any], seed: int
) -> None:
    published = drawn_model(dtype, seed, **sizes)
    padded = data.draw(padded_batches(sizes["max_seq_length"], published.args.item_size - 2))
    noise = torch.randn(2, padded.shape[0], sizes["hidden_size"], dtype=dtype)
    theirs = published.inference(padded, RecordedDraws(noise))[:, -1]
    ours = run(restructured(published, place=place), left_aligned(padded), noise)
    if dtype == torch.float64:
        assert relative_error(ours, theirs) <= AGREE[dtype]
        return
    truth = drawn_model(dtype, seed, **sizes).double().inference(padded, RecordedDraws(noise.double()))[:, -1]
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + FLOOR[dtype]


@given(data=st.data(), sizes=SIZES, seed=st.integers(0, 1000))
def test_without_coupling_each_user_is_alone(data: st.DataObject, sizes: dict[str, Any], seed: int) -> None:
    published = drawn_model(torch.float64, seed, **sizes)
    padded = data.draw(padded_batches(sizes["max_seq_length"], published.args.item_size - 2))
    noise = torch.randn(2, padded.shape[0], sizes["hidden_size"], dtype=torch.float64)
    alone = [
        published.inference(padded[i : i + 1], RecordedDraws(noise[:, i : i + 1]))[:, -1] for i in range(len(padded))
    ]
    ours = run(restructured(published, "none"), left_aligned(padded), noise)
    assert relative_error(ours, torch.cat(alone)) <= AGREE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_dtypes_are_as_good_as_the_published_code_in_them(dtype: torch.dtype) -> None:
    published = drawn_model(dtype, 3, num_hidden_layers=2)
    padded = torch.randint(1, 22, (7, 6)) * (torch.arange(6) >= torch.arange(7)[:, None].clamp(max=5))
    noise = torch.randn(2, 7, 16).to(dtype)
    truth = drawn_model(torch.float32, 3, num_hidden_layers=2).to(dtype).double()
    expected = truth.inference(padded, RecordedDraws(noise.double()))[:, -1]
    theirs = published.inference(padded, RecordedDraws(noise))[:, -1]
    ours = run(restructured(published), left_aligned(padded), noise)
    assert relative_error(ours, expected) <= 2 * relative_error(theirs, expected) + FLOOR[dtype]


def test_a_half_model_encodes_the_empty_history_in_float32() -> None:
    model = restructured(drawn_model(torch.bfloat16, 5))
    wide = restructured(drawn_model(torch.float32, 5).to(torch.bfloat16).float())
    nobody = Histories(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    expected = wide.encode(nobody, wide.item_table).to(torch.bfloat16)
    torch.testing.assert_close(model.encode(nobody, model.item_table), expected, rtol=0, atol=0)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def histories() -> Histories:
    return left_aligned(torch.tensor([[0, 0, 3, 0, 5, 7], [0] * 6, [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 9, 0]]))


def test_the_first_draw_is_not_looked_at(histories: Histories) -> None:
    model = restructured(drawn_model(torch.float32, 0))
    noise = torch.randn(2, 4, 16)
    expected = run(model, histories, noise)
    noise[0] = float("nan")
    assert torch.equal(run(model, histories, noise), expected)


def test_a_full_chain_ends_in_its_last_step(histories: Histories) -> None:
    model = restructured(drawn_model(torch.float32, 0))
    noise = torch.randn(6, 4, 16)
    one_step = run(model, histories, noise[[0, 5]])
    assert torch.equal(run(model, histories, noise, scheduler="ddpm"), one_step)

    plan = model.plan("ddpm")
    state = model.prepare(model.encode(histories, model.item_table), plan, 1.0)
    seen: list[int] = []
    watched = model.sample(state, plan, GivenNoise(noise), lambda step, t, x: seen.append(t))
    assert torch.equal(watched, one_step)
    assert seen == [4, 3, 2, 1, 0]
    replaced = model.sample(state, plan, GivenNoise(noise), lambda step, t, x: torch.zeros_like(x) if t == 0 else None)
    assert torch.equal(replaced, torch.zeros_like(one_step))


def test_steps_before_the_last_feed_their_own_time_row(histories: Histories) -> None:
    model = restructured(drawn_model(torch.float64, 0))
    plan = model.plan("ddpm", timesteps=[3, 1])
    state = model.prepare(model.encode(histories, model.item_table), plan, 1.0)
    for step, t in enumerate([3, 1]):
        alone = model.prepare(model.encode(histories, model.item_table), model.plan("ddpm", timesteps=[t]), 1.0)
        expected = model.denoise(state.attended, 0, alone)
        torch.testing.assert_close(model.denoise(state.attended, step, state), expected, rtol=0, atol=0)
    assert not torch.equal(model.denoise(state.attended, 0, state), model.denoise(state.attended, 1, state))


def test_samples_repeat_the_rows_of_the_batch(histories: Histories) -> None:
    model = restructured(drawn_model(torch.float32, 0))
    plan = model.one_step_plan()
    state = model.prepare(model.encode(histories, model.item_table), plan, 1.0)
    noise = torch.randn(2, 12, 16)
    together = model.sample(model.repeat(state, 3), plan, GivenNoise(noise))
    for sample in range(3):
        single = model.sample(state, plan, GivenNoise(noise[:, sample::3]))
        assert relative_error(together[sample::3], single) <= AGREE[torch.float32]


def test_users_of_a_coupled_batch_can_be_reordered(histories: Histories) -> None:
    model = restructured(drawn_model(torch.float64, 0))
    noise, order = torch.randn(2, 4, 16, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    moved = run(model, Histories(histories.items[order], histories.lengths[order]), noise[:, order])
    assert relative_error(moved, run(model, histories, noise)[order]) <= AGREE[torch.float64]


@pytest.mark.parametrize("batch_coupling", ["published", "none"])
def test_the_width_of_the_batch_does_not_matter(histories: Histories, batch_coupling: str) -> None:
    """Columns beyond every history, filled with whatever row, change nothing; nor does a table that goes on."""
    model = restructured(drawn_model(torch.float64, 0, num_hidden_layers=2, max_seq_length=9), batch_coupling)
    wide = Histories(torch.full((4, 8), 11), histories.lengths)
    inside = torch.arange(6) < histories.lengths[:, None]
    wide.items[:, :6][inside] = histories.items[inside]
    longer = torch.cat([model.item_table, torch.randn(3, 16, dtype=torch.float64)])
    expected = model.encode(histories, model.item_table)
    assert relative_error(model.encode(wide, longer), expected) <= AGREE[torch.float64]


def test_items_added_later_are_read_from_the_table_given() -> None:
    model = restructured(drawn_model(torch.float64, 0))
    longer = torch.cat([model.item_table, model.item_table[4:5]])
    known = Histories(torch.tensor([[2, 4]]), torch.tensor([2]))
    added = Histories(torch.tensor([[2, 23]]), torch.tensor([2]))
    assert torch.equal(model.encode(added, longer), model.encode(known, model.item_table))


@pytest.mark.parametrize("batch_coupling", ["published", "none"])
def test_an_empty_batch_gives_an_empty_result(batch_coupling: str) -> None:
    model = restructured(drawn_model(torch.float32, 0), batch_coupling)
    nobody = Histories(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert run(model, nobody, torch.randn(2, 0, 16)).shape == (0, 16)


@pytest.mark.parametrize(
    ("beta_t", "steps", "sigma"),
    [(0.04, 20, 0.009781), (0.002, 30, 0.007896), (0.08, 20, 0.009886), (0.002, 25, 0.008011)],
)
def test_the_one_step_plan_adds_the_noise_of_the_authors_four_settings(beta_t: float, steps: int, sigma: float) -> None:
    model = restructured(drawn_model(torch.float32, 0, T=steps, beta_T=beta_t))
    plan = model.plan("one_step")
    assert plan.timesteps.tolist() == [0]
    c_out, c_xt, c_noise = plan.coef[0].tolist()
    assert (c_out, c_xt) == (1.0, 0.0)
    assert c_noise == pytest.approx(sigma, abs=5e-7)


def test_what_cddrec_cannot_do_is_refused(histories: Histories) -> None:
    model = restructured(drawn_model(torch.float32, 0))
    condition = model.encode(histories, model.item_table)
    with pytest.raises(InvalidArgument, match=r"guidance_scale must be 1.*got 2.5"):
        model.prepare(condition, model.one_step_plan(), 2.5)
    with pytest.raises(InvalidArgument, match="scheduler='ddim' need a prediction of x_start"):
        model.plan("ddim")
    longer = restructured(drawn_model(torch.float32, 0, T=9)).plan("ddpm")
    with pytest.raises(InvalidArgument, match=r"must lie in 0\.\.4"):
        model.prepare(condition, longer, 1.0)


def test_the_weights_of_a_config_are_those_of_the_published_module() -> None:
    published = drawn_model(torch.float32, 0, num_hidden_layers=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()}
    assert CDDRec.weight_shapes(config_of(published.args)) == shapes
