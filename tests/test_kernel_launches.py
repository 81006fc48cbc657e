"""What launchers hand to their kernels on a device, seen without one: tensors are on "meta", and no kernel runs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff.kernels
from bench.calls import SOURCES, record
from fastdiff import ops
from fastdiff.ops.backend import Op, why_not
from tests import devices
from tests.devices import move
from tests.played_gpu import PROPERTIES

if why_not("triton", "cuda") is not None:
    pytest.skip(str(why_not("triton", "cuda")), allow_module_level=True)

from triton.runtime.jit import JITFunction

from fastdiff.kernels import runtime

CPU, META = torch.device("cpu"), torch.device("meta")
MOST_ALONG = (2**31 - 1, 65_535, 65_535)
"""Programs along the axes of a grid (CUDA C++ Programming Guide, table 30)."""
FEW_STEPS = {"num_train_timesteps": 5}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """(kernel, grid, arguments) of every launch on a GPU that is played."""
    if runtime.INTERPRETED:
        pytest.skip("kernels are interpreted in this process")
    seen: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        named = inspect.signature(kernel.fn).bind_partial(*arguments).arguments
        seen.append((kernel.fn.__name__, grid, {**named, **keywords}))

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: PROPERTIES)
    monkeypatch.setattr(JITFunction, "run", run)
    runtime.multiprocessors.cache_clear()
    runtime.shared_memory.cache_clear()
    return seen


def sizes_of(op: Op) -> dict[str, int]:
    return FEW_STEPS if SOURCES[op.name].setting.startswith(("DreamRec", "ADRec")) else {}


@pytest.mark.parametrize("batch", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [op for op in ops.ALL if op.name in SOURCES], ids=lambda op: op.name)
def test_every_tensor_of_a_launch_is_on_the_device_and_every_grid_fits(
    op: Op, dtype: torch.dtype, batch: int, launches: list[tuple[str, tuple[int, ...], dict[str, Any]]]
) -> None:
    call = record(op, batch, CPU, dtype, **sizes_of(op))
    arguments = {
        name: value if name == devices.STAYS else move(value, "meta") for name, value in call.arguments.items()
    }
    output = op.bind("triton", "cuda", dtype).function(**arguments)
    assert launches
    for kernel, grid, given in launches:
        elsewhere = [name for name, value in given.items() if isinstance(value, Tensor) and value.device != META]
        assert elsewhere == [], kernel
        assert all(1 <= n <= most for n, most in zip(grid, MOST_ALONG, strict=False)), (kernel, grid)
        assert "num_warps" not in given or given["num_warps"] in (1, 2, 4, 8, 16)
    if isinstance(output, Tensor):
        assert output.device == META


@pytest.mark.parametrize("scan_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("n_rows", [16_000, 10**8, 2**31 - 1])
@pytest.mark.parametrize(("batch", "k"), [(1, 10), (1, 20_000), (3000, 4096)])
def test_top_k_of_the_largest_tables_is_launched_in_grids_and_numbers_that_fit(
    batch: int,
    k: int,
    n_rows: int,
    scan_dtype: torch.dtype,
    launches: list[tuple[str, tuple[int, ...], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What kernels count in int32 is below 2^31, whatever the table."""
    from fastdiff.kernels import score_topk
    from fastdiff.ops.topk_scan import CHUNK, ScanTable
    from fastdiff.ops.user_lists import UserLists

    monkeypatch.setattr(score_topk, "_processors", lambda device: 132)
    items = torch.empty(n_rows, 128, device=META)
    # two chunks stand for all: no kernel reads them
    chunks = (items,) if scan_dtype == torch.float32 else (torch.empty(CHUNK, 128, dtype=torch.uint8, device=META),) * 2
    scan = ScanTable(scan_dtype, chunks, torch.empty(-(-n_rows // 64), 4, device=META), n_rows, 128)
    seen = UserLists.trusted(
        torch.empty(50 * batch, dtype=torch.int64, device=META), torch.empty(batch + 1, dtype=torch.int64, device=META)
    )
    rows, _ = score_topk.score_topk(torch.empty(batch, 128, device=META), items, k, None, seen, None, scan)
    assert rows.shape == (batch, k)
    assert {kernel for kernel, _, _ in launches} >= {"_prepare_kernel", "_exact_kernel"}
    for kernel, grid, given in launches:
        assert all(1 <= n <= most for n, most in zip(grid, MOST_ALONG, strict=False)), (kernel, grid)
        numbers = {name: value for name, value in given.items() if isinstance(value, int)}
        assert all(abs(value) < 2**31 for value in numbers.values()), (kernel, numbers)


def test_histories_of_other_lengths_compile_no_selection_anew(
    launches: list[tuple[str, tuple[int, ...], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that follow from how many rows users have seen are not made part of a kernel: each would cost seconds."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from fastdiff.kernels import score_topk, score_topk_exact, score_topk_scan, score_topk_select
    from fastdiff.ops.topk_scan import ScanTable
    from fastdiff.ops.user_lists import UserLists

    monkeypatch.setattr(score_topk, "_processors", lambda device: 132)
    target = make_backend(GPUTarget("cuda", 90, 32))
    watched = (
        score_topk_scan._scan_kernel,
        score_topk_scan._rescan_kernel,
        score_topk_select._raise_kernel,
        score_topk_exact._exact_kernel,
        score_topk_exact._order_kernel,
    )
    binders = {
        kernel.fn.__name__: create_function_from_signature(kernel.signature, kernel.params, target)
        for kernel in watched
    }
    items = torch.empty(100_000, 64, device=META)
    scan = ScanTable(torch.float32, (items,), torch.empty(-(-len(items) // 64), 4, device=META), *items.shape)
    compiled = set()
    for batch in (40, 64, 300, 1024):
        for k in (10, 16, 100):
            for each in (1, 5, 16, 48, 51):
                total = torch.empty(batch * each, dtype=torch.int64, device=META)
                seen = UserLists.trusted(total, torch.empty(batch + 1, dtype=torch.int64, device=META))
                score_topk.score_topk(torch.empty(batch, 64, device=META), items, k, None, seen, None, scan)
                for name, _, given in launches:
                    if name in binders:
                        compiled.add((name, str(binders[name](**given)[1])))
                launches.clear()
    by_kernel = Counter(name for name, _ in compiled)
    # few queries have blocks of their own; the floor is raised after a sample and after the table, in both scans; rows
    # are those kept, or the whole table's
    expected = {"_scan_kernel": 2, "_rescan_kernel": 1, "_raise_kernel": 8, "_exact_kernel": 2, "_order_kernel": 1}
    assert by_kernel == expected


def test_what_kernels_are_not_specialised_for_are_parameters_of_theirs() -> None:
    """Triton takes no notice of names that it does not know."""
    kernels = {
        f"{module.name}.{name}": kernel
        for module in pkgutil.iter_modules(fastdiff.kernels.__path__)
        for name, kernel in vars(importlib.import_module(f"fastdiff.kernels.{module.name}")).items()
        if isinstance(kernel, JITFunction)
    }
    assert sum(bool(kernel.do_not_specialize) for kernel in kernels.values()) > 20
    wrong = {name: set(kernel.do_not_specialize or ()) - set(kernel.arg_names) for name, kernel in kernels.items()}
    assert not {name: unknown for name, unknown in wrong.items() if unknown}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_blocks_of_any_width_have_tiles_for_small_gpus_and_the_first_ones_for_large_ones(dim: int, dtype: str) -> None:
    from fastdiff.kernels import denoise_attention_loop
    from fastdiff.kernels.causal_history_tiles import row_candidates
    from fastdiff.kernels.precompile import SHARED_MEMORY
    from fastdiff.kernels.tuning import first_that_fits

    for rows, many in ((1, "few"), (1 << 20, "many")):
        for found in (
            row_candidates(rows, many, dim, dim, 4 * dim, dtype),
            denoise_attention_loop._candidates(rows, dim, dim, 4 * dim, dtype),
        ):
            assert first_that_fits("op", found, SHARED_MEMORY[90]) is found[0]
            for arch in (80, 86) if dim <= 256 else (80,):
                assert first_that_fits("op", found, SHARED_MEMORY[arch]).shared <= SHARED_MEMORY[arch]


def test_any_number_of_draws_is_one_launch(launches: list[tuple[str, tuple[int, ...], dict[str, Any]]]) -> None:
    from fastdiff.kernels.philox_normals import philox_normals

    keys = torch.zeros(3, dtype=torch.int64, device="meta")
    assert philox_normals(1, keys, keys, 0, 100_000, 4).shape == (100_000, 3, 4)
    assert [grid for _, grid, _ in launches] == [(100_000,)]


def test_an_op_of_another_gpu_makes_it_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: Any) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Current)
    seen: list[list[Any]] = []
    op = Op("row_linear", lambda: None, {"triton": "tests.test_kernel_launches:watched"})
    monkeypatch.setattr("tests.test_kernel_launches.watched", lambda: seen.append(list(current)))
    op.bind("triton", "cuda:1")()
    op.bind("triton", "cuda")()
    assert seen == [[torch.device("cuda:1")], []]


def watched() -> None:
    """What the test above binds."""
