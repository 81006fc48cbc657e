"""The other providers: the authors' algorithms (in `bench/published`), retrieval with torch and with FAISS."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Absent, Options
from fastdiff.config import ModelConfig
from fastdiff.models import model_class

FAISS_BLAS_THRESHOLD = 800
"""Below n_queries * dim = 128000, FAISS reads the whole table once per query; with 800, only for a few queries."""


def load_weights(module: nn.Module, config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A published module with our weights; only parameters that inference never reads may stay undefined."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    unread = model_class(config.method).unused_weights()
    wrong = [name for name in missing if not name.startswith(unread)] + unexpected
    if wrong:
        raise ValueError(f"{type(module).__name__}: its parameters differ from fastdiff's: {', '.join(wrong)}")
    return module.to(device).eval()


def in_float64(module: nn.Module) -> nn.Module:
    """A copy in float64, on the CPU: the truth that every provider is held against."""
    return copy.deepcopy(module).cpu().double()


def compiled(options: Options, name: str) -> Absent | None:
    """Why the provider `name`, which needs torch.compile, cannot take part; None where it can."""
    if not options.compile:
        return Absent(name, "torch.compile takes minutes; --compile includes it")
    return None


def static_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape, as a service that always runs one batch size would use it."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# --- retrieval --------------------------------------------------------------------------------------------------------


def torch_topk(query: Tensor, item_emb: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(rows, scores) `[B, k]` by way of all scores `[B, N]`."""
    scores, rows = torch.topk(torch.mm(query, item_emb.T), k, dim=1)
    return rows, scores


def why_no_faiss(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "the FAISS case is for the CPU"
    if importlib.util.find_spec("faiss") is None:
        return "faiss is not installed; `pip install faiss-cpu` adds this row"
    return None


class Faiss:
    """IndexFlatIP over a table: `search` returns (rows, scores) `[B, k]`."""

    def __init__(self, item_emb: Tensor, tuned: bool) -> None:
        import faiss

        self._faiss, self._tuned = faiss, tuned
        self._index = faiss.IndexFlatIP(item_emb.shape[1])
        self._index.add(item_emb.numpy())

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with self._threshold():
            scores, rows = self._index.search(query.numpy(), k)
        return torch.from_numpy(rows), torch.from_numpy(scores)

    @contextmanager
    def _threshold(self) -> Iterator[None]:
        """The threshold is one variable of the whole process, so it is set around each call."""
        if not self._tuned:
            yield
            return
        variables = self._faiss.cvar
        default, variables.distance_compute_blas_threshold = (
            variables.distance_compute_blas_threshold,
            FAISS_BLAS_THRESHOLD,
        )
        try:
            yield
        finally:
            variables.distance_compute_blas_threshold = default
