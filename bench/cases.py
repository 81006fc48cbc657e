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

from fastdiff.config import ModelConfig
from fastdiff.models import model_class
from fastdiff.models.base import Histories, Model
from fastdiff.ops.backend import BACKENDS, Op

CPU = torch.device("cpu")

GOLDEN = 5e-6
"""The project's tolerance against the truth, relative to the largest magnitude (`tests/tolerances.py`)."""

COMPILED = "-compiled"
PROVIDERS = {
    "published": "the authors' algorithm as published, eager PyTorch",
    "published-compiled": "the same with its networks under torch.compile (only with --compile)",
    "torch-topk": "torch.mm of all scores, then torch.topk, eager PyTorch",
    "torch-topk-compiled": "the same under torch.compile (only with --compile)",
    "faiss": "FAISS IndexFlatIP with its defaults (where faiss is installed)",
    "faiss-tuned": "FAISS IndexFlatIP with distance_compute_blas_threshold = 800 (where faiss is installed)",
    "fastdiff": "fastdiff, once per backend that can run here",
    "fastdiff-bf16-scan": "fastdiff, scanning a bfloat16 copy of the table; the answer is the same, bit for bit",
    "fastdiff-closed-form": "fastdiff with scheduler='closed_form': the chain as one draw, equal in law",
}


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
class Provider:
    """One way to solve a case.

    name        a key of `PROVIDERS`
    run         the call that is timed
    check       what it returns -> `Gate`
    gated       the call whose output is checked, where `run` draws its own noise: the same call with its draws given
    backend     "eager" for others; for fastdiff, what its ops run on
    flops, bytes  of one call, where the problem itself fixes them; else flops of matrix products are counted
    setup       seconds that were spent once, before any call, and would be spent at load
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], Gate]
    gated: Callable[[], Any] | None = None
    backend: str = "eager"
    flops: float | None = None
    bytes: float | None = None
    setup: float | None = None

    def __post_init__(self) -> None:
        if self.name not in PROVIDERS:
            raise ValueError(f"Provider: unknown name {self.name!r}; known names: {', '.join(PROVIDERS)}")

    @property
    def label(self) -> str:
        return self.name if self.backend == "eager" else f"{self.name}[{self.backend}]"

    @property
    def plain_name(self) -> str:
        return self.name.removesuffix(COMPILED)

    @property
    def is_compiled(self) -> bool:
        return self.name.endswith(COMPILED)

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
    only: frozenset[str] | None = None

    def wants(self, name: str) -> bool:
        return self.only is None or name in self.only


@dataclass(frozen=True)
class Case:
    """One problem at one size.

    name      its subject, the name of its file without "bench_"
    params    what identifies it, "batch" among them
    setting   the sizes that do not vary between the cases of a subject, for the caption
    build     Options -> providers, and those that are absent
    others    names of the other providers       ours  names of fastdiff's, each once per way to run `ops`
    heavy     measured only with --full
    """

    name: str
    params: dict[str, int | str]
    setting: str
    build: Callable[[Options], Iterable[Provider | Absent]] = field(repr=False)
    ops: tuple[Op, ...] = field(repr=False)
    others: tuple[str, ...] = ("published", "published-compiled")
    ours: tuple[str, ...] = ("fastdiff",)
    heavy: bool = False

    @property
    def id(self) -> str:
        return "/".join([self.name, *(f"{key}={value}" for key, value in self.params.items())])

    def labels(self, options: Options) -> list[str]:
        """The labels of the providers that `build` gives, absent ones included; known without building."""
        ways = bindings(self.ops, options.device)
        return [*self.others, *(f"{name}[{way}]" for name in self.ours for way in ways)]


def all_cases() -> list[Case]:
    """Every case of every `bench_*.py`."""
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    return [case for file in files for case in importlib.import_module(f"bench.{file.stem}").CASES]


# --- errors -----------------------------------------------------------------------------------------------------------


def relative_error(output: Tensor, truth: Tensor) -> float:
    """The largest absolute difference over the largest magnitude of `truth`; infinite where shapes differ."""
    if output.shape != truth.shape:
        return math.inf
    return float((output.double() - truth.double()).abs().max() / truth.double().abs().max())


def ranking_error(rows: Tensor, scores: Tensor) -> float:
    """How much worse the rows `[B, K]` are, place by place, than the best K of the float64 `scores [B, N]`, relative to
    the largest magnitude. 0 where they are the best K in order, or differ from them inside ties only."""
    if bool((rows < 0).any()) or any(len(set(row)) < len(row) for row in rows.tolist()):
        return math.inf
    best = scores.topk(rows.shape[1], dim=1).values
    return float((best - scores.gather(1, rows)).abs().max() / scores.abs().max())


# --- inputs -----------------------------------------------------------------------------------------------------------


def draw_lengths(batch: int, law: str, window: int, generator: torch.Generator) -> Tensor:
    """Lengths of histories `[B]` int64. "full": the window. "uniform": 1 .. window. "beauty": 3 plus a geometric law,
    mean 7, cut to the window, close to Amazon Beauty's."""
    if law == "full":
        return torch.full((batch,), window)
    if law == "uniform":
        return torch.randint(1, window + 1, (batch,), generator=generator)
    if law == "beauty":
        extra = torch.empty(batch).exponential_(1 / 4.5, generator=generator).floor().long()
        return (3 + extra).clamp(max=window)
    raise ValueError(f"draw_lengths: law must be full, beauty or uniform (got {law!r})")


def draw_histories(config: ModelConfig, batch: int, law: str, seed: int = 1) -> Histories:
    """Left-aligned rows of real items, as models take them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = draw_lengths(batch, law, config.max_seq_len, generator)
    low = config.first_item_row
    items = torch.randint(low, low + config.n_items, (batch, int(lengths.max())), generator=generator)
    inside = torch.arange(items.shape[1]) < lengths[:, None]
    return Histories(torch.where(inside, items, config.pad_id), lengths)


def padded(histories: Histories, config: ModelConfig) -> Tensor:
    """`[B, L]` int64 as the authors' data loaders hand it over: padded to the window on the model's own side."""
    window, width = config.max_seq_len, histories.items.shape[1]
    items = torch.full((histories.batch_size, window), config.pad_id)
    places = torch.arange(width).expand_as(histories.items)
    if config.pad_side == "left":
        places = places + window - histories.lengths[:, None]
    inside = torch.arange(width) < histories.lengths[:, None]
    users = torch.arange(histories.batch_size)[:, None].expand_as(places)
    items[users[inside], places[inside]] = histories.items[inside]
    return items


def histories_to(histories: Histories, device: torch.device) -> Histories:
    return Histories(histories.items.to(device), histories.lengths.to(device))


def draw_noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- ours -------------------------------------------------------------------------------------------------------------


def bindings(ops: Iterable[Op], device: torch.device) -> dict[str, str]:
    """Each different way to run `ops` here: label -> the backend to ask for.

    A backend is listed where it has all of the ops; "auto" where it mixes backends, its label saying how.
    """
    ops = list(ops)
    ways = {name: name for name in BACKENDS if all(op.why_not(name, device) is None for op in ops)}
    chosen = {op.name: op.bind("auto", device).backend for op in ops}
    if len(set(chosen.values())) > 1:
        ways["auto: " + ", ".join(f"{name} {backend}" for name, backend in sorted(chosen.items()))] = "auto"
    return ways


def our_models(config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> dict[str, Model[Any, Any]]:
    """The model of `config` once per way to run it: label -> model."""
    kind = model_class(config.method)
    placed = {name: weight.to(device) for name, weight in weights.items()}
    return {
        label: kind(config, placed, {op.name: op.bind(backend, device) for op in kind.ops})
        for label, backend in bindings(kind.ops, device).items()
    }
