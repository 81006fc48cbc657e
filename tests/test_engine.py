"""The engine: what `generate()` promises, for every method."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff.errors import BackendUnavailable, InvalidArgument, InvalidHistory
from fastdiff.ops.cpu import library
from fastdiff.ops.score_topk import score_topk
from fastdiff.plan import StepPlan, ddpm
from fastdiff.sampler import Sampler
from tests.builders import METHODS, first_id, small_engine
from tests.tolerances import AGREE, assert_agree

HISTORIES = [[3, 7, 7, 20], [], [5], list(range(10, 22)), [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture(params=METHODS)
def engine(request: pytest.FixtureRequest) -> Any:
    return small_engine(request.param)


# --- the output -----------------------------------------------------------------------------------------------------


def test_output_is_sorted_and_complete(engine: Any) -> None:
    output = engine.generate(HISTORIES, top_k=7, seed=1, output_embeddings=True)
    assert output.item_ids.shape == output.scores.shape == (5, 7)
    assert output.item_ids.dtype == torch.int64
    assert output.scores.dtype == torch.float32
    assert output.num_valid.tolist() == [7] * 5
    assert output.embeddings.shape == (5, 16)
    assert bool((output.scores[:, :-1] >= output.scores[:, 1:]).all())
    assert output.seed == 1
    assert set(output.timings) == {"prepare", "encode", "denoise", "rank"}
    assert all(seconds >= 0 for seconds in output.timings.values())
    ids, scores = output.to_tuple()
    assert ids is output.item_ids
    assert scores is output.scores


def test_scores_are_those_of_the_embeddings(engine: Any) -> None:
    output = engine.generate(HISTORIES, top_k=50, seed=1, output_embeddings=True, filter_seen=False)
    table = engine.model.item_table.double()
    query = output.embeddings.double()
    if engine.catalog.metric == "cosine":
        table, query = torch.nn.functional.normalize(table, dim=-1), torch.nn.functional.normalize(query, dim=-1)
    expected = (query @ table.T).gather(1, output.item_ids)
    assert_agree(output.scores, expected, torch.float32)


def test_empty_batch(engine: Any) -> None:
    output = engine.generate([], top_k=4, output_embeddings=True)
    assert output.item_ids.shape == (0, 4)
    assert output.scores.shape == (0, 4)
    assert output.num_valid.shape == (0,)
    assert output.embeddings.shape == (0, 16)


def test_seen_items_are_left_out_of_the_clean_ranking(engine: Any) -> None:
    output = engine.generate(HISTORIES, top_k=50, seed=1)
    for history, ids, valid in zip(HISTORIES, output.item_ids.tolist(), output.num_valid.tolist(), strict=True):
        assert not set(history) & set(ids[:valid])
        assert valid == 50 - len(set(history))
        assert ids[valid:] == [-1] * (50 - valid)
    assert bool(torch.isinf(output.scores[3, 38:]).all())


def test_published_ranking_holds_all_rows(engine: Any) -> None:
    rows = engine.config.n_rows
    output = engine.generate(HISTORIES, top_k=rows, seed=1, ranking="published")
    for ids in output.item_ids.tolist():
        assert sorted(ids) == list(range(rows))
    if engine.config.published_seen_score is not None:
        position = output.item_ids[0].tolist().index(7)
        assert output.scores[0, position].item() == 0.0


# --- purity -----------------------------------------------------------------------------------------------------------


def test_same_seed_same_answer_other_seed_another(engine: Any) -> None:
    first = engine.generate(HISTORIES, seed=5, output_embeddings=True)
    again = engine.generate(HISTORIES, seed=5, output_embeddings=True)
    other = engine.generate(HISTORIES, seed=6, output_embeddings=True)
    assert torch.equal(first.embeddings, again.embeddings)
    assert torch.equal(first.item_ids, again.item_ids)
    assert not torch.equal(first.embeddings, other.embeddings)


def test_drawn_seed_is_returned_and_replays(engine: Any) -> None:
    first = engine.generate(HISTORIES, output_embeddings=True)
    again = engine.generate(HISTORIES, seed=first.seed, output_embeddings=True)
    assert torch.equal(first.embeddings, again.embeddings)


@given(order=st.permutations(range(5)), split=st.integers(1, 4))
@pytest.mark.parametrize("method", METHODS)
def test_a_row_does_not_depend_on_its_batch(method: str, order: list[int], split: int) -> None:
    engine = small_engine(method)
    whole = engine.generate(HISTORIES, seed=3, output_embeddings=True).embeddings
    shuffled = [HISTORIES[i] for i in order]
    parts = [shuffled[:split], shuffled[split:]]
    pieces = torch.cat([engine.generate(part, seed=3, output_embeddings=True).embeddings for part in parts])
    assert_agree(pieces, whole[order], torch.float32)


@pytest.mark.skipif(library.why_not() is not None, reason="the C++ ops are not built")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("method", "guidance", "scheduler", "changes"),
    [
        *((method, 1.0, None, {}) for method in METHODS),
        ("adrec", 2.0, None, {}),
        ("adrec", 2.0, None, {"decoder": "mlp"}),
        ("dreamrec", 3.0, None, {}),
        ("dreamrec", 3.0, None, {"denoiser": "mlp2"}),
        ("dreamrec", 3.0, "closed_form", {}),
        ("tarec", 3.0, "ddpm", {}),
        ("cddrec", 1.0, "ddpm", {"hidden_act": "relu"}),
        ("dimerec", 1.0, None, {"guidance_extractor": "last_items"}),
    ],
)
def test_in_cpp_a_row_has_the_same_bits_in_any_batch(
    method: str, guidance: float, scheduler: str | None, changes: dict[str, Any], threads: int
) -> None:
    engine = small_engine(method, guidance, backend="cpu", **changes)
    lengths = torch.randint(0, 12, (61,)).tolist()
    histories = [torch.randint(1, 50, (length,)).tolist() for length in lengths]
    keys = list(range(61))  # short histories may be equal

    def embeddings(rows: slice) -> Tensor:
        part, ids = histories[rows], keys[rows]
        output = engine.generate(
            part, scheduler=scheduler, seed=3, request_ids=ids, num_samples=2, output_embeddings=True
        )
        return output.embeddings

    whole = embeddings(slice(0, 61))
    torch.set_num_threads(threads)
    for rows in (slice(0, 61), slice(0, 1), slice(5, 6), slice(9, 11), slice(17, 53)):
        assert torch.equal(embeddings(rows), whole[rows])


def test_coupled_batch_is_one_batch() -> None:
    engine = small_engine("cddrec", batch_coupling="published")
    noise = torch.randn(2, 5, 16)
    whole = engine.generate(HISTORIES, noise=noise, output_embeddings=True).embeddings
    alone = engine.generate(HISTORIES[:1], noise=noise[:, :1], output_embeddings=True).embeddings
    assert (whole[:1] - alone).abs().max() > 1e-2


def test_padding_is_no_part_of_a_history(engine: Any) -> None:
    pad = engine.config.pad_id
    histories = [history for history in HISTORIES if history]
    width = max(map(len, histories)) + 2
    expected = engine.generate(histories, seed=2, output_embeddings=True)
    for side in ("left", "right"):
        for fill in (pad, -1):
            rows = [
                [fill] * (width - len(h)) + h if side == "left" else h + [fill] * (width - len(h)) for h in histories
            ]
            for padded in (torch.tensor(rows), np.array(rows, dtype=np.int32)):
                output = engine.generate(padded, seed=2, output_embeddings=True)
                assert torch.equal(output.embeddings, expected.embeddings)
                assert torch.equal(output.item_ids, expected.item_ids)


def test_items_outside_the_window_matter_only_as_seen(engine: Any) -> None:
    long = list(range(1, 41))
    window = long[-engine.config.max_seq_len :]
    a = engine.generate([long], seed=2, top_k=50, output_embeddings=True)
    b = engine.generate([window], seed=2, top_k=50, output_embeddings=True)
    assert torch.equal(a.embeddings, b.embeddings)
    assert a.num_valid.item() == 10
    assert b.num_valid.item() == 50 - len(window)


def test_request_ids_replace_the_history_hash(engine: Any) -> None:
    twins = engine.generate([[], []], seed=1, output_embeddings=True).embeddings
    assert torch.equal(twins[0], twins[1])
    apart = engine.generate([[], []], seed=1, request_ids=[7, 8], output_embeddings=True).embeddings
    assert not torch.equal(apart[0], apart[1])
    alone = engine.generate([[]], seed=1, request_ids=[8], output_embeddings=True).embeddings
    assert_agree(alone, apart[1:], torch.float32)


def test_catalogue_permutation_equivariance(engine: Any) -> None:
    """The same items under other row numbers: the same recommendations, given request ids."""
    config = engine.config
    order = torch.randperm(config.n_items, generator=torch.Generator().manual_seed(1))
    weights = dict(engine.model.weights)
    table = weights[type(engine.model).item_table_key].clone()
    start = config.first_item_row
    table[start : start + config.n_items] = table[start : start + config.n_items][order]
    weights[type(engine.model).item_table_key] = table
    names = [f"item {int(i)}" for i in range(config.n_items)]
    checkpoint = fastdiff.checkpoint.Checkpoint(config, engine.generation_config, engine.model.weights, names)
    shuffled = fastdiff.checkpoint.Checkpoint(config, engine.generation_config, weights, [names[int(i)] for i in order])
    histories = [["item 3", "item 9"], ["item 20"], []]
    keys = [1, 2, 3]
    a = fastdiff.Engine.from_checkpoint(checkpoint).generate(histories, seed=4, request_ids=keys)
    b = fastdiff.Engine.from_checkpoint(shuffled).generate(histories, seed=4, request_ids=keys)
    assert (a.item_ids == b.item_ids).all()
    assert torch.equal(a.scores, b.scores)


# --- samplers ---------------------------------------------------------------------------------------------------------


def test_guidance_of_one_is_none(engine: Any) -> None:
    plain = engine.generate(HISTORIES, seed=1, output_embeddings=True).embeddings
    one = engine.generate(HISTORIES, seed=1, guidance_scale=1.0, output_embeddings=True).embeddings
    assert torch.equal(plain, one)


@pytest.mark.parametrize("method", ["adrec", "dreamrec", "tarec", "dimerec"])
def test_ddim_at_eta_one_over_every_step_is_ddpm(method: str) -> None:
    changes = {"variance_type": "fixed_small"}
    engine = small_engine(method, **changes)
    total = engine.config.schedule.num_train_timesteps
    a = engine.generate(HISTORIES, seed=1, scheduler="ddpm", output_embeddings=True).embeddings
    b = engine.generate(HISTORIES, seed=1, scheduler="ddim", eta=1.0, output_embeddings=True).embeddings
    c = engine.generate(
        HISTORIES, seed=1, scheduler="ddpm", num_inference_steps=total, output_embeddings=True
    ).embeddings
    assert_agree(b, a, torch.float32)
    assert torch.equal(a, c)


def test_callback_sees_every_step_and_changes_nothing(engine: Any) -> None:
    calls: list[tuple[int, int]] = []
    expected = engine.generate(HISTORIES, seed=1, output_embeddings=True).embeddings
    seen = engine.generate(
        HISTORIES, seed=1, output_embeddings=True, callback_on_step_end=lambda i, t, x: calls.append((i, t))
    ).embeddings
    assert_agree(seen, expected, torch.float32)
    plan = engine.model.plan(engine.generation_config.scheduler)
    assert calls == list(enumerate(plan.timesteps.tolist()))


def test_callback_may_replace_x(engine: Any) -> None:
    output = engine.generate(
        HISTORIES, seed=1, output_embeddings=True, callback_on_step_end=lambda i, t, x: torch.zeros_like(x)
    )
    assert not output.embeddings.any()


def test_progress_bar_goes_to_stderr(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate(HISTORIES, seed=1, show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step" in captured.err


def test_given_noise_is_the_noise(engine: Any) -> None:
    """Replaying Philox's own draws as given noise reproduces the seeded call."""
    from fastdiff.noise import history_row_key

    plan = engine.model.plan(engine.generation_config.scheduler)
    histories = [h for h in HISTORIES if 0 < len(h) <= 8]
    width = max(map(len, histories))
    items = torch.tensor([h + [0] * (width - len(h)) for h in histories])
    keys = history_row_key(items, torch.tensor([len(h) for h in histories]))
    zeros = torch.zeros(len(histories), dtype=torch.int64)
    noise = engine.model.bound["philox_normals"](9, keys, zeros, 0, plan.num_steps + 1, 16)
    seeded = engine.generate(histories, seed=9, output_embeddings=True).embeddings
    given = engine.generate(histories, noise=noise, output_embeddings=True)
    assert torch.equal(given.embeddings, seeded)
    assert given.seed is None
    if not bool(plan.draws_noise[-1]):
        shorter = engine.generate(histories, noise=noise[:-1], output_embeddings=True).embeddings
        assert torch.equal(shorter, seeded)
    if engine.config.method == "cddrec":  # x_T is never read there
        with pytest.raises(
            InvalidArgument, match="noise holds the starting draw alone, which a cddrec model never reads"
        ):
            engine.generate(histories, noise=noise[0])
        return
    start = engine.generate(
        histories, noise=noise[0], seed=9 if bool(plan.draws_noise.any()) else None, output_embeddings=True
    )
    assert torch.equal(start.embeddings, seeded)


def test_generators(engine: Any) -> None:
    def run(generator: Any, histories: Any = HISTORIES) -> torch.Tensor:
        output = engine.generate(histories, generator=generator, output_embeddings=True)
        assert output.seed is None
        return output.embeddings

    one = run(torch.Generator().manual_seed(3))
    assert torch.equal(one, run(torch.Generator().manual_seed(3)))
    each = run([torch.Generator().manual_seed(i) for i in range(5)])
    alone = run([torch.Generator().manual_seed(2)], HISTORIES[2:3])
    assert_agree(alone, each[2:3], torch.float32)


@pytest.mark.parametrize("method", ["dreamrec", "tarec"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_closed_form_has_the_mean_of_the_chain(method: str, eta: float | None) -> None:
    """With the draw at zero the closed form is the chain's mean: the loop run on zero noise."""
    engine = small_engine(method, guidance_scale=3.0)
    scheduler = "ddpm" if eta is None else "ddim"
    steps = {"num_inference_steps": 5}
    zeros = torch.zeros(6, 5, 16)
    loop = engine.generate(HISTORIES, scheduler=scheduler, eta=eta, noise=zeros, output_embeddings=True, **steps)
    closed = engine.generate(
        HISTORIES, scheduler="closed_form", eta=eta, noise=zeros[0], output_embeddings=True, **steps
    )
    assert_agree(closed.embeddings, loop.embeddings, torch.float32)


def test_closed_form_as_a_setting_is_checked_at_load() -> None:
    engine = small_engine("dreamrec", generation={"scheduler": "closed_form"})
    assert engine.generate(HISTORIES, seed=1).num_valid.tolist() == [10] * 5
    with pytest.raises(InvalidArgument, match="needs a linear denoiser, and this adrec model's is not linear"):
        small_engine("adrec", generation={"scheduler": "closed_form"})


def test_a_step_plan_is_a_scheduler(engine: Any) -> None:
    plan = engine.model.plan(engine.generation_config.scheduler)
    expected = engine.generate(HISTORIES, seed=1, output_embeddings=True).embeddings
    assert torch.equal(engine.generate(HISTORIES, seed=1, scheduler=plan, output_embeddings=True).embeddings, expected)


def test_few_steps_of_a_one_step_model() -> None:
    engine = small_engine("tarec")
    few = engine.generate(HISTORIES, seed=1, num_inference_steps=4, output_embeddings=True).embeddings
    named = engine.generate(
        HISTORIES, seed=1, num_inference_steps=4, scheduler="ddpm", output_embeddings=True
    ).embeddings
    assert torch.equal(few, named)


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_samples_are_aggregated(engine: Any, aggregation: str) -> None:
    output = engine.generate(
        HISTORIES, seed=1, num_samples=3, aggregation=aggregation, top_k=6, filter_seen=False, output_embeddings=True
    )
    assert output.embeddings.shape == (5, 3, 16)
    one = engine.generate(HISTORIES, seed=1, output_embeddings=True).embeddings
    assert_agree(output.embeddings[:, 0], one, torch.float32)  # sample 0 is the single draw
    start = engine.config.first_item_row
    table = engine.model.item_table[start : start + 50].double()
    query = output.embeddings.double()
    if engine.catalog.metric == "cosine":
        table, query = torch.nn.functional.normalize(table, dim=-1), torch.nn.functional.normalize(query, dim=-1)
    scores = query @ table.T
    merged = scores.amax(dim=1) if aggregation == "max" else scores.mean(dim=1)
    values, rows = merged.topk(6, dim=1)
    assert_agree(output.scores, values, torch.float32)
    if engine.config.method != "cddrec":
        assert output.item_ids.tolist() == (rows + start).tolist()


# --- what surrounds a call --------------------------------------------------------------------------------------------


def test_autocast_around_a_call_changes_nothing(engine: Any) -> None:
    expected = engine.generate(HISTORIES, seed=1, output_embeddings=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = engine.generate(HISTORIES, seed=1, output_embeddings=True)
        rebuilt = small_engine(engine.config.method).generate(HISTORIES, seed=1, output_embeddings=True)
    assert output.embeddings.dtype == torch.float32
    assert torch.equal(output.embeddings, expected.embeddings)
    assert torch.equal(output.scores, expected.scores)
    assert_agree(rebuilt.embeddings, expected.embeddings, torch.float32)


def test_gradients_stay_as_they_were_around_a_call() -> None:
    engine = small_engine("tarec")
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert not engine.generate(HISTORIES, output_embeddings=True).embeddings.requires_grad
            with pytest.raises(InvalidHistory):
                engine.generate([[99120]])
            assert torch.is_grad_enabled() == enabled
            query = torch.randn(1, 16, requires_grad=True)
            assert not engine.catalog.topk(query, 3).scores.requires_grad
            assert torch.is_grad_enabled() == enabled


def test_other_defaults_hold_from_the_next_call_on() -> None:
    engine = small_engine("tarec")
    one_step = engine.generate(HISTORIES, seed=1)
    several = engine.generate(HISTORIES, seed=1, scheduler="ddpm", num_inference_steps=4, top_k=3)
    assert not torch.equal(one_step.item_ids[:, :3], several.item_ids)
    first = engine.generation_config
    engine.generation_config = replace(first, scheduler="ddpm", num_inference_steps=4, top_k=3)
    assert torch.equal(engine.generate(HISTORIES, seed=1).item_ids, several.item_ids)
    engine.generation_config = first
    assert torch.equal(engine.generate(HISTORIES, seed=1).item_ids, one_step.item_ids)


def test_engines_travel_to_other_processes(engine: Any) -> None:
    expected = engine.generate(HISTORIES, seed=1)
    engine.catalog = engine.catalog.remove([5])
    for twin in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
        assert twin.catalog.lookup([5]).tolist() == [-1]
        output = twin.generate(HISTORIES, seed=1)
        again = engine.generate(HISTORIES, seed=1)
        assert output.item_ids.tolist() == again.item_ids.tolist()
    assert expected.seed == 1


def test_numpy_numbers_are_numbers(engine: Any) -> None:
    plain = engine.generate(HISTORIES, seed=1, top_k=5, guidance_scale=1.0, filter_seen=True)
    other = engine.generate(
        [np.array(history, dtype=np.int32) for history in HISTORIES],
        seed=np.int64(1),
        top_k=np.int32(5),
        guidance_scale=np.float32(1.0),
        filter_seen=np.bool_(True),
        exclude_items=set(),
    )
    assert torch.equal(plain.item_ids, other.item_ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: None, "must be an ItemCatalog \\(got NoneType\\)"),
        (lambda e: fastdiff.ItemCatalog(torch.randn(60, 8)), "dimensions must be 16"),
        (lambda e: fastdiff.ItemCatalog(torch.randn(60, 16), metric="cosine"), "metric must be dot"),
        (lambda e: fastdiff.ItemCatalog(torch.randn(60, 16)), "special rows must be {50: '\\[PAD\\]'}"),
    ],
)
def test_a_foreign_catalogue_is_refused(make: Any, message: str) -> None:
    engine = small_engine("dreamrec")
    with pytest.raises(InvalidArgument, match="engine.catalog: " + message):
        engine.catalog = make(engine)


def test_batches_of_a_padded_array_are_padded_arrays() -> None:
    padded = np.array([[1, 2, -1], [3, -1, -1], [-1, -1, -1], [4, 5, 6]])
    engine = small_engine("adrec")
    whole = engine.generate(padded, seed=1)
    for array in (padded, torch.from_numpy(padded)):
        parts = list(engine.generate_batches(array, batch_size=3, seed=1))
        assert torch.equal(torch.cat([part.item_ids for part in parts]), whole.item_ids)


def test_where_the_pad_id_is_an_item_of_cddrec() -> None:
    """Office numbers its items from 0: item 0 is a masked slot wherever it stands, and counts as seen."""
    engine = small_engine("cddrec")

    def query(history: Any) -> torch.Tensor:
        return engine.generate(history, seed=1, request_ids=[0], output_embeddings=True).embeddings

    ends_in_0 = query([[5, 6, 0]])
    assert (ends_in_0 - query([[5, 6]])).abs().max() > 1e-3
    assert torch.equal(query(np.array([[0, 0, 5, 6, 0]])), ends_in_0)  # left-padded, as the authors' loader does
    assert torch.equal(query(np.array([[5, 6, 0, -1]])), ends_in_0)
    assert torch.equal(query(np.array([[5, 6, 0, 0]])), query([[5, 6]]))  # right-padded
    assert torch.equal(query([[0, 5, 6]]), query([[5, 6]]))  # a pad in front is no slot that anybody attends to
    ranked = engine.generate([[0, 5, 9, 0, 7]], top_k=52, seed=1, ranking="published")
    place = ranked.item_ids[0].tolist().index(0)
    assert ranked.scores[0, place].item() == 0.0


def test_added_items_are_no_rows_of_the_published_table() -> None:
    engine = small_engine("cddrec")
    engine.catalog = engine.catalog.add([52], torch.ones(1, 16))
    output = engine.generate([[3, 52]], top_k=60, seed=1, ranking="published")
    assert sorted(output.item_ids[0, : output.num_valid[0]].tolist()) == list(range(52))


def test_numpy_strings_are_ids() -> None:
    engine = small_engine("tarec", item_ids=[f"i{n}" for n in range(50)])
    plain = engine.generate([["i3", "i4"]], seed=1, exclude_items=["i5"])
    other = engine.generate([list(np.array(["i3", "i4"]))], seed=1, exclude_items=list(np.array(["i5"])))
    assert plain.item_ids.tolist() == other.item_ids.tolist()


def test_an_empty_batch_takes_empty_noise() -> None:
    for noise in (torch.zeros(0, 16), torch.zeros(13, 0, 16)):
        output = small_engine("dreamrec").generate([], noise=noise, seed=None)
        assert output.scores.dtype == torch.float32


# --- filters ----------------------------------------------------------------------------------------------------------


def test_filters_intersect(engine: Any) -> None:
    output = engine.generate(
        HISTORIES,
        top_k=50,
        seed=1,
        filter_seen=False,
        candidate_items=list(range(10, 30)),
        exclude_items=[11, 12],
        user_exclude_items=[[13], [], [14, 15], [], []],
        user_candidate_items=[list(range(1, 21)), list(range(1, 50)), [14, 16, 40], [], [29]],
    )
    allowed = [
        set(range(10, 21)) - {11, 12, 13},
        set(range(10, 30)) - {11, 12},
        {16},
        set(),
        {29},
    ]
    for ids, valid, expected in zip(output.item_ids.tolist(), output.num_valid.tolist(), allowed, strict=True):
        assert set(ids[:valid]) == expected
        assert ids[valid:] == [-1] * (50 - valid)


def test_k_beyond_the_allowed_items_is_filled(engine: Any) -> None:
    output = engine.generate([[3]], top_k=60, seed=1)
    assert output.num_valid.item() == 49
    assert output.item_ids[0, 49:].tolist() == [-1] * 11
    assert bool((output.scores[0, 49:] == -torch.inf).all())


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["int", "str"])
def test_external_ids(method: str, kind: str) -> None:
    plain = small_engine(method)
    start = first_id(plain)
    external: list[Any] = [1000 + 3 * i if kind == "int" else f"sku-{i}" for i in range(50)]
    engine = small_engine(method, item_ids=external)
    histories = [[external[i] for i in (4, 9)], [], [external[30]]]
    rows = [[4 + start, 9 + start], [], [30 + start]]
    output = engine.generate(histories, seed=1, top_k=5, exclude_items=[external[0]])
    expected = plain.generate(rows, seed=1, top_k=5, exclude_items=[start])
    assert output.item_ids.tolist() == [[external[i - start] for i in ids] for ids in expected.item_ids.tolist()]


def test_items_added_later_are_recommended_and_known_to_histories(engine: Any) -> None:
    before = engine.generate(HISTORIES, seed=1)
    query = engine.generate([[5]], seed=1, output_embeddings=True).embeddings[0]
    engine.catalog = engine.catalog.add([900], 10 * query.unsqueeze(0))
    output = engine.generate([[5]], seed=1)
    assert output.item_ids[0, 0].item() == 900
    assert engine.generate([[5, 900]], seed=1).num_valid.item() == 10
    engine.catalog = engine.catalog.remove([900])
    after = engine.generate(HISTORIES, seed=1)
    assert torch.equal(after.item_ids, before.item_ids)


@pytest.mark.parametrize("kind", ["row", "int", "str"])
def test_removed_items_stay_known_to_histories(kind: str) -> None:
    """Delisting an item does not refuse the users who own it, nor change what the model sees of them."""
    external: list[Any] | None = {"row": None, "int": [7 * i for i in range(50)], "str": [f"i{i}" for i in range(50)]}[
        kind
    ]
    engine = small_engine("tarec", item_ids=external)
    ids = list(range(50)) if external is None else external
    history = [ids[3], ids[9]]
    before = engine.generate([history], seed=1, top_k=50, output_embeddings=True)
    engine.catalog = engine.catalog.remove([ids[9]])
    after = engine.generate([history], seed=1, top_k=50, exclude_items=[ids[9]], output_embeddings=True)
    assert torch.equal(after.embeddings, before.embeddings)
    assert after.item_ids.tolist() == before.item_ids.tolist()
    other = engine.generate([[ids[3]]], seed=1, top_k=50, filter_seen=False)
    assert ids[9] not in other.item_ids.tolist()[0]
    engine.catalog = engine.catalog.add([ids[9]], torch.ones(1, 16))  # the id now names the new item
    again = engine.generate([history], seed=1, output_embeddings=True)
    assert not torch.equal(again.embeddings, before.embeddings)


def test_catalogue_updates_under_way_do_not_disturb_readers() -> None:
    engine = small_engine("tarec")
    original = engine.catalog
    answers, failures = set(), []
    extra = torch.full((1, 16), 50.0)

    def read() -> None:
        try:
            for _ in range(30):
                answers.add(tuple(engine.generate([[5]], seed=1, top_k=3).item_ids[0].tolist()))
        except Exception as error:  # whatever a reader trips over is what the test looks for
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(60):
        engine.catalog = original.add([900], extra)
        engine.catalog = original
    for reader in readers:
        reader.join()
    assert not failures
    assert len(answers) <= 2


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_are_the_whole(engine: Any) -> None:
    whole = engine.generate(HISTORIES, seed=8, top_k=4)
    parts = list(engine.generate_batches(iter(HISTORIES), batch_size=2, seed=8, top_k=4))
    assert [len(part.item_ids) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.item_ids for part in parts]), whole.item_ids)


def test_batches_hold_one_batch_of_an_endless_stream() -> None:
    engine = small_engine("tarec")
    taken = 0

    def stream() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield [taken % 40 + 1]

    outputs = engine.generate_batches(stream(), batch_size=4, request_ids=iter(range(10**9)), top_k=3)
    first, second = next(outputs), next(outputs)
    assert taken == 8
    assert first.seed == second.seed


def test_batches_refuse_per_user_arguments() -> None:
    engine = small_engine("tarec")
    with pytest.raises(InvalidArgument, match="generate_batches: user_exclude_items holds one entry per user"):
        engine.generate_batches([[1]], user_exclude_items=[[2]])
    with pytest.raises(InvalidArgument, match="batch_size must be an int of at least 1 \\(got 0\\)"):
        engine.generate_batches([[1]], batch_size=0)


def test_batches_refuse_an_unknown_argument_at_the_call() -> None:
    with pytest.raises(TypeError, match=r"generate: unknown argument 'topk' \(did you mean 'top_k'\?\)"):
        small_engine("tarec").generate_batches([[1]], topk=3)


def test_an_error_in_a_later_batch_says_which():
    outputs = small_engine("tarec").generate_batches([[1], [2], [3], [99999]], batch_size=3)
    next(outputs)
    with pytest.raises(
        InvalidHistory, match=r"histories\[0\] holds item id 99999.*in the batch from histories\[3\] on"
    ):
        next(outputs)


def test_eta_alone_does_not_turn_one_step_into_many():
    engine = small_engine("tarec")
    with pytest.raises(InvalidArgument, match=r"eta belongs to scheduler='ddim', and this model's own setting is"):
        engine.generate([[1]], eta=0.0)
    assert engine.generate([[1]], eta=0.0, num_inference_steps=2, seed=1).num_valid.item() > 0


# --- dtypes, backends, folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_close(method: str, dtype: torch.dtype) -> None:
    # CDDRec's additive mask of -10000 leaves the logits of an empty history about 1e-3 of float32 resolution
    histories = [history for history in HISTORIES if history or method != "cddrec"]
    reference = small_engine(method).generate(histories, seed=1, output_embeddings=True).embeddings
    output = small_engine(method, dtype=dtype).generate(histories, seed=1, output_embeddings=True)
    assert output.embeddings.dtype == dtype
    tolerance = {torch.float64: AGREE[torch.float32], torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    scale = float(reference.abs().max())
    assert float((output.embeddings.double() - reference.double()).abs().max()) <= tolerance * scale


def test_backends_are_named_and_refused_with_the_reason(engine: Any) -> None:
    kinds = {op.name: op for op in (*type(engine.model).ops, score_topk)}
    assert engine.backends == {name: op.bind("auto", "cpu").backend for name, op in kinds.items()}
    assert set(small_engine_with_backend("torch").backends.values()) == {"torch"}
    with pytest.raises(
        BackendUnavailable, match=r"backend 'triton' cannot run: it needs a CUDA device, got cpu. Usable"
    ):
        small_engine_with_backend("triton")
    with pytest.raises(InvalidArgument, match="unknown name 'jax'; known backends: auto, torch, cpu, triton, cuda"):
        small_engine_with_backend("jax")


def small_engine_with_backend(backend: str) -> Any:
    source = small_engine("tarec")
    checkpoint = fastdiff.checkpoint.Checkpoint(source.config, source.generation_config, source.model.weights)
    return fastdiff.Engine.from_checkpoint(checkpoint, backend=backend)


def test_save_and_load(engine: Any, tmp_path: Path) -> None:
    engine.save_pretrained(tmp_path / "model")
    loaded = fastdiff.from_pretrained(tmp_path / "model")
    assert loaded.config == engine.config
    assert loaded.generation_config == engine.generation_config
    a, b = engine.generate(HISTORIES, seed=1), loaded.generate(HISTORIES, seed=1)
    assert torch.equal(a.item_ids, b.item_ids)
    assert_agree(a.scores, b.scores, torch.float32)  # another address, another alignment, another order of sums


def test_a_changed_catalogue_is_not_saved_with_the_model(engine: Any, tmp_path: Path) -> None:
    engine.catalog = engine.catalog.remove([5])
    with pytest.raises(InvalidArgument, match="save_pretrained: the catalogue is not the one that was loaded"):
        engine.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_outputs_are_ordinary_tensors(engine: Any) -> None:
    """Callers may write into them and train on them."""
    output = engine.generate(HISTORIES, seed=1, output_embeddings=True)
    output.scores[0, 0] = 0.0
    output.item_ids.fill_(-1)
    assert output.num_valid.tolist() == [10] * 5
    weight = torch.ones(16, requires_grad=True)
    (output.embeddings @ weight).sum().backward()
    assert weight.grad is not None


def test_repr_says_what_it_is(engine: Any) -> None:
    assert engine.config.method in repr(engine)
    assert str(Sampler.of(engine.generation_config, engine.config)) in repr(engine)
    assert f"score_topk={engine.backends['score_topk']}" in repr(engine)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_HISTORIES = [
    ([[3, 99120]], r"histories\[0\] holds item id 99120, the catalogue has ids 1\.\.50; add the item"),
    ([[3], [-5]], r"histories\[1\] holds item id -5, the catalogue has ids"),
    ([[3], [1.5]], r"histories\[1\] holds 1\.5, a float; item ids are all integers, or all strings"),
    ([[3, True]], r"histories\[0\] holds True, a bool"),
    ([3, 4], r"histories\[0\] is a int \(3\).*for one user, wrap the history"),
    ("345", r"histories is a str"),
    (7, r"histories is a int"),
    (torch.tensor([1, 2]), r"histories has shape \(2,\).*for one user, wrap the history"),
    (torch.zeros(1, 2, 3, dtype=torch.int64), r"histories has shape \(1, 2, 3\)"),
    (torch.tensor([[1.0, 2.0]]), r"histories has dtype float32; item ids are integers"),
    (np.array([[True]]), r"histories has dtype bool"),
    ([["a", 3]], r"histories\[0\] holds 3, a int; item ids are all integers, or all strings"),
    (torch.tensor([[3, -1, 4]]), r"histories\[0\] holds padding between its items"),
    ([[3, [4]]], r"histories\[0\] holds \[4\], a list"),
    (torch.tensor([[1.0]], dtype=torch.bfloat16), r"histories has dtype bfloat16"),
    (torch.tensor([[1]]).to_sparse(), r"histories is a torch.sparse_coo tensor.*to_dense"),
    ([[np.int64(3), 2**70]], r"histories hold an id of more than 64 bits"),
    ([["sku"]], r"histories\[0\] holds item id 'sku', a string; the ids of this catalogue are integers"),
    ([[3, -1, 4]], r"histories\[0\] holds padding between its items"),
]


@pytest.mark.parametrize(("histories", "message"), BAD_HISTORIES)
def test_bad_histories(histories: Any, message: str) -> None:
    with pytest.raises(InvalidHistory, match=message):
        small_engine("adrec").generate(histories)


PLAN = StepPlan(torch.tensor([0]), torch.tensor([[1.0, 0.0, 0.0]]))

BAD_ARGUMENTS = [
    ({"top_k": 0}, r"top_k must be an int of at least 1 \(got 0\)"),
    ({"top_k": 2.5}, r"top_k must be an int of at least 1 \(got 2\.5\)"),
    ({"num_samples": 0}, r"num_samples must be an int of at least 1"),
    ({"num_samples": 1 << 17}, r"num_samples must be at most 65536"),
    ({"aggregation": "sum"}, r"aggregation must be one of max, mean \(got 'sum'\)"),
    ({"guidance_scale": "big"}, r"guidance_scale must be a finite number \(got 'big'\)"),
    (
        {"scheduler": "euler"},
        r"scheduler must be one of ddpm, ddim, one_step, closed_form or a StepPlan \(got 'euler'\)",
    ),
    ({"num_inference_steps": 0}, r"num_inference_steps must be an int of at least 1 \(got 0\)"),
    ({"num_inference_steps": 13}, r"num_inference_steps must be an int in 1\.\.12.*\(got 13\)"),
    ({"num_inference_steps": 3, "timesteps": [5, 1]}, r"num_inference_steps excludes timesteps"),
    ({"timesteps": ["a"]}, r"timesteps must be a sequence of ints \(got \['a'\]\)"),
    ({"timesteps": 3}, r"timesteps must be a sequence of ints \(got 3\)"),
    ({"timesteps": [1, 5]}, r"timesteps must strictly descend"),
    ({"timesteps": [12]}, r"timesteps must lie in 0\.\.11"),
    ({"eta": 0.5, "scheduler": "ddpm"}, r"eta belongs to scheduler='ddim'"),
    ({"eta": -1.0, "scheduler": "ddim"}, r"eta must be a number from 0, .* to 1, as DDPM \(got -1\.0\)"),
    ({"eta": 1.5, "scheduler": "ddim"}, r"eta must be a number from 0, .* to 1, as DDPM \(got 1\.5\)"),
    ({"eta": 1.5, "scheduler": "closed_form"}, r"eta must be a number from 0, .* to 1, as DDPM \(got 1\.5\)"),
    ({"eta": float("nan"), "scheduler": "ddim"}, r"eta must be a finite number \(got nan\)"),
    ({"scheduler": "one_step", "num_inference_steps": 3}, r"scheduler='one_step' excludes num_inference_steps"),
    ({"scheduler": PLAN, "eta": 0.1}, r"a StepPlan as scheduler excludes eta"),
    (
        {"scheduler": "closed_form", "noise": torch.zeros(13, 1, 16)},
        r"noise has shape \[13, 1, 16\]; \[1, 16\] is accepted",
    ),
    (
        {"scheduler": "closed_form", "callback_on_step_end": print},
        r"callback_on_step_end excludes scheduler='closed_form'",
    ),
    ({"noise": torch.zeros(3, 1, 16)}, r"noise has shape \[3, 1, 16\]; \[1, 16\] or \[13, 1, 16\] or \[12, 1, 16\]"),
    ({"noise": torch.zeros(1, 16, dtype=torch.int64)}, r"noise must be floating \(got torch.int64\)"),
    ({"noise": [[0.0] * 16]}, r"noise must be a tensor \(got list\)"),
    ({"noise": torch.zeros(1, 16, device="meta")}, r"noise is on meta, the model on cpu"),
    ({"noise": torch.zeros(13, 1, 16), "seed": 1}, r"noise excludes seed"),
    ({"noise": torch.full((1, 16), torch.nan)}, r"noise holds NaN or infinity"),
    ({"generator": 5}, r"generator must be one torch.Generator.*got a int"),
    ({"generator": [1]}, r"generator must be one torch.Generator.*got a int"),
    ({"seed": torch.tensor([4, 5])}, r"seed must be an integer of 64 bits"),
    ({"request_ids": 5}, r"request_ids must hold one integer per history, 1 of them \(got a int\)"),
    ({"user_exclude_items": 5}, r"user_exclude_items must hold one list per history, 1 of them \(got a int\)"),
    ({"exclude_items": [[1, 2]]}, r"exclude_items must be a flat list of item ids"),
    ({"exclude_items": [1.5]}, r"exclude_items must be a flat list of item ids"),
    ({"callback_on_step_end": 5}, r"callback_on_step_end must be a function of"),
    ({"callback_on_step_end": lambda i, t, x: True}, r"must return None or a tensor \[1, 16\].*\(got bool\)"),
    ({"callback_on_step_end": lambda i, t, x: x[:0]}, r"must return None or a tensor \[1, 16\].*\(got \[0, 16\]"),
    ({"num_inference_steps": 5.0}, r"num_inference_steps must be an int of at least 1 \(got 5\.0\)"),
    ({"num_inference_steps": [5]}, r"num_inference_steps must be an int of at least 1 \(got \[5\]\)"),
    ({"generator": torch.Generator(), "seed": 1}, r"generator excludes seed"),
    ({"generator": [torch.Generator()] * 2}, r"one per history, 1 of them \(got 2\)"),
    ({"seed": 1.5}, r"seed must be an integer of 64 bits \(got 1\.5\)"),
    ({"seed": 1 << 64}, r"seed must be an integer of 64 bits"),
    ({"request_ids": [1, 2]}, r"request_ids must hold one integer per history, 1 of them \(got 2\)"),
    ({"request_ids": ["a"]}, r"request_ids\[0\] must be an integer of 64 bits \(got 'a'\)"),
    ({"ranking": "best"}, r"ranking must be one of clean, published \(got 'best'\)"),
    ({"ranking": "published", "filter_seen": True}, r"ranking='published' excludes filter_seen"),
    ({"ranking": "published", "exclude_items": [1]}, r"ranking='published' excludes exclude_items"),
    ({"filter_seen": "yes"}, r"filter_seen must be True, False or None \(got 'yes'\)"),
    ({"exclude_items": [777]}, r"exclude_items holds item id 777, the catalogue has ids 0\.\.49"),
    ({"candidate_items": 3}, r"candidate_items must be a list of item ids \(got int\)"),
    ({"user_exclude_items": [[1], [2]]}, r"user_exclude_items must hold one list per history, 1 of them \(got 2\)"),
    ({"user_candidate_items": [[888]]}, r"user_candidate_items\[0\] holds item id 888"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        small_engine("dreamrec").generate([[3]], **arguments)


def test_unknown_arguments_are_named() -> None:
    engine = small_engine("dreamrec")
    with pytest.raises(TypeError, match=r"unknown argument 'topk' \(did you mean 'top_k'\?\); accepted: histories"):
        engine.generate([[3]], topk=5)
    with pytest.raises(TypeError, match=r"'dtype' \(it belongs to from_pretrained and accelerate\)"):
        engine.generate([[3]], dtype=torch.float64)
    with pytest.raises(TypeError, match=r"'num_steps' \(did you mean 'num_inference_steps'\?\)"):
        engine.generate([[3]], num_steps=5)
    with pytest.raises(TypeError, match=r"'n_steps' \(did you mean 'num_inference_steps'\?\)"):
        engine.generate([[3]], n_steps=5)
    with pytest.raises(TypeError, match=r"'timestep' \(did you mean 'timesteps'\?\)"):
        engine.generate([[3]], timestep=[5])


def test_lists_may_be_padded_too(engine: Any) -> None:
    plain = engine.generate([[3, 17], []], seed=1)
    padded = engine.generate([[3, 17, -1, -1], [-1]], seed=1)
    assert torch.equal(plain.item_ids, padded.item_ids)


def test_dtypes_by_name_and_a_short_repr() -> None:
    source = small_engine("tarec")
    checkpoint = fastdiff.checkpoint.Checkpoint(source.config, source.generation_config, source.model.weights)
    engine = fastdiff.Engine.from_checkpoint(checkpoint, dtype="float64")
    assert engine.model.dtype == torch.float64
    assert "Stopwatch" not in repr(engine.generate([[3]], seed=1))


def test_public_names_are_found() -> None:
    assert {"from_pretrained", "accelerate", "Engine", "plan"} <= set(dir(fastdiff))
    assert fastdiff.plan.StepPlan is StepPlan
    with pytest.raises(AttributeError, match="has no attribute 'from_pretrainde'"):
        getattr(fastdiff, "from_" + "pretrainde")


def test_bad_devices_and_dtypes() -> None:
    source = small_engine("tarec")
    checkpoint = fastdiff.checkpoint.Checkpoint(source.config, source.generation_config, source.model.weights)
    with pytest.raises(InvalidArgument, match="'abacus' is no device"):
        fastdiff.Engine.from_checkpoint(checkpoint, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="torch sees no CUDA device here; use 'cpu'"):
            fastdiff.Engine.from_checkpoint(checkpoint, device="cuda")
    with pytest.raises(InvalidArgument, match=r"dtype: must be one of torch.float32.*got torch.int8"):
        fastdiff.Engine.from_checkpoint(checkpoint, dtype=torch.int8)


def test_plan_of_a_custom_schedule_runs() -> None:
    """A plan built by hand from the model's schedule, as a researcher would."""
    engine = small_engine("dreamrec")
    plan = ddpm(engine.model.schedule, [11, 6, 0])
    output = engine.generate(HISTORIES, seed=1, scheduler=plan)
    assert output.num_valid.tolist() == [10] * 5


def test_out_of_memory_in_an_op_says_how_much_was_asked_for() -> None:
    engine = small_engine("tarec")
    if engine.backends["score_topk"] != "cpu":
        pytest.skip("the C++ ops are not built")
    with pytest.raises(RuntimeError, match=rf"^cannot allocate \[1, {2**55}\], {2**58} bytes of memory"):
        engine.generate([[3]], top_k=2**55)
