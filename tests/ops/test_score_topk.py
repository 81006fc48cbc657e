"""score_topk against its definition, written out literally, on every backend and along every path."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops import score_topk as module
from fastdiff.ops import topk_definition, topk_scan
from fastdiff.ops.cpu import library
from fastdiff.ops.score_topk import ScanTable, UserLists, merge_topk, score_topk, topk_of_rows
from fastdiff.ops.topk_definition import exact_scores, from_keys, topk_by_definition
from tests.devices import GPU, TRITON_DEVICE
from tests.syncs import no_syncs

DEVICES = ["cpu", "cuda"] if GPU else ["cpu"]
BACKENDS = [(backend, device) for device in DEVICES for backend in score_topk.available(device)]
SCANS = list(topk_scan.SCAN_DTYPES)
INTERPRETED = ("triton", "cpu")
"""Where a call takes up to a second per query: these tests ask less often, never for less."""

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


def definition(
    query: Tensor,
    item_emb: Tensor,
    k: int,
    allowed: Tensor | None = None,
    exclude: list[list[int]] | None = None,
    candidates: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract, word by word: sequential float64 sums, one rounding, (score desc, row asc)."""
    q, e = query.double().numpy(), item_emb.double().numpy()
    rows = np.full((len(q), k), -1)
    scores = np.full((len(q), k), -np.inf, dtype=np.float32)
    for user in range(len(q)):
        total = np.zeros(len(e))
        for i in range(e.shape[1]):
            total = total + q[user, i] * e[:, i]
        score = total.astype(np.float32) + np.float32(0)
        may = np.ones(len(e), dtype=bool) if allowed is None else allowed.numpy().copy()
        if candidates is not None:
            may &= np.isin(np.arange(len(e)), candidates[user])
        if exclude is not None:
            may[exclude[user]] = False
        order = np.lexsort((np.arange(len(e)), -score))
        order = order[may[order]][:k]
        rows[user, : len(order)], scores[user, : len(order)] = order, score[order]
    return torch.from_numpy(rows), torch.from_numpy(scores)


def assert_same(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    rows, scores = (tensor.cpu() for tensor in found)
    assert rows.dtype == torch.int64
    assert scores.dtype == torch.float32
    assert rows.is_contiguous()
    assert scores.is_contiguous()
    assert rows.tolist() == truth[0].tolist()
    # bit for bit, the sign of zero included
    assert torch.equal(scores.view(torch.int32), truth[1].view(torch.int32))


# --- inputs -----------------------------------------------------------------------------------------------------------


def gaussian(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(users, dim), torch.randn(items, dim)


def clustered(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    centres = torch.randn(7, dim)
    item_emb = centres[torch.arange(items) % 7] + 1e-3 * torch.randn(items, dim)
    return centres[torch.arange(users) % 7] + 0.1 * torch.randn(users, dim), item_emb


def skewed_norms(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    norms = torch.logspace(-6, 6, items)[torch.randperm(items)]
    return torch.randn(users, dim), torch.randn(items, dim) * norms[:, None]


def duplicated_rows(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(users, dim), torch.randn(11, dim)[torch.randint(0, 11, (items,))]


def ties_below_bfloat16(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(users, dim), torch.randn(dim) + 1e-4 * torch.randn(items, dim)


def ties_below_float32(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    """Terms that cancel but for less than a float32 sum can see."""
    item_emb = torch.randn(items, dim)
    item_emb[:, 1] = -item_emb[:, 0] * (1.0 + 1e-7 * torch.randint(0, 3, (items,)))
    item_emb[:, 2:] *= 1e-8
    return torch.ones(users, dim), item_emb * 1e3


def zeros(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    item_emb = torch.randn(items, dim)
    item_emb[torch.rand(items) < 0.7] = 0.0
    query = torch.randn(users, dim)
    query[0] = 0.0
    return query, -item_emb.abs() * query[-1].sign()  # nothing scores above zero for the last user


def subnormals(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(users, dim), torch.randn(items, dim) * 1e-40


def tiny_products(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(users, dim) * 1e-21, torch.randn(items, dim) * 1e-21


def vanishing(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    """Scores too small for float32, of both signs: zeros that tie."""
    return torch.randn(users, dim) * 1e-30, torch.randn(items, dim) * 1e-30


def huge(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    """Many scores beyond float32: infinities that tie."""
    return torch.randn(users, dim) * 1e20, torch.randn(items, dim) * 1e18


def beyond_float16(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    """Numbers that float16 has none for without a scale, far above and far below, in blocks of their own and mixed."""
    scale = torch.tensor([1e-30, 1e-7, 1.0, 1e6, 1e30])[torch.arange(items) // 64 % 5]
    item_emb = torch.randn(items, dim) * scale[:, None]
    item_emb[::7] *= torch.logspace(-12, 0, dim)
    query = torch.randn(users, dim) * 1e-20
    query[0] *= torch.logspace(0, 24, dim)
    return query, item_emb


def one_huge_row(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    query, item_emb = gaussian(users, items, dim)
    item_emb[items // 2] *= 1e9
    return query, item_emb


Make = Callable[[int, int, int], tuple[Tensor, Tensor]]
INPUTS: list[Make] = [
    gaussian,
    clustered,
    skewed_norms,
    duplicated_rows,
    ties_below_bfloat16,
    ties_below_float32,
    zeros,
    subnormals,
    tiny_products,
    vanishing,
    huge,
    beyond_float16,
    one_huge_row,
]


def scan_of(item_emb: Tensor, dtype: torch.dtype) -> ScanTable:
    return ScanTable.build(item_emb, dtype)


def force_chunks(monkeypatch: pytest.MonkeyPatch, budget: int = 1 << 10) -> None:
    """Even a small table is scanned in several chunks, as a large one is."""
    monkeypatch.setattr(topk_scan, "AT_ONCE", -1)
    for place in (module, topk_scan, topk_definition):
        monkeypatch.setattr(place, "budget", lambda device: budget)


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_dtype", SCANS, ids=str)
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_equals_the_definition(backend: str, device: str, make: Make, scan_dtype: torch.dtype) -> None:
    op = score_topk.bind(backend, device)
    interpreted = (backend, device) == INTERPRETED
    for users, items, dim in ((1, 1, 1), (3, 101, 7), (2, 4099, 33)):
        query, item_emb = make(users, items, dim) if dim > 2 else gaussian(users, items, dim)
        scan = scan_of(item_emb.to(device), scan_dtype)
        for k in (1, 7, items, items + 3) if not interpreted else (7,) if items > 101 else (items + 3,):
            found = op(query.to(device), item_emb.to(device), k, scan=scan)
            assert_same(found, definition(query, item_emb, k))


@pytest.mark.parametrize("scan_dtype", SCANS, ids=str)
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_equals_the_definition_over_many_chunks(
    backend: str, device: str, make: Make, scan_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_chunks(monkeypatch)
    monkeypatch.setattr(topk_scan, "CHUNK", 4096)
    if backend == "cpu":
        monkeypatch.undo()  # its chunks are of one size
    interpreted = (backend, device) == INTERPRETED
    query, item_emb = make(2 if interpreted else 5, 9001, 16)
    scan = scan_of(item_emb.to(device), scan_dtype)
    op = score_topk.bind(backend, device)
    for k in (50,) if interpreted else (1, 50, 2000):
        assert_same(op(query.to(device), item_emb.to(device), k, scan=scan), definition(query, item_emb, k))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_real_size(backend: str, device: str) -> None:
    query, item_emb = gaussian(4 if (backend, device) == INTERPRETED else 32, 12_101, 64)
    found = score_topk.bind(backend, device)(query.to(device), item_emb.to(device), 20)
    assert_same(found, definition(query, item_emb, 20))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_equal_scores_go_to_the_lower_row(backend: str, device: str) -> None:
    item_emb = torch.ones(5000, 4, device=device)
    users = 3 if (backend, device) == INTERPRETED else 40
    rows, _ = score_topk.bind(backend, device)(torch.ones(users, 4, device=device), item_emb, 13)
    assert rows.tolist() == [list(range(13))] * users


def test_the_sum_goes_in_index_order() -> None:
    query, item_emb = torch.ones(1, 4), torch.tensor([[1.0, 1e30, -1e30, 1.0], [1e30, -1e30, 1.0, 1.0]])
    assert exact_scores(query, item_emb).tolist() == [1.0, 2.0]


# --- restrictions -----------------------------------------------------------------------------------------------------


def random_lists(users: int, items: int, longest: int) -> list[list[int]]:
    lists = [torch.randint(0, items, (int(n),)).tolist() for n in torch.randint(0, longest, (users,))]
    lists[0] = []
    return lists


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("allowed_share", [None, 0.9, 0.05, 0.0])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_restrictions(
    backend: str, device: str, allowed_share: float | None, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        if backend == "triton":
            pytest.skip("its kernels have no such chunks")
        force_chunks(monkeypatch)
    users, items = 3 if (backend, device) == INTERPRETED else 6, 5003
    query, item_emb = gaussian(users, items, 8)
    allowed = None if allowed_share is None else torch.rand(items) < allowed_share
    op = score_topk.bind(backend, device)
    everything = list(range(items))
    excludes = [
        None,
        random_lists(users, items, 300),
        [everything] * users,
        [everything[5:], [], *[everything] * (users - 2)],
    ]
    candidates = [
        None,
        random_lists(users, items, 300),
        [[]] * users,
        [[7, 7, 3], *random_lists(users - 1, items, 4000)],
    ]
    for exclude in excludes:
        for candidate in candidates:
            lists = (
                None if given is None else UserLists.from_lists(given).to(device) for given in (exclude, candidate)
            )
            moved = None if allowed is None else allowed.to(device)
            found = op(query.to(device), item_emb.to(device), 30, moved, *lists)
            assert_same(found, definition(query, item_emb, 30, allowed, exclude, candidate))


@pytest.mark.parametrize("scan_dtype", SCANS, ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_denied_items_that_a_scan_meets_at_the_worst_places(backend: str, device: str, scan_dtype: torch.dtype) -> None:
    """The best, the best in no order and more than once, all of the blocks that a sample reads, whole blocks, all."""
    items = 40_000
    query, item_emb = gaussian(6, items, 16)
    best = (query @ item_emb.T).argsort(dim=1, descending=True)
    row = torch.arange(items)
    denied = [
        best[0, :1000],
        best[1, :500].repeat(3)[torch.randperm(1500)],
        row[row // 64 % 32 == 0],
        row[row // 64 % 3 != 1],
        torch.cat([best[4, :1], best[4, 8:]]),
        row,
    ]
    exclude = [rows.tolist() for rows in denied]
    lists, scan = UserLists.from_lists(exclude).to(device), scan_of(item_emb.to(device), scan_dtype)
    op = score_topk.bind(backend, device)
    found = op(query.to(device), item_emb.to(device), 20, None, lists, scan=scan)
    assert_same(found, definition(query, item_emb, 20, None, exclude))


@given(data=st.data())
def test_any_restriction_on_few_values(data: st.DataObject) -> None:
    """Small whole numbers, so that most scores tie."""
    users, items, dim = (data.draw(st.integers(1, most)) for most in (4, 40, 3))
    k = data.draw(st.integers(1, items + 2))
    vectors = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    query = torch.tensor(data.draw(st.lists(vectors, min_size=users, max_size=users))).float()
    item_emb = torch.tensor(data.draw(st.lists(vectors, min_size=items, max_size=items))).float()
    rows = st.lists(st.integers(0, items - 1), max_size=items)
    lists = st.none() | st.lists(rows, min_size=users, max_size=users)
    exclude, candidates = data.draw(lists), data.draw(lists)
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=items, max_size=items))
    allowed = None if mask is None else torch.tensor(mask)
    given_lists = [None if given is None else UserLists.from_lists(given) for given in (exclude, candidates)]
    truth = definition(query, item_emb, k, allowed, exclude, candidates)
    for backend, device in BACKENDS:
        moved = [None if part is None else part.to(device) for part in (allowed, *given_lists)]
        assert_same(score_topk.bind(backend, device)(query.to(device), item_emb.to(device), k, *moved), truth)


# --- nothing else matters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_batches_chunks_and_shards_give_the_same_bits(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted = (backend, device) == INTERPRETED
    query, item_emb = (tensor.to(device) for tensor in clustered(5 if interpreted else 9, 6007, 24))
    op = score_topk.bind(backend, device)
    whole = op(query, item_emb, 25)
    for size in (1, 4):
        parts = [op(part, item_emb, 25) for part in query.split(size)]
        assert_same(tuple(torch.cat(column) for column in zip(*parts, strict=True)), whole)
    for edges in ([0, 3000, 6007], [0, 1, 17, 4500, 6007]):
        parts = []
        for lo, hi in pairwise(edges):
            rows, scores = op(query, item_emb[lo:hi], 25)
            parts.append((torch.where(rows >= 0, rows + lo, -1), scores))
        assert_same(merge_topk(*(torch.cat(column, 1) for column in zip(*parts, strict=True)), 25), whole)
    for budget in () if interpreted else (64, 1 << 12, 1 << 16):
        force_chunks(monkeypatch, budget)
        assert_same(op(query, item_emb, 25), whole)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_layouts(backend: str, device: str) -> None:
    query, item_emb = (tensor.to(device) for tensor in gaussian(4, 3001, 12))
    op = score_topk.bind(backend, device)
    truth = op(query, item_emb, 9)
    wide = torch.randn(3001, 40, device=device)
    wide[:, 5:17] = item_emb
    every_second = torch.randn(8, 12, device=device)
    every_second[::2] = query
    for layout in (item_emb.T.contiguous().T, wide[:, 5:17]):
        assert_same(op(every_second[::2], layout, 9), truth)
        assert_same(op(query.T.contiguous().T, layout, 9), truth)
        assert_same(op(query, layout, 9, scan=scan_of(layout, torch.bfloat16)), truth)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_unwritten_memory_is_not_read(
    backend: str, device: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        if backend == "triton":
            pytest.skip("its kernels have no such chunks")
        force_chunks(monkeypatch)
    query, item_emb = gaussian(3, 4999, 5)
    for dtype in SCANS:
        scan = scan_of(item_emb.to(device), dtype)
        found = score_topk.bind(backend, device)(query.to(device), item_emb.to(device), 11, scan=scan)
        assert_same(found, definition(query, item_emb, 11))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("make", [gaussian, clustered])
def test_reduced_matmul_precision_changes_nothing(precision: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may be told to round the inputs of float32 products to tf32 or bfloat16."""
    query, item_emb = make(8, 9001, 32)
    truth = definition(query, item_emb, 10)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_same(module.score_topk_ref(query, item_emb, 10), truth)
        force_chunks(monkeypatch)
        assert_same(module.score_topk_ref(query, item_emb, 10), truth)
    finally:
        torch.set_float32_matmul_precision(before)


def test_reduced_matmul_precision_widens_the_bound() -> None:
    scan, before = ScanTable.build(torch.randn(3, 32)), torch.get_float32_matmul_precision()
    looseness = []
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            looseness.append(scan.looseness(32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert looseness[0] == 1.0
    assert looseness[0] < looseness[1] < looseness[2]


def test_items_in_another_order_are_the_same_items() -> None:
    query, item_emb = gaussian(4, 3001, 12)
    order = torch.randperm(3001)
    rows, scores = module.score_topk_ref(query, item_emb, 30)
    moved_rows, moved_scores = module.score_topk_ref(query, item_emb[order], 30)
    assert torch.equal(order[moved_rows], rows)
    assert torch.equal(moved_scores, scores)


# --- the scan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_dtype", SCANS, ids=str)
@pytest.mark.parametrize("make", [make for make in INPUTS if make is not huge])
def test_the_bound_holds(make: Make, scan_dtype: torch.dtype) -> None:
    query, item_emb = make(16, 2003, 48)
    scan = scan_of(item_emb, scan_dtype)
    error = (scan.scanned(query, 0, 2003).double() - exact_scores(query[:, None], item_emb).double()).abs()
    factor, tiny = scan.slack(query)
    assert bool((error <= factor[:, None].double() * scan.coef.double() + tiny[:, None].double()).all())
    worst = scan.worst_slack(float(query.double().norm(dim=1).max()), 48)
    assert float(error.max()) <= worst
    assert worst <= 1.1 * float((factor[:, None] * scan.coef + tiny[:, None]).max())


def test_the_bound_is_not_twice_too_wide_where_every_rounding_is_at_its_worst() -> None:
    """1 + 2^-8 lies between two bfloat16 numbers, and so does 257, the sum of the rounded products."""
    vector = torch.full((1, 257), 1.0 + 2.0**-8 - 2.0**-20)
    scan = scan_of(vector, torch.bfloat16)
    error = abs(float(scan.scanned(vector, 0, 1)) - float(exact_scores(vector, vector)))
    bound = float(scan.slack(vector)[0] * scan.coef)
    assert 0.9 * bound < error <= bound


def test_users_of_whom_too_many_rows_tie_are_scored_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    query, item_emb = gaussian(6, 40_000, 8)
    item_emb[:, 0] -= 9.0
    item_emb[1000:30_000] = 0.0
    query[:, 0] = torch.tensor([0.0, 9.0, 0.0, 9.0, 9.0, -1.0]) * 1e3  # for three users the zeros are the best
    truth = definition(query, item_emb, 10)
    slow: list[int] = []
    real = module.topk_by_definition

    def counting(query: Tensor, *rest: object) -> Tensor:
        slow.append(len(query))
        return real(query, *rest)

    monkeypatch.setattr(module, "topk_by_definition", counting)
    assert_same(module.score_topk_ref(query, item_emb, 10), truth)
    assert slow == [3]


def test_few_rows_are_scored_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ordinary vectors the scan leaves hardly more than k rows, and no user to the slow path."""
    query, item_emb = gaussian(8, 50_000, 32)
    scored: list[int] = []
    monkeypatch.setattr(topk_scan, "AT_ONCE", -1)
    real = module.pair_scores

    def counting(query: Tensor, item_emb: Tensor, users: Tensor, rows: Tensor) -> Tensor:
        scored.append(users.numel())
        return real(query, item_emb, users, rows)

    monkeypatch.setattr(module, "pair_scores", counting)
    monkeypatch.setattr(module, "topk_by_definition", None)
    module.score_topk_ref(query, item_emb, 20)
    module.score_topk_ref(query, item_emb, 20, scan=scan_of(item_emb, torch.bfloat16))
    assert scored[0] <= 8 * 22
    assert scored[1] <= 8 * 60


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of the scan holds a score per item and user."""
    sizes: list[int] = []
    real = ScanTable.scanned

    def watching(scan: ScanTable, query: Tensor, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        sizes.append(query.shape[0] * (hi - lo))
        return real(scan, query, lo, hi, out)

    monkeypatch.setattr(ScanTable, "scanned", watching)
    query, item_emb = gaussian(600, 60_000, 4)
    module.score_topk_ref(query, item_emb, 10)
    assert 4 * max(sizes) <= 16 << 20
    assert sum(sizes) == 600 * 60_000


def test_scan_dtypes() -> None:
    for dtype in (torch.int16, torch.float64):
        with pytest.raises(
            InvalidArgument, match=r"scan_dtype: must be None or one of torch.float32, .* \(got torch.(int16|float64)\)"
        ):
            ScanTable.build(torch.randn(3, 2), dtype)
    item_emb = torch.randn(3, 2)
    assert ScanTable.build(item_emb).chunks == (item_emb,)


# --- the C++ engine ---------------------------------------------------------------------------------------------------

needs_cpu = pytest.mark.skipif("cpu" not in score_topk.available("cpu"), reason="the C++ ops are not built")


@needs_cpu
@pytest.mark.parametrize("scan_dtype", SCANS, ids=str)
def test_threads_change_nothing(scan_dtype: torch.dtype) -> None:
    query, item_emb = gaussian(70, 40_000, 24)
    item_emb[20_000:20_500] = item_emb[:500]
    scan = scan_of(item_emb, scan_dtype)
    op = score_topk.bind("cpu", "cpu")
    truth = module.score_topk_ref(query, item_emb, 60)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert_same(op(query, item_emb, 60, scan=scan), truth)
    assert_same(op(query, item_emb, 60), truth)
    assert_same(op(query, item_emb, 60, scan=ScanTable.build(item_emb, None)), truth)


@needs_cpu
def test_a_sample_that_misleads_costs_only_time() -> None:
    """The sample is one block of 32; here it holds all the best rows, so it promises more than the table keeps."""
    query, item_emb = torch.rand(3, 8) + 0.1, torch.rand(40_000, 8)
    sampled = torch.arange(40_000) // 64 % 32 == 0
    item_emb[sampled] += 5.0
    item_emb[sampled.nonzero()[60:, 0]] -= 5.0
    op = score_topk.bind("cpu", "cpu")
    for dtype in SCANS:
        found = op(query, item_emb, 100, scan=scan_of(item_emb, dtype))
        assert_same(found, module.score_topk_ref(query, item_emb, 100))


@pytest.mark.parametrize("scan_dtype", SCANS, ids=str)
def test_tables_grow_and_change_like_tables_built_at_once(
    scan_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk_scan, "CHUNK", 256)
    item_emb = torch.randn(1000, 8)
    scan = before = scan_of(item_emb[:300], scan_dtype)
    old = [chunk.clone() for chunk in scan.chunks]
    for n in (301, 512, 513, 1000):
        scan = scan.append(item_emb[:n])
        assert scan.n_rows == n
    item_emb = item_emb.clone()
    at = torch.tensor([3, 400, 999, 401])
    item_emb[at] = 7.0 * torch.randn(4, 8)
    grown, scan = scan, scan.replace(at, item_emb)
    whole = scan_of(item_emb, scan_dtype)
    assert torch.equal(scan.bounds, whole.bounds)
    assert len(scan.chunks) == len(whole.chunks)
    for chunk, other in zip(scan.chunks, whole.chunks, strict=True):
        assert torch.equal(chunk, other)
    assert all(torch.equal(chunk, kept) for chunk, kept in zip(before.chunks, old, strict=True))
    if scan_dtype != torch.float32:
        assert scan.chunks[2] is grown.chunks[2]  # rows 512 .. 767, which no change touched
        assert scan.chunks[0] is not grown.chunks[0]
    front = scan[:500]
    assert front.n_rows == 500
    assert torch.equal(front.bounds, whole.bounds[:8])


@pytest.mark.skipif(library.why_not() is not None, reason="the C++ ops are not built")
def test_the_copy_of_a_table_without_a_dtype_grows_and_changes_with_it() -> None:
    table = torch.randn(700, 8)
    scan = ScanTable.build(table[:500], None)
    assert scan.choice is None
    assert scan[:70].choice is torch.float32
    scan.to_scan(table[:500])
    changed = table.clone()
    changed[[3, 400, 650]] *= 2.0
    grown = scan.append(table)
    replaced = grown.replace(torch.tensor([3, 400, 650]), changed)
    for of, made in ((table[:500], scan), (table, grown), (changed, replaced), (changed[:150], replaced[:150])):
        assert made.choice is None
        assert "_int8" in made.__dict__
        copy, fresh = made.to_scan(of), ScanTable.build(of, torch.int8)
        assert torch.equal(torch.cat(copy.chunks)[: len(of)], torch.cat(fresh.chunks))
        assert torch.equal(copy.bounds[: len(of) // 64], fresh.bounds[: len(of) // 64])
    assert replaced.replace(torch.tensor([], dtype=torch.int64), changed).to_scan(changed) is replaced.to_scan(changed)


@pytest.mark.parametrize("scan_dtype", SCANS, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 32, 64, 100, 128])
@pytest.mark.parametrize("n_rows", [257, 1000, 12101])
def test_few_queries_of_a_small_table(scan_dtype: torch.dtype, dim: int, n_rows: int) -> None:
    item_emb, query = torch.randn(n_rows, dim), torch.randn(3, dim)
    item_emb[50:90] = item_emb[7]  # ties
    allowed = torch.rand(n_rows) < 0.9
    denied = UserLists.from_lists([[], range(100), item_emb[:200].mv(query[2]).topk(40).indices])
    for backend, device in BACKENDS:
        interpreted = (backend, device) == INTERPRETED
        if interpreted and (dim not in (7, 100) or n_rows == 1000):
            continue
        op, there = score_topk.bind(backend, device), [part.to(device) for part in (query, item_emb, allowed, denied)]
        scan = scan_of(there[1], scan_dtype)
        for k in (20,) if interpreted else (1, 20, n_rows // 8):
            for allow, deny in ((False, False), (True, False), (False, True), (True, True)):
                want = from_keys(
                    topk_by_definition(query, item_emb, k, allowed if allow else None, denied if deny else None)
                )
                masks = (there[2] if allow else None, there[3] if deny else None)
                found = op(*there[:2], k, *masks, None, scan)
                assert_same(found, want)
                if not deny:
                    alone = op(there[0][:1], there[1], k, masks[0], None, None, scan)
                    assert_same(alone, tuple(part[:1].cpu() for part in found))


def test_tables_packed_in_cpp_and_in_torch_agree() -> None:
    item_emb = torch.randn(333, 20) * torch.logspace(-3, 3, 333)[:, None]
    for dtype in SCANS:
        rows, bounds = topk_scan._pack_in_torch(item_emb, dtype)
        table = scan_of(item_emb, dtype)
        torch.testing.assert_close(table.bounds, bounds, rtol=1e-5, atol=1e-30)
        if dtype == torch.int8:
            assert int((table.chunks[0].int() - rows.int()).abs().max()) <= 1
        elif dtype != torch.float32:
            assert torch.equal(table.chunks[0], rows)


@needs_cpu
def test_an_uncertified_scan_orders_what_it_finds_by_the_definition() -> None:
    query, item_emb = gaussian(20, 30_000, 32)
    truth = module.score_topk_ref(query, item_emb, 50)
    op = score_topk.bind("cpu", "cpu")
    for dtype in SCANS:
        rows, scores = op(query, item_emb, 50, scan=ScanTable.build(item_emb, dtype, certified=False))
        common = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(rows, truth[0], strict=True)) / 1000
        assert common >= 0.9
        users = torch.arange(20)[:, None].expand_as(rows)
        exact = topk_definition.pair_scores(query, item_emb, users.flatten(), rows.flatten())
        assert torch.equal(exact.view_as(scores), scores)
        assert bool((scores.diff(dim=1) <= 0).all())


@needs_cpu
def test_opcheck() -> None:
    query, item_emb = gaussian(3, 700, 12)
    for layout in (item_emb, item_emb.T.contiguous().T, torch.cat([item_emb, item_emb], 1)[:, :12]):
        scan = scan_of(layout, torch.int8)
        lists = UserLists.from_lists([[1, 2], [], [3]])
        arguments = (query, layout, 5, torch.rand(700) < 0.9, lists.values, lists.offsets, None, None, 2)
        torch.library.opcheck(torch.ops.fastdiff.score_topk.default, (*arguments, list(scan.chunks), scan.bounds, True))
        for stored in (0, 1, 2, 3):
            torch.library.opcheck(torch.ops.fastdiff.topk_pack.default, (layout, stored))
    with pytest.raises(RuntimeError, match="topk_pack: item_emb must be float32"):
        torch.ops.fastdiff.topk_pack.default(item_emb.double(), 0)


# --- the Triton kernels -----------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(
    "triton" not in score_topk.available(TRITON_DEVICE), reason="needs a CUDA device or TRITON_INTERPRET=1"
)


def triton_topk(*arguments: object, **keywords: object) -> tuple[Tensor, Tensor]:
    moved = [argument.to(TRITON_DEVICE) if isinstance(argument, Tensor) else argument for argument in arguments]
    found: tuple[Tensor, Tensor] = score_topk.bind("triton", TRITON_DEVICE)(*moved, **keywords)
    return found


def plan_with(plan: Any, **sizes: Any) -> Any:
    """A plan of other sizes; those of its scans by their names, with one underscore: scan_slots."""
    for name in ("scan", "rescan"):
        inner = {size: sizes.pop(f"{name}_{size}") for size in ("slots",) if f"{name}_{size}" in sizes}
        if inner and getattr(plan, name) is not None:
            sizes[name] = replace(getattr(plan, name), **inner)
    return replace(plan, **sizes)


@pytest.fixture(params=[False, True], ids=["one scan", "two scans"])
def rescanned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tables have a second scan, as large ones do."""
    plans = pytest.importorskip("fastdiff.kernels.score_topk_plan")
    monkeypatch.setattr(plans, "RESCANNED", 1 if request.param else 1 << 40)
    return bool(request.param)


@needs_triton
@pytest.mark.usefixtures("rescanned")
@pytest.mark.parametrize("scan_dtype", SCANS, ids=str)
def test_triton_too_little_room_anywhere(scan_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever overflows, the answer is the same: the query is scanned again, or scored throughout."""
    kernels = pytest.importorskip("fastdiff.kernels.score_topk")
    query, item_emb = gaussian(2, 3001, 12)
    item_emb[2000:2100] = item_emb[:100]
    scan, truth, real = scan_of(item_emb.to(TRITON_DEVICE), scan_dtype), definition(query, item_emb, 9), kernels.plan
    for small in (
        {"scan_slots": 1},
        {"scan_slots": 1, "rescan_slots": 1},
        {"gathered": 12},
        {"opened": 3},
        {"sifted": 2},
        {"keys": 9 + 128 * kernels.score_topk_plan.WIDER},
    ):
        monkeypatch.setattr(kernels, "plan", lambda *sizes, small=small: plan_with(real(*sizes), **small))
        assert_same(triton_topk(query, item_emb, 9, scan=scan), truth)


class Overflows:
    """How many queries the first scan kept too much of, and how many the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernels = pytest.importorskip("fastdiff.kernels.score_topk")
        self.kernel, self.found = kernels._raise_kernel, {False: 0, True: 0}
        monkeypatch.setattr(kernels, "_raise_kernel", self)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.kernel[grid](*arguments, **constants)
            if constants["LAST"]:
                n_listed = arguments[self.kernel.arg_names.index("p_n_listed")]
                self.found[constants["SECOND"]] += int(n_listed[0])

        return launch


def ascending(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    """The best rows last, for the first user."""
    query, item_emb = gaussian(users, items, dim)
    return query, item_emb[(item_emb @ query[0]).argsort()]


def descending(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    query, item_emb = ascending(users, items, dim)
    return query, item_emb.flip(0)


def constant(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(users, dim), torch.ones(items, dim)


def ties_at_the_boundary(users: int, items: int, dim: int) -> tuple[Tensor, Tensor]:
    """A few rows above thousands that are equal, the k-th among them."""
    query, item_emb = torch.rand(users, dim) + 0.1, torch.ones(items, dim)
    item_emb[torch.randperm(items)[:7]] += torch.rand(7, dim)
    item_emb[torch.randperm(items)[: items // 4]] -= 0.5
    return query, item_emb


@needs_triton
@pytest.mark.parametrize("scan_dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("make", "overflowing"),
    [
        (gaussian, [0, 0]),
        (ascending, [None, 0]),  # so few tiles that all of the best rows may be of one
        (descending, [None, 0]),
        (clustered, [2, 0]),
        (ties_below_bfloat16, [2, 0]),
        (constant, [2, 2]),
        (ties_at_the_boundary, [2, 2]),
    ],
)
def test_triton_second_scan(
    make: Make, overflowing: list[int | None], scan_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that lie closer than the first scan tells apart are told apart by the second; only ties are left over."""
    plans = pytest.importorskip("fastdiff.kernels.score_topk_plan")
    monkeypatch.setattr(plans, "RESCANNED", 1)
    overflows = Overflows(monkeypatch)
    query, item_emb = make(2, 15_001, 8)
    scan, truth = scan_of(item_emb.to(TRITON_DEVICE), scan_dtype), definition(query, item_emb, 5)
    assert_same(triton_topk(query, item_emb, 5, scan=scan), truth)
    for second in (False, True):
        assert overflowing[second] in (None, overflows.found[second])


@needs_triton
def test_triton_only_those_that_overflow_are_scanned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them among many queries, with lists and a mask along."""
    plans = pytest.importorskip("fastdiff.kernels.score_topk_plan")
    monkeypatch.setattr(plans, "RESCANNED", 1)
    overflows = Overflows(monkeypatch)
    query, item_emb = gaussian(6, 5001, 8)
    item_emb[:, 0] -= 30.0
    item_emb[500:4500] = 0.0
    item_emb[500:4500, 1] = 3.01 + 1e-4 * torch.randn(4000)
    query[:, :2] = 0.0
    query[3, :2] = 1e3  # to whom these 4,000 rows are the best, by hardly different scores
    allowed, exclude = torch.rand(5001) < 0.9, random_lists(6, 5001, 30)
    lists = UserLists.from_lists(exclude).to(TRITON_DEVICE)
    truth = definition(query, item_emb, 5, allowed, exclude)
    assert_same(triton_topk(query, item_emb, 5, allowed, lists), truth)
    assert overflows.found == {False: 1, True: 0}
    item_emb[500:4500] = item_emb[500]
    truth = definition(query, item_emb, 5, allowed, exclude)
    assert_same(triton_topk(query, item_emb, 5, allowed, lists), truth)
    assert overflows.found == {False: 2, True: 1}


@needs_triton
def test_triton_a_sample_that_misleads_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that the first sample reads hold none of the best rows."""
    kernels = pytest.importorskip("fastdiff.kernels.score_topk")
    monkeypatch.setattr(kernels.score_topk_plan, "RESCANNED", 1)
    overflows = Overflows(monkeypatch)
    query, item_emb = torch.rand(2, 8) + 0.1, torch.rand(60_000, 8)
    processors = kernels._processors(torch.device(TRITON_DEVICE))
    blocks = kernels._scan_blocks(2, 8, torch.float32, torch.device(TRITON_DEVICE))
    sweep = kernels.plan(2, 60_000, 8, 5, 0, processors, 16, blocks.constants["BLOCK_N"]).scan
    assert sweep.step > 1
    item_emb[torch.arange(60_000) // sweep.rows % sweep.step == 0] -= 9.0
    assert_same(triton_topk(query, item_emb, 5), definition(query, item_emb, 5))
    assert overflows.found[True] == 0


@needs_triton
@pytest.mark.usefixtures("rescanned")
def test_triton_grids_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs as some GPUs would run, on ties of every kind."""
    kernels = pytest.importorskip("fastdiff.kernels.score_topk")
    query, item_emb = ties_at_the_boundary(2, 9001, 8)
    item_emb[4000:] = ties_below_bfloat16(2, 5001, 8)[1]
    scan, truth = scan_of(item_emb.to(TRITON_DEVICE), torch.int8), definition(query, item_emb, 12)
    for processors in (1, 3, 20):
        monkeypatch.setattr(kernels, "_processors", lambda _, processors=processors: processors)
        assert_same(triton_topk(query, item_emb, 12, scan=scan), truth)


@needs_triton
def test_triton_tables_beyond_2_to_the_31_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows so far apart that many begin beyond 2^31 numbers, in a file that is mostly hole."""
    plans = pytest.importorskip("fastdiff.kernels.score_topk_plan")
    monkeypatch.setattr(plans, "RESCANNED", 1)
    copy = torch.UntypedStorage.copy_

    def unless_same(storage: torch.UntypedStorage, source: torch.UntypedStorage, *rest: Any) -> torch.UntypedStorage:
        return storage if storage.data_ptr() == source.data_ptr() else copy(storage, source, *rest)

    # the interpreter copies each argument back onto itself, which would fill the file
    monkeypatch.setattr(torch.UntypedStorage, "copy_", unless_same)
    n_rows, apart, dim = 2100, (1 << 21) - 64, 8
    with (tmp_path / "table").open("wb") as file:
        file.truncate(4 * n_rows * apart)
    wide = torch.from_file(str(tmp_path / "table"), shared=True, size=n_rows * apart)
    item_emb, query = wide.as_strided((n_rows, dim), (apart, 1)), torch.randn(2, dim)
    item_emb.copy_(torch.randn(n_rows, dim))
    scan = ScanTable.build(item_emb.contiguous())
    scan = replace(scan, chunks=(item_emb,))
    assert n_rows * apart > 1 << 32  # while the rows of one tile are less than 2^31 numbers apart
    for few, candidates in ((3, None), (200, None), (3, [list(range(0, n_rows, 3))] * 2)):
        lists = None if candidates is None else UserLists.from_lists(candidates)
        found = score_topk.bind("triton", "cpu")(query, item_emb, few, None, None, lists, scan)
        assert_same(found, definition(query, item_emb, few, None, None, candidates))


@needs_triton
def test_triton_queries_in_slices_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as on a GPU, queries a few at a time, lists along; more queries than one block holds."""
    plans = pytest.importorskip("fastdiff.kernels.score_topk_plan")
    tuning = pytest.importorskip("fastdiff.kernels.tuning")
    query, item_emb = gaussian(5, 3001, 12)
    exclude = random_lists(5, 3001, 40)
    truth = definition(query, item_emb, 9, None, exclude)
    lists = UserLists.from_lists(exclude).to(TRITON_DEVICE)
    monkeypatch.setattr(plans, "USERS", 2)
    assert_same(triton_topk(query, item_emb, 9, None, lists), truth)
    monkeypatch.setattr(plans, "WIDER", 1)
    monkeypatch.setattr(tuning, "_chosen", {})
    assert_same(triton_topk(query, item_emb, 9, None, lists), truth)
    monkeypatch.undo()
    scan = scan_of(item_emb.to(TRITON_DEVICE), torch.int8)
    query = torch.randn(67, 12)  # the queries are the rows of the product, not the columns
    assert_same(triton_topk(query, item_emb, 3, scan=scan), definition(query, item_emb, 3))


@needs_triton
def test_triton_many_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """k beyond the fast path, beyond the order by counting, and beyond the table."""
    kernels = pytest.importorskip("fastdiff.kernels.score_topk")
    monkeypatch.setattr(kernels.score_topk_plan, "LARGEST_K", 4)
    monkeypatch.setattr(kernels, "ORDERED", 1000)
    query, item_emb = duplicated_rows(2, 4001, 6)
    for k in (5, 1500, 4004):
        assert_same(triton_topk(query, item_emb, k), definition(query, item_emb, k))


@needs_triton
def test_triton_wide_vectors() -> None:
    """Rows of several blocks of the product."""
    query, item_emb = gaussian(2, 1501, 300)
    for dtype in SCANS:
        scan = scan_of(item_emb.to(TRITON_DEVICE), dtype)
        assert_same(triton_topk(query, item_emb, 4, scan=scan), definition(query, item_emb, 4))


@needs_triton
def test_triton_uncertified_scan_orders_what_it_finds_by_the_definition() -> None:
    query, item_emb = gaussian(4, 6000, 16)
    truth = module.score_topk_ref(query, item_emb, 30)
    for dtype in SCANS:
        scan = ScanTable.build(item_emb.to(TRITON_DEVICE), dtype, certified=False)
        rows, scores = (found.cpu() for found in triton_topk(query, item_emb, 30, scan=scan))
        common = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(rows, truth[0], strict=True)) / 120
        assert common >= 0.9
        assert bool((rows >= 0).all())
        users = torch.arange(4)[:, None].expand_as(rows)
        exact = topk_definition.pair_scores(query, item_emb, users.flatten(), rows.flatten())
        assert torch.equal(exact.view_as(scores), scores)
        assert bool((scores.diff(dim=1) <= 0).all())


@needs_triton
def test_triton_does_not_look_at_values_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that is not finite is answered with NaN, and spoils no other; rows outside the table are no rows."""
    kernels = pytest.importorskip("fastdiff.kernels.score_topk")
    for name in ("check_rows", "check_finite"):
        monkeypatch.setattr(kernels, name, lambda *_: None)
    query, item_emb = gaussian(3, 3001, 12)
    truth = definition(query, item_emb, 5)
    query[1, 3] = torch.nan
    spoiled = query.clone()
    spoiled[1, 3] = torch.inf
    for given_query in (query, spoiled):
        rows, scores = (found.cpu() for found in triton_topk(given_query, item_emb, 5))
        assert rows[1].tolist() == [-1] * 5
        assert bool(scores[1].isnan().all())
        assert_same((rows[::2].contiguous(), scores[::2].contiguous()), tuple(part[::2] for part in truth))
    lists = UserLists.from_lists([[-1, 7, 3001, 1 << 40, 9]] * 3).to(TRITON_DEVICE)
    rows, _ = triton_topk(torch.ones(3, 12), item_emb, 5, None, None, lists)
    assert [sorted(row) for row in rows.tolist()] == [[-1, -1, -1, 7, 9]] * 3
    triton_topk(torch.ones(3, 12), item_emb, 5, None, lists)


@needs_triton
@pytest.mark.parametrize("k", [5, 300])
def test_triton_waits_for_nothing(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("fastdiff.kernels.score_topk")
    for name in ("check_rows", "check_finite"):
        monkeypatch.setattr(kernels, name, lambda *_: None)
    monkeypatch.setattr(kernels, "ORDERED", 200)
    query, item_emb = (tensor.to(TRITON_DEVICE) for tensor in gaussian(2, 2001, 8))
    allowed = torch.rand(2001, device=TRITON_DEVICE) < 0.9
    long, short = (UserLists.from_lists([range(n), [3, 5]]).to(TRITON_DEVICE) for n in (1900, 9))
    scan = ScanTable.build(item_emb, None)
    op = score_topk.bind("triton", TRITON_DEVICE)
    for lists in ((None, None), (short, None), (long, None), (short, long)):
        given_lists = (allowed, *lists)
        truth = op(query, item_emb, k, *given_lists, scan)
        with no_syncs():
            again = op(query, item_emb, k, *given_lists, scan)
        assert_same(again, truth)


def test_triton_plans_are_bounded() -> None:
    plans = pytest.importorskip("fastdiff.kernels.score_topk_plan")
    for n_users in (1, 33, 64, 1000, 8192):
        for n_rows in (1, 1000, 12_101, 10**6, 10**8, 2**31 - 1):
            for k in (1, 100, 4096, 100_000):
                for dim in (8, 128):
                    sizes = plans.plan(n_users, n_rows, dim, min(k, n_rows), 50, 132, 128, 64)
                    assert sizes.users >= 1
                    assert sizes.keys >= min(k, n_rows) + 128
                    if not sizes.group:
                        continue
                    assert 64 % sizes.group == 0
                    assert (sizes.rescan is not None) == (n_rows * dim >= plans.RESCANNED)
                    entries = 0
                    for sweep in (sizes.scan, sizes.rescan) if sizes.rescan else (sizes.scan,):
                        assert sweep.rows % 64 == 0
                        assert sweep.tiles * sweep.rows >= n_rows
                        for _, visited, step, start, slots in sweep.passes():
                            assert 0 <= start + (visited - 1) * step < sweep.tiles
                            assert sweep.places * slots <= sweep.entries
                        assert sweep.visited * (sweep.rows // sizes.group) <= sizes.gathered
                        entries = max(entries, sweep.entries)
                    assert sizes.users == 1 or sizes.users * 8 * (entries + sizes.gathered) <= plans.BUDGET
    one = plans.plan(1, 10**7, 64, 100, 0, 132, 64, 256)
    assert one.scan.programs == plans.PROGRAMS * 132  # a single query keeps every processor busy


def test_triton_blocks_fit() -> None:
    """Of every size and dtype, the first blocks into the shared memory of any GPU, the others into an A100's."""
    plans = pytest.importorskip("fastdiff.kernels.score_topk_plan")
    for n_users in (1, 16, 32, 64, 128, 1024):
        for dims in (32, 64, 128):
            for dtype in topk_scan.SCAN_DTYPES:
                candidates = plans.scan_candidates(n_users, dims, str(dtype).removeprefix("torch."))
                assert any(config.shared <= 99 << 10 for config in candidates)
                for config in candidates:
                    assert config.shared <= 163 << 10
                    assert config.constants["BLOCK_N"] % 64 == 0
                    assert config.constants["BLOCK_Q"] >= 16


# --- rows of a list ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_few_rows_are_gathered(backend: str, device: str) -> None:
    """The same bits as with a mask of the rows, in any order, more than once, and with every other restriction."""
    query, item_emb = gaussian(3, 4001, 8)
    item_emb[:2000] = item_emb[2000:4000]  # ties, which go to the lower row
    op = score_topk.bind(backend, device)
    exclude, candidates = random_lists(3, 4001, 2000), [[5, 5, 2005, 4000], list(range(4001)), []]
    lists = UserLists.from_lists(exclude).to(device)
    for rows in (
        torch.randperm(4001)[:1200],
        torch.tensor([7, 2007, 7, 4000, 0, 7]),
        torch.tensor([], dtype=torch.int64),
    ):
        mask = torch.zeros(4001, dtype=torch.bool)
        mask[rows] = True
        allowed = torch.rand(4001) < 0.8
        for given_allowed, given_exclude, given_candidates in (
            (None, None, None),
            (allowed, exclude, None),
            (allowed, None, candidates),
            (None, exclude, candidates),
        ):
            found = topk_of_rows(
                op,
                query.to(device),
                item_emb.to(device),
                20,
                rows.to(device),
                None if given_allowed is None else given_allowed.to(device),
                None if given_exclude is None else lists,
                None if given_candidates is None else UserLists.from_lists(given_candidates).to(device),
            )
            both = mask if given_allowed is None else mask & given_allowed
            assert_same(found, definition(query, item_emb, 20, both, given_exclude, given_candidates))


@needs_triton
def test_triton_gathers_few_rows_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("fastdiff.kernels.score_topk")
    for name in ("check_rows", "check_finite"):
        monkeypatch.setattr(kernels, name, lambda *_: None)
    query, item_emb = (tensor.to(TRITON_DEVICE) for tensor in gaussian(2, 3001, 8))
    rows = torch.randperm(3001)[:500].to(TRITON_DEVICE)
    lists = UserLists.from_lists([range(700), [3]]).to(TRITON_DEVICE)
    op = score_topk.bind("triton", TRITON_DEVICE)
    truth = topk_of_rows(op, query, item_emb, 5, rows, None, lists)
    with no_syncs():
        again = topk_of_rows(op, query, item_emb, 5, rows, None, lists)
    assert_same(again, truth)


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merge_keeps_the_highest_score_of_a_row() -> None:
    rows = torch.tensor([[5, 3, -1, 5, 9, 3], [-1] * 6])
    scores = torch.tensor([[1.0, 2.0, -torch.inf, 3.0, 2.0, 2.0], [-torch.inf] * 6])
    merged = merge_topk(rows, scores, 4)
    assert merged[0].tolist() == [[5, 3, 9, -1], [-1] * 4]
    assert merged[1].tolist() == [[3.0, 2.0, 2.0, -torch.inf], [-torch.inf] * 4]
    assert merge_topk(rows, scores, 2)[0].tolist() == [[5, 3], [-1, -1]]
    assert merge_topk(rows, scores, 8)[0].shape == (2, 8)
    assert merge_topk(rows[:0], scores[:0], 3)[0].shape == (0, 3)


def test_merge_knows_a_real_minus_infinity_from_a_gap() -> None:
    merged = merge_topk(torch.tensor([[-1, 4, 2]]), torch.tensor([[-torch.inf, -torch.inf, 0.0]]), 3)
    assert merged[0].tolist() == [[2, 4, -1]]


def test_merge_errors() -> None:
    with pytest.raises(InvalidArgument, match=r"merge_topk: rows must be \[B, P\] int64 .* \(got \[2\] int64"):
        merge_topk(torch.zeros(2, dtype=torch.int64), torch.zeros(2), 1)


# --- user lists -------------------------------------------------------------------------------------------------------


def as_lists(lists: UserLists) -> list[list[int]]:
    offsets = lists.offsets.tolist()
    return [lists.values[lo:hi].tolist() for lo, hi in pairwise(offsets)]


def test_user_lists() -> None:
    given_lists = [[3, 1], [], [2]]
    lists = UserLists.from_lists(given_lists)
    assert as_lists(lists) == given_lists
    assert lists.n_users == 3
    assert lists.users().tolist() == [0, 0, 2]
    assert as_lists(lists.repeat(2)) == [[3, 1], [3, 1], [], [], [2], [2]]
    assert as_lists(lists.select(torch.tensor([2, 0]))) == [[2], [3, 1]]
    assert as_lists(lists.union(UserLists.from_lists([[9], [8], []]))) == [[3, 1, 9], [8], [2]]
    assert as_lists(UserLists.from_lists([np.array([4]), torch.tensor([5, 6]), range(2)])) == [[4], [5, 6], [0, 1]]
    assert UserLists.from_lists([]).n_users == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: UserLists(torch.zeros(2), torch.tensor([0, 2])),
            r"values must be a flat int64 tensor \(got \[2\] float32",
        ),
        (lambda: UserLists(torch.zeros(2).long(), [0, 2]), r"offsets must be a flat int64 tensor \(got list\)"),
        (
            lambda: UserLists(torch.zeros(2).long(), torch.tensor([0, 1])),
            r"end at the number of values, 2 \(got \[0, 1\]",
        ),
        (lambda: UserLists(torch.zeros(2).long(), torch.tensor([0, 2, 1, 2])), r"never fall"),
        (lambda: UserLists(torch.zeros(0).long(), torch.tensor([]).long()), r"start at 0"),
        (
            lambda: UserLists.from_lists([[1], [1.5]]),
            r"lists\[1\] must be a flat list of integers \(got \[1\] float32\)",
        ),
        (lambda: UserLists.from_lists([[1]]).union(UserLists.from_lists([[], []])), r"same users \(got 1 and 2\)"),
    ],
)
def test_user_lists_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=r"UserLists.*" + message):
        make()


# --- errors -----------------------------------------------------------------------------------------------------------

Q, E = torch.randn(2, 4), torch.randn(10, 4)
LISTS = UserLists.from_lists([[1], [2, 10]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], E, 3), r"query must be \[B, D\] float32, D at least 1 \(got \[4\] float32\)"),
        ((Q.double(), E, 3), r"query must be .* \(got \[2, 4\] float64\)"),
        ((Q[:, :0], E, 3), r"query must be .* \(got \[2, 0\] float32\)"),
        ((Q, E[:, :3], 3), r"item_emb must be \[N, 4\] float32, as wide as the query \(got \[10, 3\] float32\)"),
        ((Q, E.half(), 3), r"item_emb must be .* \(got \[10, 4\] float16\)"),
        ((Q, E, 0), r"k must be an integer of at least 1 \(got 0\)"),
        ((Q, E, 2.0), r"k must be an integer of at least 1 \(got 2.0\)"),
        ((Q, E, True), r"k must be an integer of at least 1 \(got True\)"),
        ((Q, E, 3, torch.ones(9).bool()), r"allowed must be \[10\] bool, one per row \(got \[9\] bool\)"),
        ((Q, E, 3, torch.ones(10)), r"allowed must be \[10\] bool, one per row \(got \[10\] float32\)"),
        ((Q, E, 3, None, LISTS), r"user_exclude must hold rows 0..9 \(got 10\)"),
        ((Q, E, 3, None, None, LISTS), r"user_candidates must hold rows 0..9 \(got 10\)"),
        ((Q, E, 3, None, LISTS.repeat(2)), r"user_exclude must hold one list per query, 2 \(got 4\)"),
        ((Q, E, 3, None, None, None, ScanTable.build(E[:9])), r"scan must be of item_emb, \[10, 4\] \(got \[9, 4\]\)"),
        ((Q / 0, E, 3), r"query must be finite \(got NaN or infinity in query\[0\]\); check the model's weights"),
        ((Q.new_tensor([[0.0] * 4, [torch.nan] * 4]), E, 3), r"query must be finite .* in query\[1\]"),
        ((Q / 0, E, 3, None, None, UserLists.from_lists([[1], []])), r"query must be finite"),
        ((Q, E.to("meta"), 3), r"item_emb must be where the query is, on cpu \(got meta\); move it"),
        ((Q, E, 3, torch.ones(10).bool().to("meta")), r"allowed must be where the query is"),
    ],
)
def test_errors(arguments: tuple, message: str) -> None:
    for backend, device in BACKENDS:
        if device == "cpu":
            with pytest.raises(InvalidArgument, match="score_topk: " + message):
                score_topk.bind(backend, device)(*arguments)


def test_nothing_to_rank() -> None:
    for rows, scores in (
        module.score_topk_ref(Q[:0], E, 3),
        module.score_topk_ref(Q, E[:0], 3),
        module.score_topk_ref(Q, E, 3, torch.zeros(10).bool()),
    ):
        assert rows.shape == scores.shape == (rows.shape[0], 3)
        assert bool((rows == -1).all())
        assert bool((scores == -torch.inf).all())
