"""Rivals of score_topk: torch, FAISS, implicit and USearch. Each returns rows [B, k] int64 and scores [B, k]."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.score_topk import UserLists

FAISS_BLAS_THRESHOLD = 800
"""Below n_queries * dim = 128000, FAISS reads the whole table once per query; with 800, only for a few queries."""

PACKAGES = {"faiss": "faiss-cpu", "implicit": "implicit", "usearch": "usearch"}
"""Module -> what pip calls it."""

Found = tuple[Tensor, Tensor]


def why_not(module: str, device: torch.device) -> str | None:
    """Why a package cannot take part; None where it can."""
    if module == "torch":
        return None
    if device.type != "cpu":
        return "it runs on the CPU"
    if importlib.util.find_spec(module) is None:
        return f"it is not installed; `pip install {PACKAGES[module]}` adds this row"
    return None


# --- torch ------------------------------------------------------------------------------------------------------------


def torch_topk(query: Tensor, item_emb: Tensor, k: int) -> Found:
    """By way of all scores `[B, N]`."""
    scores, rows = torch.topk(torch.mm(query, item_emb.T), k, dim=1)
    return rows, scores


TILE = 128
SCORES_AT_ONCE = 8 << 30
"""Bytes of scores that the rivals on a GPU hold at a time; more queries than that are scored in parts."""


def torch_topk_tiles(query: Tensor, item_emb: Tensor, k: int) -> Found:
    """The same, and exact: an item of the best k lies in one of the k tiles with the highest maxima, or in the rest."""
    return _best_of_tiles(torch.mm(query, item_emb.T), k)


def torch_topk_int8(query: tuple[Tensor, Tensor], item_emb: tuple[Tensor, Tensor], k: int) -> Found:
    """Rows of int8 and their scales (`in_int8`), of queries and of items; the product takes 17 rows or more."""
    rows, scale = query
    some = F.pad(rows, (0, 0, 0, max(0, 32 - len(rows))))
    products = torch._int_mm(some, item_emb[0].T)[: len(rows)]
    found, scores = _best_of_tiles(products * item_emb[1], k)  # a query's own scale changes no order
    return found, scores * scale[:, None]


def in_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to 127 steps of their largest magnitude each, and the steps."""
    scale = rows.abs().amax(1).clamp(min=1e-30) / 127
    return (rows / scale[:, None]).round().to(torch.int8), scale


def _best_of_tiles(scores: Tensor, k: int) -> Found:
    n_rows = scores.shape[1]
    tiles = n_rows // TILE
    if tiles <= k:
        best, rows = torch.topk(scores, k, dim=1)
        return rows, best
    tiled = scores[:, : tiles * TILE].unflatten(1, (tiles, TILE))
    chosen = tiled.amax(2).topk(k, dim=1).indices
    places = torch.arange(TILE, device=scores.device)
    rows = (chosen[:, :, None] * TILE + places).flatten(1)
    rest = torch.arange(tiles * TILE, n_rows, device=scores.device).expand(len(scores), -1)
    rows = torch.cat([rows, rest], dim=1)
    best, which = torch.topk(scores.gather(1, rows), k, dim=1)
    return rows.gather(1, which), best


def users_at_once(n_users: int, n_items: int, itemsize: int, device: torch.device) -> int:
    """How many users' scores a rival holds together: all of them on a CPU, a power of two on a GPU."""
    fitting = SCORES_AT_ONCE // (n_items * itemsize)
    return n_users if device.type != "cuda" or n_users <= fitting else 1 << (fitting.bit_length() - 1)


def torch_topk_denied(item_emb: Tensor, denied: UserLists, query: Tensor, k: int) -> Found:
    """The same with -inf written at what is denied."""
    scores = torch.mm(query, item_emb.T)
    scores[denied.users(), denied.values] = -torch.inf
    best, rows = torch.topk(scores, k, dim=1)
    return rows, best


def torch_topk_of(item_emb: Tensor, allowed: Tensor, query: Tensor, k: int) -> Found:
    """The same over the rows named, which are gathered first."""
    rows, scores = torch_topk(query, item_emb[allowed], k)
    return allowed[rows], scores


def torch_topk_candidates(item_emb: Tensor, candidates: Tensor, query: Tensor, k: int) -> Found:
    """Each user's own candidates `[B, C]`, gathered and scored."""
    scores, places = torch.topk(torch.bmm(item_emb[candidates], query.unsqueeze(2)).squeeze(2), k, dim=1)
    return candidates.gather(1, places), scores


# --- FAISS ------------------------------------------------------------------------------------------------------------


class Faiss:
    """IndexFlatIP over a table, on as many threads as torch has; with a selector where only `allowed [N]` rows may be
    returned."""

    def __init__(self, item_emb: Tensor, tuned: bool, allowed: Tensor | None = None) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        self._faiss, self._tuned = faiss, tuned
        self._index = faiss.IndexFlatIP(item_emb.shape[1])
        self._index.add(item_emb.numpy())
        self._parameters = None
        if allowed is not None:
            bits = np.packbits(allowed.numpy(), bitorder="little")
            self._parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))

    def search(self, query: Tensor, k: int) -> Found:
        with self._threshold():
            scores, rows = self._index.search(query.numpy(), k, params=self._parameters)
        return torch.from_numpy(rows), torch.from_numpy(scores)

    def search_denied(self, denied: UserLists, query: Tensor, k: int) -> Found:
        """It knows no lists per query but through a Python loop; so as many more as the longest list has rows are asked
        for, and then those on a user's list are dropped."""
        rows, scores = self.search(query, k + int(denied.offsets.diff().max()))
        n_rows = self._index.ntotal
        own = torch.arange(len(query))[:, None] * n_rows + rows
        dropped = torch.from_numpy(np.isin(own.numpy(), (denied.users() * n_rows + denied.values).numpy()))
        kept = dropped.byte().argsort(dim=1, stable=True)[:, :k]
        return rows.gather(1, kept), scores.gather(1, kept)

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


# --- implicit, USearch ------------------------------------------------------------------------------------------------


class Implicit:
    """implicit.cpu.topk, what its models' recommend() calls; its filters are CSR rows per user, or a list of items."""

    def __init__(self, item_emb: Tensor, denied: UserLists | None = None, allowed: Tensor | None = None) -> None:
        import threadpoolctl
        from implicit.cpu.topk import topk
        from scipy.sparse import csr_matrix

        self._threads = torch.get_num_threads()
        threadpoolctl.threadpool_limits(self._threads, user_api="blas")  # of numpy's product inside
        self._topk, self._items = topk, item_emb.numpy()
        self._denied = None
        if denied is not None:
            ones = np.ones(denied.values.numel(), dtype=np.float32)
            shape = (denied.n_users, len(item_emb))
            self._denied = csr_matrix((ones, denied.values.int().numpy(), denied.offsets.int().numpy()), shape=shape)
        self._allowed = None if allowed is None else allowed.nonzero().flatten().numpy()

    def search(self, query: Tensor, k: int) -> Found:
        # its models gather the rows of a list of candidates in every call, and so does this
        items = self._items if self._allowed is None else self._items[self._allowed]
        with _without_stderr():
            rows, scores = self._topk(
                items, query.numpy(), k, filter_query_items=self._denied, num_threads=self._threads
            )
        rows = rows.astype(np.int64) if self._allowed is None else self._allowed[rows]
        return torch.from_numpy(rows), torch.from_numpy(scores)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """implicit calls numpy's OpenBLAS from an OpenMP loop when it has more than 100 queries, which prints a warning per
    product; with one BLAS thread it would not, and be slower."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def usearch_exact(query: Tensor, item_emb: Tensor, k: int) -> Found:
    """USearch without an index; its distance is 1 - the inner product."""
    from usearch.index import MetricKind, search

    found = search(
        item_emb.numpy(), query.numpy(), k, MetricKind.IP, exact=True, threads=torch.get_num_threads(), dtype="f32"
    )
    rows = torch.from_numpy(found.keys.astype(np.int64)).view(len(query), k)  # one query comes back without its axis
    return rows, 1.0 - torch.from_numpy(found.distances).view(len(query), k)
