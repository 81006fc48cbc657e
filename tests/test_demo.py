"""The demo: the law is a distribution, its bound is right, the shipped model keeps its claim, the training learns."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fastdiff
from fastdiff.checkpoint import Checkpoint
from fastdiff.demo import train
from fastdiff.demo.__main__ import METHODS, MODEL, MODELS, main
from fastdiff.demo.measure import draw_users, measure, numbers_of
from fastdiff.demo.simulate import (
    PARTS,
    best_hit_rate,
    build_catalogue,
    build_law,
    expected_hit_rate,
    simulate_users,
)
from fastdiff.engine import Engine
from fastdiff.sampler import Sampler
from fastdiff.train.run import recipe_class
from fastdiff.train.settings_file import load_settings
from fastdiff.train.tarec import TARecSettings

LAW = build_law()
FRESH_SEED = 31337  # of no training, validation or demo run


# --- the simulation ---------------------------------------------------------------------------------------------------


def test_every_item_has_a_name_of_its_own() -> None:
    catalogue = build_catalogue()
    assert len(set(catalogue.names)) == len(catalogue) == LAW.n_items
    assert catalogue.names[PARTS] == "The Ninth Key, part 1"
    assert (np.bincount(catalogue.series) == PARTS).all()


def test_the_law_is_a_distribution_over_the_items_not_seen() -> None:
    users = draw_users(LAW, 300, seed=5)
    for lengths in (users.lengths, np.zeros_like(users.lengths), np.full_like(users.lengths, 10)):
        probabilities = LAW.next_item(users.items[:, :-1], lengths)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)
        assert (probabilities >= 0).all()
        for row, items, length in zip(probabilities, users.items, lengths, strict=True):
            assert (row[items[:length]] == 0).all()
    np.testing.assert_allclose(LAW.after_last.sum(axis=1), 1.0, rtol=1e-12)


def test_the_law_reads_the_last_two_items_and_nothing_before() -> None:
    a, b, c = 0, 6 * PARTS, 14 * PARTS
    other = 500
    one, two = LAW.next_item(np.array([[other, a, b], [c, a, b]]))
    unseen = np.setdiff1d(np.arange(LAW.n_items), [other, c])
    np.testing.assert_allclose(one[unseen] / one[unseen].sum(), two[unseen] / two[unseen].sum(), rtol=1e-12)
    assert one[a + 1] > 0.1, "the series before the last goes on"
    swapped = LAW.next_item(np.array([[other, b, a]]))[0]
    assert swapped[a + 1] > one[a + 1] > one[a + 2]


def test_simulated_users_follow_the_law() -> None:
    """Frequencies of the next item after one fixed history, five standard errors wide."""
    first = int(np.argmax(LAW.start))
    sequences = simulate_users(LAW, 20_000, 2, seed=8)
    after = sequences[sequences[:, 0] == first, 1]
    expected = LAW.next_item(np.array([[first]]))[0]
    observed = np.bincount(after, minlength=LAW.n_items) / len(after)
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected / len(after)) + 5 / len(after)).all()
    assert (np.sort(simulate_users(LAW, 50, 11, seed=1), axis=1)[:, 1:] > 0).any()
    assert all(len(set(row)) == 11 for row in simulate_users(LAW, 50, 11, seed=1).tolist())


def test_the_same_seed_draws_the_same_users() -> None:
    np.testing.assert_array_equal(simulate_users(LAW, 40, 5, seed=3), simulate_users(LAW, 40, 5, seed=3))
    assert (simulate_users(LAW, 40, 5, seed=3) != simulate_users(LAW, 40, 5, seed=4)).any()
    assert simulate_users(LAW, 0, 5, seed=3).shape == (0, 5)


def test_the_best_hit_rate_is_what_the_best_lists_hit() -> None:
    """Brute force: the ten likeliest items of each user, against the items that the users really took."""
    users = draw_users(LAW, 20_000, seed=12)
    probabilities = users.probabilities(LAW)
    lists = np.argsort(-probabilities, axis=1, kind="stable")[:, :10]
    best = best_hit_rate(probabilities, 10)
    assert best == pytest.approx(expected_hit_rate(probabilities, lists), rel=1e-12)
    hit_rate = (lists == users.answers[:, None]).any(axis=1).mean()
    assert abs(hit_rate - best) < 5 * np.sqrt(best * (1 - best) / len(lists))
    worse = np.sort(lists, axis=1)
    worse[:, 0] = np.argmin(probabilities, axis=1)
    assert expected_hit_rate(probabilities, worse) < best


# --- the shipped model ------------------------------------------------------------------------------------------------


CLAIMS = {"tarec": 0.97, "dreamrec": 0.9, "adrec": 0.9, "cddrec": 0.9, "dimerec": 0.9}
"""Share of the best possible HR@10, on users that no training has seen."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return fastdiff.from_pretrained(MODEL)


def test_there_is_a_model_of_every_method() -> None:
    assert set(CLAIMS) == set(METHODS) == set(train.METHODS) == {folder.name for folder in MODELS.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_the_shipped_models_reach_their_claims(method: str) -> None:
    engine = fastdiff.from_pretrained(MODELS / method)
    assert engine.config.method == method
    measured = measure(engine, n_users=4000, seed=FRESH_SEED)
    assert measured.share_of_best > CLAIMS[method]
    noise = np.sqrt(measured.expected * (1 - measured.expected) / measured.n_users)
    assert abs(measured.hit_rate - measured.expected) < 5 * noise
    assert measured.expected < measured.best


@pytest.mark.parametrize("method", METHODS)
def test_the_shipped_models_are_small_and_name_their_items(method: str) -> None:
    engine = fastdiff.from_pretrained(MODELS / method)
    assert sum(file.stat().st_size for file in (MODELS / method).iterdir()) < 2_000_000
    assert tuple(engine.catalog.item_ids) == build_catalogue().names
    output = engine.generate([["Harbour Lights, part 1", "Harbour Lights, part 2"]], top_k=3, seed=0)
    assert output.item_ids[0, 0] == "Harbour Lights, part 3"


def test_more_steps_and_a_cold_user_work_too(engine: Engine) -> None:
    cold = engine.generate([[]], seed=1)
    assert {name.rpartition(" ")[2] for name in cold.item_ids[0].tolist()} == {"1"}, "everybody starts with a part 1"
    users = draw_users(LAW, 1000, FRESH_SEED)
    few = engine.generate(users.histories(), num_inference_steps=5, seed=1)
    probabilities = users.probabilities(LAW)
    assert expected_hit_rate(probabilities, numbers_of(few.item_ids)) > 0.96 * best_hit_rate(probabilities, 10)


@pytest.mark.parametrize("method", METHODS)
def test_the_command_says_how_close_it_comes(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--users", "300", "--method", method])
    printed = capsys.readouterr().out
    assert METHODS[method] in printed
    assert "of the 0.8" in printed
    assert "histories per second" in printed
    assert "part 2" in printed
    with pytest.raises(SystemExit):
        main(["--users", "0"])
    assert "--users must be at least 1" in capsys.readouterr().err


# --- the training -----------------------------------------------------------------------------------------------------


def test_the_command_trains_by_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer users and steps: it writes a model that knows the items by name and is far better than chance."""
    changes = {"epochs": 2, "batch_size": 64, "learning_rate": 0.01, "num_train_timesteps": 50}
    few = load_settings("tarec", TARecSettings, "simulated", values=changes)
    monkeypatch.setattr(train, "load_settings", lambda *args, **kwargs: few)
    monkeypatch.setattr(train, "simulated_data", partial(train.simulated_data, n_users=3000, n_held_out=100))
    train.main(["tarec", "--output", str(tmp_path / "run")])
    assert "on new users: HR@10" in capsys.readouterr().out
    trained = fastdiff.from_pretrained(tmp_path / "run" / "model")
    assert tuple(trained.catalog.item_ids) == build_catalogue().names
    assert measure(trained, n_users=500, seed=FRESH_SEED).share_of_best > 0.3


@pytest.mark.parametrize("method", METHODS)
def test_the_users_that_are_measured_on_are_not_learned_from(method: str) -> None:
    data = train.simulated_data(method, 50, 40)
    lengths = {len(sequence) for sequence in data.sequences}
    assert lengths == {11} if method not in train.SEES_PADS else lengths <= set(range(3, 12)) and len(lengths) > 4
    assert len(data.valid) == len(data.test) == 40
    learned = {tuple(data.item_ids[item] for item in sequence) for sequence in data.sequences}
    for instance in (*data.valid, *data.test):
        whole = (*instance.history, instance.target)
        assert 2 <= len(whole) <= 11
        assert len(whole) < 5 or not any(sequence[: len(whole)] == whole for sequence in learned)


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_are_those_of_the_shipped_models(method: str) -> None:
    engine, kind = fastdiff.from_pretrained(MODELS / method), recipe_class(method)
    recipe = kind(load_settings(method, kind.Settings, "simulated"), train.simulated_data(method, 10, 5))
    checkpoint = recipe.model(recipe.stages()[-1])
    assert isinstance(checkpoint, Checkpoint)
    assert engine.config == checkpoint.config
    few = {"adrec": Sampler("ddpm", 1), "dimerec": Sampler("ddpm", 1), "dreamrec": Sampler("closed_form", 100)}
    sampler = few.get(method, Sampler("one_step", 1))  # what costs nothing on 5,000 users
    assert engine.generation_config == sampler.generation_config(checkpoint.generation_config, engine.config)
