"""The cases: every subject runs end to end at a tiny size, and each check tells right from wrong."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bench_score_topk, bench_topk_lists, bench_yoochoose, graphs, peak, retrieval
from bench.bench_adrec import adrec_case, adrec_config, loop_of_compiled_steps, sampler
from bench.bench_adrec_generate import adrec_generate_case
from bench.bench_cddrec import cddrec_case
from bench.bench_dimerec import dimerec_case
from bench.bench_dreamrec import chain_covariance, dreamrec_case, dreamrec_config, published_dreamrec
from bench.bench_dreamrec_generate import dreamrec_generate_case
from bench.bench_memory import memory_case
from bench.bench_office import office_case
from bench.bench_score_topk import score_topk_case
from bench.bench_tarec import tarec_case
from bench.bench_topk_lists import topk_lists_case
from bench.bench_yoochoose import yoochoose_case
from bench.cases import ON_A_GPU, Absent, Options, Provider, all_cases, ranking_error, relative_error
from bench.harness import Session, check, measure
from bench.inputs import draw_histories, draw_lengths, draw_noise, padded
from bench.ours import our_models
from bench.rows import append_rows, label, read_rows
from bench.topk import NO_LISTS, OURS, SCANS, Answer
from bench.weights import random_weights
from fastdiff.config import ADRecConfig
from fastdiff.ops.score_topk import SCAN_DTYPES
from fastdiff.schedule import ScheduleConfig

TINY = {
    "adrec": partial(adrec_case, lengths="beauty", num_train_timesteps=4, hidden_size=16, n_items=30, max_seq_len=9),
    "adrec_generate": partial(adrec_generate_case, num_train_timesteps=4, hidden_size=16, n_items=400, max_seq_len=9),
    "cddrec": partial(cddrec_case, hidden_size=16, n_items=60),
    "dimerec": partial(dimerec_case, num_train_timesteps=5, hidden_size=8, n_items=30),
    "dreamrec": partial(dreamrec_case, num_train_timesteps=6, hidden_size=8, n_items=30),
    "dreamrec_generate": partial(dreamrec_generate_case, num_train_timesteps=6, hidden_size=8, n_items=30),
    "memory": partial(memory_case, 300, 7, dim=8),
    "office": partial(office_case, "tarec"),
    "score_topk": partial(score_topk_case, 200, 7, dim=8),
    "tarec": partial(tarec_case, num_train_timesteps=9, hidden_size=8, n_items=30),
    "topk_lists": partial(topk_lists_case, "denied", 2000, 7, dim=8),
    "yoochoose": lambda batch: yoochoose_case(batch, num_train_timesteps=6, n_items=9514, hidden_size=8),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_tiny_case_end_to_end(name: str, batch: int, session: Session, tmp_path: Path) -> None:
    case = TINY[name](batch=batch)
    rows = measure(case, session)
    labels = {label(row) for row in rows}

    assert labels | session.absent == set(case.labels(session.options)), "a case knows its providers without building"
    assert {row["status"] for row in rows} == {"ok"}
    assert all(0 < row["p10_s"] <= row["median_s"] <= row["p90_s"] for row in rows)
    append_rows(rows, tmp_path / "cpu.jsonl")
    append_rows(rows[:1], tmp_path / "cpu.jsonl")
    kept = read_rows(tmp_path / "cpu.jsonl")
    assert kept == json.loads(json.dumps([*rows, rows[0]]))


def test_every_subject_has_a_tiny_case() -> None:
    on_cpu, on_gpu = all_cases(), all_cases(torch.device("cuda"))
    assert {case.name for case in [*on_cpu, *on_gpu]} == set(TINY)
    for cases in (on_cpu, on_gpu):
        ids = [case.id for case in cases]
        assert len(set(ids)) == len(ids)


def test_the_targets_of_a_gpu_are_all_cases() -> None:
    """The sizes that have targets."""
    ids = {case.id for case in all_cases(torch.device("cuda"))}
    sizes = [(n, dim, batch) for n in (10**6, 10**7) for dim in (64, 128) for batch in (1, 32, 1024, 8192)]
    assert {f"score_topk/items={n}/dim={dim}/k=100/batch={batch}" for n, dim, batch in sizes} <= ids
    assert {f"{name}/batch={batch}" for name in ("adrec/lengths=full", "adrec_generate") for batch in (1, 1024)} <= ids
    assert {f"dreamrec/denoiser={kind}/batch={batch}" for kind in ("mlp1", "mlp2") for batch in (1, 1024)} <= ids


def test_drawn_histories() -> None:
    config = ADRecConfig(n_items=40, hidden_size=4, max_seq_len=50, schedule=ScheduleConfig("trunc_lin", 32))
    lengths = draw_lengths(20_000, "beauty", 50, torch.Generator().manual_seed(0))
    assert int(lengths.min()) == 3
    assert abs(float(lengths.float().mean()) - 7.0) < 0.2
    histories = draw_histories(config, 30, "beauty")
    as_loaded = padded(histories, config)
    assert as_loaded.shape == (30, 50)
    assert torch.equal((as_loaded != config.pad_id).sum(1), histories.lengths)
    for row, items, length in zip(as_loaded, histories.items, histories.lengths.tolist(), strict=True):
        assert torch.equal(row[50 - length :], items[:length])


# --- the checks -------------------------------------------------------------------------------------------------------


def test_ranking_error() -> None:
    scores = torch.tensor([[4.0, 3.0, 3.0, 1.0]], dtype=torch.float64)
    assert ranking_error(torch.tensor([[0, 2]]), scores) == 0.0, "a tie may go either way"
    assert ranking_error(torch.tensor([[0, 3]]), scores) == 0.5
    assert ranking_error(torch.tensor([[2, 2]]), scores) == float("inf"), "no item twice"
    assert ranking_error(torch.tensor([[0, -1]]), scores) == float("inf")


def test_the_probed_covariance_is_that_of_draws() -> None:
    config = dreamrec_config(num_train_timesteps=12, hidden_size=4, n_items=5)
    model, diffusion = published_dreamrec(config, random_weights(config), torch.device("cpu"))
    with torch.no_grad():
        covariance = chain_covariance(diffusion, model.double())
        x_0 = diffusion.sample(model.forward, model.forward_uncon, torch.zeros(40_000, 4, dtype=torch.float64))
    assert relative_error(torch.cov(x_0.T), covariance) < 0.05  # some five standard errors of 40,000 draws


def test_rows_that_may_not_be_returned_are_an_error() -> None:
    scores = torch.tensor([[4.0, -torch.inf, 3.0, 1.0]], dtype=torch.float64)
    assert ranking_error(torch.tensor([[0, 2]]), scores) == 0.0
    assert ranking_error(torch.tensor([[0, 1]]), scores) == float("inf")


def test_the_answer_of_a_ranking_tells_who_keeps_which_promise() -> None:
    """Two rows whose scores differ by less than float32 rounding, and one that is a bfloat16 rounding worse."""
    table = torch.tensor([[1.0, 0.0], [1.0, 1e-9], [0.995, 0.0], [0.0, 1.0]])
    answer = Answer(torch.tensor([[1.0, 1.0]]), table, 2)
    assert answer.rows.tolist() == [[0, 1]], "equal once they are rounded to float32: the lower row is first"

    def rows(*given: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([given]), torch.zeros(1, 2)

    assert [gate(rows(0, 1)).passed for gate in (answer.same, answer.close, answer.rounded)] == [True] * 3
    assert [gate(rows(1, 0)).passed for gate in (answer.same, answer.close, answer.rounded)] == [False, True, True]
    assert [gate(rows(0, 2)).passed for gate in (answer.same, answer.close, answer.rounded)] == [False, False, True]
    assert not answer.rounded(rows(0, 0)).passed


@pytest.mark.parametrize("kind", bench_topk_lists.KINDS)
def test_every_kind_of_lists(kind: str, session: Session) -> None:
    rows = measure(topk_lists_case(kind, 2000, 7, batch=3, dim=8), session)
    assert {row["status"] for row in rows} == {"ok"}
    asides = {row["provider"] for row in rows if row["aside"]}
    assert asides == ({name + NO_LISTS for name in OURS} if kind == "denied" else set())


def test_the_lists_of_denied_items_matter() -> None:
    table, query = torch.randn(2000, 8), torch.randn(3, 8)
    lists = bench_topk_lists.denied_lists(query, table)
    assert lists.forbidden.sum(1).tolist() == [200] * 3
    with_lists, without = Answer(query, table, 20, lists.forbidden), Answer(query, table, 20)
    assert bool((with_lists.rows != without.rows).any(dim=1).all()), "some of each user's best are denied"
    assert not with_lists.close((without.rows, without.rows)).passed


def test_every_scan_dtype_is_measured() -> None:
    assert set(SCAN_DTYPES) == set(SCANS.values())


def test_the_compiled_loop_of_adrec_is_the_loop() -> None:
    """Its function is checked here without compiling, which takes minutes: `static_compile` is the only other part."""
    config = adrec_config(num_train_timesteps=4, hidden_size=16, n_items=30, max_seq_len=9)
    weights, histories, noise = random_weights(config), draw_histories(config, 3, "beauty"), draw_noise(5, 3, 16)
    model = our_models(config, weights, torch.device("cpu"))["torch"]
    expected = sampler(model, histories, noise)()
    model.bound["denoise_attention_loop"] = loop_of_compiled_steps(lambda function: function)
    assert relative_error(sampler(model, histories, noise)(), expected) < 1e-6


def test_memory_sees_what_a_call_allocates() -> None:
    if peak.why_not() is not None:
        pytest.skip(peak.why_not())
    held = torch.ones(1 << 22)
    large = peak.peak_of(lambda: (held + 1.0).sum())
    small = peak.peak_of(lambda: held.sum())
    assert large.peak_bytes > 0.9 * 4 * (1 << 22), "the sum of two tensors is a third one of 16 MiB"
    assert small.peak_bytes < 4 << 20


def test_yoochoose_without_the_data_has_its_statistics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTDIFF_MATERIAL", str(tmp_path))
    bench_yoochoose.histories.cache_clear()
    try:
        states, lengths = bench_yoochoose.histories(20_000, 9_514)
        case = yoochoose_case(20_000)
    finally:
        bench_yoochoose.histories.cache_clear()
    held = (states != 9_514).sum(1)
    assert torch.equal(held.clamp(min=1), lengths)
    assert abs(float((held == 0).double().mean()) - 0.2325) < 0.02
    assert abs(float(held.double().mean()) - 2.05) < 0.1
    assert case.params["data"] == "like YooChoose"


def test_the_published_algorithm_over_a_whole_test_set_is_checked_too() -> None:
    case = yoochoose_case(70, num_train_timesteps=6, hidden_size=8)
    (published,) = [one for one in case.build(Options(full=True)) if one.name == "published"]
    assert isinstance(published, Provider)
    checked = check(published, Options(full=True))
    assert checked.gate.passed
    assert checked.timing is not None


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
def test_options_decide_who_takes_part() -> None:
    case = score_topk_case(200, 7, 1, dim=8)
    only = Options(only=frozenset({"faiss"}))
    assert {one.name for one in case.build(only) if isinstance(one, Provider) and only.wants(one.name)} == {"faiss"}


def test_a_lean_rival_of_tarec_agrees_with_the_published_one() -> None:
    (lean,) = [one for one in tarec_case(5, hidden_size=8, n_items=30).build(Options()) if one.name == "eager"]
    assert isinstance(lean, Provider)
    assert check(lean, Options()).gate.passed


# --- what takes part on a GPU only, its parts on the CPU -------------------------------------------------------------


@pytest.mark.parametrize("items", [200, 5000, 128 * 40])
def test_selections_by_tiles_are_exact_or_as_exact_as_8_bits(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, table = draw_noise(9, 16, seed=4), draw_noise(items, 16, seed=3)
    answer = Answer(query, table, 7)
    for at_once in (9, 4):
        monkeypatch.setattr(bench_score_topk, "users_at_once", lambda *_, at_once=at_once: at_once)
        rivals = list(bench_score_topk.other_selections(query, table, 7, answer, 1.0))
        assert [check(rival, Options()).gate.passed for rival in rivals] == [True] * 3
        assert {rival.name for rival in rivals} < ON_A_GPU


def test_the_scores_that_rivals_hold_are_bounded() -> None:
    gpu = torch.device("cuda")
    for n_users, n_items, itemsize in ((1, 10**7, 4), (8192, 10**7, 4), (8192, 10**6, 2), (1024, 10**6, 4)):
        at_once = retrieval.users_at_once(n_users, n_items, itemsize, gpu)
        assert 1 <= at_once <= n_users
        assert at_once * n_items * itemsize <= retrieval.SCORES_AT_ONCE
    assert retrieval.users_at_once(256, 10**7, 4, torch.device("cpu")) == 256


def test_the_captured_loop_of_adrec_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played without a graph: its function is called on the inputs that would be copied."""

    class Played:
        def __init__(self, function: Any, *inputs: Tensor) -> None:
            self.function = function

        def __call__(self, *inputs: Tensor) -> Any:
            return self.function(*inputs)

    monkeypatch.setattr(graphs, "Replayed", Played)
    config = adrec_config(num_train_timesteps=4, hidden_size=16, n_items=30, max_seq_len=9)
    model = our_models(config, random_weights(config), torch.device("cpu"))["torch"]
    histories = draw_histories(config, 3, "beauty")
    draws = [draw_noise(5, 3, 16, seed=seed) for seed in (1, 2)]
    expected = [sampler(model, histories, noise)() for noise in draws]
    model.bound["denoise_attention_loop"] = graphs.loop_in_a_graph()
    for noise, truth in zip(draws, expected, strict=True):
        assert relative_error(sampler(model, histories, noise)(), truth) < 1e-6


def test_what_cannot_be_captured_is_absent_and_says_why() -> None:
    def make() -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    (one,) = graphs.graphed_only(make, lambda _: None, Options(torch.device("cuda")))
    assert one == Absent(
        "fastdiff-graphed", "it cannot be captured: RuntimeError: operation not permitted when stream is capturing"
    )
    assert not list(graphs.graphed_only(make, lambda _: None, Options()))
