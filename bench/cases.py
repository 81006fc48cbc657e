"""What is measured: a case poses one problem at one size, providers solve it, and each is checked before it is timed.

The cases themselves stand in `bench_<name>.py`, one file per subject; each holds a list `CASES`, and nothing else needs
to be told of it. A case is cheap to list: weights are drawn and models are built when `Case.build` is called.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ours import bindings
from fastdiff.ops.backend import Op

CPU = torch.device("cpu")

GOLDEN = 5e-6
"""The project's tolerance against the truth, relative to the largest magnitude (`tests/tolerances.py`)."""

COMPILED = "-compiled"
GRAPHED = "-graphed"
PROVIDERS = {
    "published": "the authors' algorithm as published, eager PyTorch",
    "published-compiled": "the same with its networks under torch.compile (only with --compile)",
    "eager": "the same model in lean eager PyTorch: nothing computed twice or for nothing, no loop over users",
    "torch-randn": "torch.randn, whose numbers depend on how many were drawn before; shown beside the others",
    "torch-topk": "torch.mm of all scores, then torch.topk, eager PyTorch",
    "torch-topk-compiled": "the same under torch.compile (only with --compile)",
    "torch-topk-tiles": "torch.mm, then the k tiles of 128 scores with the highest maxima, then torch.topk of those",
    "torch-topk-bf16": "torch-topk with table, queries and scores in bfloat16: an approximate ranking",
    "torch-topk-bf16-compiled": "the same under torch.compile (only with --compile)",
    "torch-topk-bf16-tiles": "torch-topk-tiles with table, queries and scores in bfloat16: an approximate ranking",
    "torch-topk-int8": "torch._int_mm of rows rounded to int8, times their scales, then the tiles: approximate",
    "faiss": "FAISS IndexFlatIP with its defaults (where faiss is installed)",
    "faiss-tuned": "FAISS IndexFlatIP with distance_compute_blas_threshold = 800 (where faiss is installed)",
    "implicit": "implicit.cpu.topk, with its own filter where a case has lists (where implicit is installed)",
    "usearch": "usearch.index.search(exact=True) by inner product (where usearch is installed)",
    "fastdiff": "fastdiff, once per backend that can run here; backend torch is the best eager PyTorch we could write",
    "fastdiff-compiled": "fastdiff[torch] under torch.compile, counted among the others (only with --compile)",
    "fastdiff-graphed": "fastdiff[torch] replayed as a CUDA graph, counted among the others (only on a GPU)",
    "fastdiff-graph": "fastdiff's kernels replayed as a CUDA graph (only on a GPU)",
    "fastdiff-bf16-scan": "fastdiff, scanning a bfloat16 copy of the table; the answer is the same, bit for bit",
    "fastdiff-fp16-scan": "fastdiff, scanning a float16 copy of the table; the answer is the same, bit for bit",
    "fastdiff-int8-scan": "fastdiff, scanning an int8 copy of the table; the answer is the same, bit for bit",
    "fastdiff-bf16-uncertified": "fastdiff, a bfloat16 scan that proves nothing: what its rounding swaps is missed",
    "fastdiff-int8-uncertified": "the same of an int8 scan",
    "fastdiff-no-lists": "fastdiff, the same call without lists; shown beside the others, not compared with them",
    "fastdiff-bf16-scan-no-lists": "the same of a bfloat16 scan",
    "fastdiff-fp16-scan-no-lists": "the same of a float16 scan",
    "fastdiff-int8-scan-no-lists": "the same of an int8 scan",
    "fastdiff-closed-form": "fastdiff with scheduler='closed_form': the chain as one draw, equal in law",
}
ON_A_GPU = frozenset(
    {"torch-topk-tiles", "torch-topk-bf16-tiles", "torch-topk-int8", "fastdiff-graphed", "fastdiff-graph"}
)
"""Providers that take part there only."""


@dataclass(frozen=True)
class Gate:
    """How far a provider's output is from the truth; `against` says what was compared."""

    error: float
    tolerance: float
    against: str

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.tolerance


@dataclass(frozen=True)
class Measured:
    """What a provider returns that measures itself, in a process of its own for instance.

    seconds     of the one call          peak_bytes  how much memory it needed beyond what was there before it
    """

    output: Any
    seconds: float
    peak_bytes: float | None = None


@dataclass(frozen=True)
class Provider:
    """One way to solve a case.

    name         a key of `PROVIDERS`
    run          the call that is timed
    check        what it returns -> `Gate`
    gated        the call whose output is checked, where `run` draws its own noise: the same call with its draws given
    backend      "eager" for others; for fastdiff, what its ops run on
    flops, bytes  of one call, where the problem itself fixes them; else flops of matrix products are counted
    arithmetic   of those flops: "float32", "bfloat16", "int8"; or the fastest of several, "float32 or bfloat16"
    setup        seconds that were spent once, before any call, and would be spent at load
    once         so slow, or measuring itself (`Measured`), that it is run once
    approximate  its promise is less than the case asks of others: shown, and compared apart
    aside        solves another problem than the case's, shown for comparison only
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], Gate]
    gated: Callable[[], Any] | None = None
    backend: str = "eager"
    flops: float | None = None
    bytes: float | None = None
    arithmetic: str = "float32"
    setup: float | None = None
    once: bool = False
    approximate: bool = False
    aside: bool = False

    def __post_init__(self) -> None:
        if self.name not in PROVIDERS:
            raise ValueError(f"Provider: unknown name {self.name!r}; known names: {', '.join(PROVIDERS)}")

    @property
    def label(self) -> str:
        return self.name if self.backend == "eager" else f"{self.name}[{self.backend}]"

    @property
    def plain_name(self) -> str:
        return self.name.removesuffix(COMPILED).removesuffix(GRAPHED)

    @property
    def is_compiled(self) -> bool:
        """Or captured: its operations are not seen one by one."""
        return self.name.endswith((COMPILED, GRAPHED))

    @property
    def is_plain(self) -> bool:
        """Whether it runs in plain PyTorch."""
        return self.backend in ("eager", "torch") and not self.is_compiled


@dataclass(frozen=True)
class Absent:
    """A provider that cannot take part here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Options:
    """What the command line says to all cases. `only`: names of providers, or None for all."""

    device: torch.device = CPU
    compile: bool = False
    full: bool = False
    only: frozenset[str] | None = None

    def wants(self, name: str) -> bool:
        return self.only is None or name in self.only


@dataclass(frozen=True)
class Citation:
    """A figure that others report for the same work on their machine: shown, never compared in a table."""

    source: str
    seconds: float


@dataclass(frozen=True)
class Case:
    """One problem at one size.

    name      its subject, the name of its file without "bench_"
    params    what identifies it, "batch" among them
    setting   the sizes that do not vary between the cases of a subject, for the caption
    build     Options -> providers, and those that are absent
    others    names of the other providers       ours  names of fastdiff's, each once per way to run `ops`
    heavy     measured only with --full
    only_on   the one type of device for which it is listed, None for all
    """

    name: str
    params: dict[str, int | str]
    setting: str
    build: Callable[[Options], Iterable[Provider | Absent]] = field(repr=False)
    ops: tuple[Op, ...] = field(repr=False)
    others: tuple[str, ...] = ("published", "published-compiled")
    ours: tuple[str, ...] = ("fastdiff",)
    heavy: bool = False
    only_on: str | None = None
    citation: Citation | None = None

    @property
    def id(self) -> str:
        return "/".join([self.name, *(f"{key}={value}" for key, value in self.params.items())])

    def labels(self, options: Options) -> list[str]:
        """The labels of the providers that `build` gives, absent ones included; known without building."""
        ways, unheard = bindings(self.ops, options.device), frozenset() if options.device.type == "cuda" else ON_A_GPU
        labels = [*self.others, *(f"{name}[{way}]" for name in self.ours for way in ways)]
        return [label for label in labels if label.partition("[")[0] not in unheard]


def all_cases(device: torch.device = CPU) -> list[Case]:
    """Every case of every `bench_*.py` that is measured on such a device."""
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    cases = [case for file in files for case in importlib.import_module(f"bench.{file.stem}").CASES]
    return [case for case in cases if case.only_on in (None, device.type)]


# --- errors -----------------------------------------------------------------------------------------------------------


def relative_error(output: Tensor, truth: Tensor) -> float:
    """The largest absolute difference over the largest magnitude of `truth`; infinite where shapes differ."""
    if output.shape != truth.shape:
        return math.inf
    return float((output.double() - truth.double()).abs().max() / truth.double().abs().max())


def ranking_error(rows: Tensor, scores: Tensor) -> float:
    """How much worse the rows `[B, K]` are, place by place, than the best K of the float64 `scores [B, N]`, relative to
    the largest magnitude. 0 where they are the best K in order, or differ from them inside ties only. Rows whose score
    is -inf may not be returned."""
    if bool((rows < 0).any()) or any(len(set(row)) < len(row) for row in rows.tolist()):
        return math.inf
    best, given = scores.topk(rows.shape[1], dim=1).values, scores.gather(1, rows)
    if not bool(given.isfinite().all()):
        return math.inf
    return float((best - given).abs().max() / scores[scores.isfinite()].abs().max())
