"""Which backend runs, and what is said where one cannot."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from fastdiff import ops
from fastdiff.errors import BackendUnavailable, InvalidArgument
from fastdiff.ops import backend as module
from fastdiff.ops.backend import BACKENDS, Op, why_not
from tests.conftest import ROOT


def reference(x: float) -> float:
    """x."""
    return x


PLAIN = Op("plain", reference)
FAST = Op("fast", reference, {"cpu": "math:sqrt", "triton": "math:fabs"})


@pytest.fixture(autouse=True)
def _with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.library, "why_not", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        ("torch", "cpu", None),
        ("torch", "cuda", None),
        ("torch", "meta", None),
        ("cpu", "cpu", None),
        ("cpu", "cuda", "it needs the tensors on the CPU, got cuda"),
        ("triton", "cpu", "it needs a CUDA device, got cpu"),
        ("cuda", torch.device("cpu"), "it needs a CUDA device, got cpu"),
        ("cuda", "cuda:1", None),
    ],
)
def test_why_not(backend: str, device: torch.device | str, reason: str | None) -> None:
    assert why_not(backend, device) == reason


def test_why_not_says_what_the_library_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("cpu", "cpu", torch.bfloat16) == "it computes in float32, got bfloat16"
    monkeypatch.setattr(module.library, "why_not", lambda: "not built")
    assert why_not("cpu", "cpu") == "not built"
    with pytest.raises(BackendUnavailable, match=r"fast: backend 'cpu' cannot run: not built. Usable here: torch"):
        FAST.bind("cpu", "cpu")


def test_triton_is_interpreted_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert why_not("triton", "cpu") is None
    assert why_not("triton", "cpu", torch.float16) is None
    assert "interpreter computes wrongly in bfloat16" in str(why_not("triton", "cpu", torch.bfloat16))
    assert why_not("triton", "cuda", torch.bfloat16) is None
    assert why_not("triton", "cuda", torch.float64) == "it computes in float32, float16 or bfloat16, got float64"


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert why_not("triton", "cuda") == "the package 'triton' is not installed"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if name == "triton" else None)
    assert "run `make build` in it" in str(why_not("triton", "cuda"))


def test_unknown_backend() -> None:
    message = r"backend: unknown name 'tpu'; known backends: auto, torch, cpu, triton, cuda"
    with pytest.raises(InvalidArgument, match=message):
        why_not("tpu", "cpu")
    with pytest.raises(InvalidArgument, match=message):
        PLAIN.bind("tpu", "cpu")


def test_an_op_runs_where_it_has_an_implementation() -> None:
    assert PLAIN.available("cpu") == ("torch",)
    assert FAST.available("cpu") == ("torch", "cpu")
    assert PLAIN.why_not("cpu", "cpu") == "this version of fastdiff has no 'cpu' implementation of plain"
    assert FAST.why_not("cuda", "cuda") == "this version of fastdiff has no 'cuda' implementation of fast"
    assert FAST.why_not("triton", "cpu") == "it needs a CUDA device, got cpu"


@pytest.mark.parametrize(
    ("op", "device", "runs", "value"),
    [(PLAIN, "cpu", "torch", 4.0), (PLAIN, "meta", "torch", 4.0), (FAST, "cpu", "cpu", 2.0)],
)
def test_auto_takes_the_first_that_can_run(op: Op, device: str, runs: str, value: float) -> None:
    bound = op.bind("auto", device)
    assert (bound.name, bound.backend, bound(4.0)) == (op.name, runs, value)


def test_triton_runs_on_cuda_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert FAST.bind("auto", "cuda").backend == "torch"
    assert FAST.bind("triton", "cuda").backend == "triton"


def test_a_named_backend_runs_or_raises_with_the_reason() -> None:
    assert FAST.bind("torch", "cpu")(4.0) == 4.0
    assert FAST.bind("cpu", "cpu")(4.0) == 2.0
    with pytest.raises(BackendUnavailable) as error:
        FAST.bind("triton", "cpu")
    assert str(error.value) == (
        "fast: backend 'triton' cannot run: it needs a CUDA device, got cpu. Usable here: torch, cpu"
    )
    with pytest.raises(BackendUnavailable, match=r"plain: backend 'cpu' cannot run: this version of fastdiff has no"):
        PLAIN.bind("cpu", "cpu")


def test_every_op_is_listed_once_under_its_own_name() -> None:
    names = [op.name for op in ops.ALL]
    assert len(set(names)) == len(names)
    assert {"sampler_step", "denoise_mlp_loop", "denoise_attention_loop", "score_topk"} <= set(names)
    for op in ops.ALL:
        assert op.reference.__name__ == f"{op.name}_ref"
        assert op.reference.__doc__
        assert set(op.implementations) < set(BACKENDS)
        assert op.bind("torch", "cpu").function is op.reference
    with pytest.raises(AttributeError, match="no attribute 'NONE'"):
        _ = ops.NONE


def test_importing_the_record_imports_no_op() -> None:
    code = "import sys, fastdiff.ops.backend; print([m for m in sys.modules if m.startswith('fastdiff.ops.')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['fastdiff.ops.cpu', 'fastdiff.ops.cpu.library', 'fastdiff.ops.backend']"


def test_available_backends() -> None:
    runs = module.available_backends("cpu")
    assert "torch" in runs
    assert [module.why_no_op(backend, "cpu") is None for backend in BACKENDS] == [name in runs for name in BACKENDS]
    assert module.why_no_op("triton", "cpu") == "it needs a CUDA device, got cpu"


def test_every_triton_kernel_is_compiled_ahead_of_time() -> None:
    """`cases()` names the configurations that a launcher may choose; `make check` compiles those."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    assert kernels
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    # in a process of its own: what this test imports would be compiled, where later tests interpret it
    code = (
        "from fastdiff.kernels import precompile as p; "
        "print(*{case.kernel.fn.__name__ for op in p.modules() for case in p.cases_of(op)})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    compiled = set(found.stdout.split())
    assert sorted(kernels - compiled) == []
