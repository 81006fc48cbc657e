"""ItemCatalog: the items that can be recommended, their external ids and vectors, and the ranking over them.

A catalogue is an immutable snapshot over one table of rows: the rows of a model's item table, special rows (pad, mask)
included, then the items added later. `add`, `update` and `remove` return a new snapshot and leave the old one as it
was, so readers in other threads need no lock. Snapshots share what did not change:

    add      appends behind the table; the whole table is copied only when its buffer is full (the first time, and then
             each time it has grown by a quarter)
    update   copies the table, and shares the ids
    remove   shares the table: the row stays, known to histories that hold the item, is never recommended again, and its
             external id is free for another item
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import catalog_files
from fastdiff.arithmetic import in_plain_arithmetic
from fastdiff.config import AGGREGATIONS
from fastdiff.device_ids import DeviceIds
from fastdiff.errors import CatalogError, InvalidArgument
from fastdiff.item_ids import (
    IdArray,
    IntArray,
    IntegerIds,
    ItemIds,
    RowIds,
    StringIds,
    as_id_array,
    check_new_ids,
    shown,
)
from fastdiff.item_ids import item_ids as make_ids
from fastdiff.item_vectors import ItemVectors, normalize
from fastdiff.ops.backend import BoundOp
from fastdiff.ops.score_topk import SCAN_DTYPES, UserLists, merge_topk, score_topk, topk_of_rows
from fastdiff.ops.topk_definition import sum_in_order
from fastdiff.ops.user_lists import describe, dtype_name
from fastdiff.staging import upload

if TYPE_CHECKING:
    from fastdiff._C import ItemIndex


_FEW = 64
"""A gathered row costs about what so many rows of an int8 scan do: it is read, copied, bounded and read once more."""


@dataclass(eq=False)
class TopK:
    """rows [B, K] int64, -1 for none; scores [B, K] float32, -inf for none."""

    rows: Tensor
    scores: Tensor

    @cached_property
    def num_valid(self) -> Tensor:
        """[B] int64, how many of the places are filled."""
        return (self.rows >= 0).sum(1)


class ItemCatalog:
    """One snapshot of the items.

    item_emb    [N, D] floating, finite: every row is an item (`from_table` for a model's table). It is kept, not
                copied: do not write into it afterwards
    item_ids    one external id per item, all integers or all strings, each once; None: the row numbers
    metric      "dot", or "cosine": the dot product of vectors divided by their norms, in float32
    scan_dtype  what a ranking scans: torch.float32, bfloat16, float16 or int8; never changes the answer.
                None: the table itself in float32, but the C++ engine makes an int8 copy when it first ranks (a quarter
                of the table's memory more), which is the fastest for one user and for many

    n_items, n_rows  how many items, and rows of the table: items, special rows and removed items
    is_item          [n_rows] bool            special_rows  row -> name of the rows that never were items
    dim, device      of the table

    Raises CatalogError for wrong ids, and InvalidArgument for wrong vectors, metrics and dtypes.
    """

    def __init__(
        self, item_emb: Tensor, item_ids: Any = None, metric: str = "dot", scan_dtype: torch.dtype | None = None
    ) -> None:
        built = self.from_table(item_emb, {}, item_ids, metric, scan_dtype)
        self._set(built._vectors, built._ids, built.is_item, built.special_rows)

    @classmethod
    def from_table(
        cls,
        item_table: Tensor,
        special_rows: dict[int, str],
        item_ids: Any = None,
        metric: str = "dot",
        scan_dtype: torch.dtype | None = None,
    ) -> ItemCatalog:
        """From a model's item table [R, D], whose rows are items but for `special_rows` (row -> name, e.g. "[PAD]").

        item_ids  one per item, in row order; None: the row numbers
        """
        table = _vectors(item_table, None, "ItemCatalog: item_emb")
        is_item = torch.ones(len(table), dtype=torch.bool)
        for row in special_rows:
            if not 0 <= row < len(table):
                raise InvalidArgument(f"ItemCatalog: special_rows must be rows 0..{len(table) - 1} (got {row})")
            is_item[row] = False
        vectors = ItemVectors.build(table, metric, scan_dtype)
        ids = make_ids(item_ids, is_item.numpy(), dict(special_rows), "ItemCatalog: item_ids")
        return cls._snapshot(vectors, ids, is_item.to(table.device), dict(special_rows))

    @classmethod
    def _snapshot(cls, vectors: ItemVectors, ids: ItemIds, is_item: Tensor, special: dict[int, str]) -> ItemCatalog:
        catalog = cls.__new__(cls)
        catalog._set(vectors, ids, is_item, special)
        return catalog

    def _set(self, vectors: ItemVectors, ids: ItemIds, is_item: Tensor, special: dict[int, str]) -> None:
        self._vectors, self._ids, self.is_item, self.special_rows = vectors, ids, is_item, special
        self.n_items = int(is_item.sum())
        self.n_rows, self.dim = vectors.table.shape
        self.device = is_item.device

    # --- facts --------------------------------------------------------------------------------------------------------

    @property
    def table(self) -> Tensor:
        """[n_rows, D]: every row as it came, in its dtype."""
        return self._vectors.table

    @property
    def metric(self) -> str:
        return self._vectors.metric

    @property
    def scan_dtype(self) -> torch.dtype:
        return self._vectors.scan.dtype

    @property
    def has_row_ids(self) -> bool:
        """Whether external ids are the row numbers."""
        return self._ids.kind == "row"

    @property
    def id_type(self) -> type[int] | type[str]:
        """What external ids are."""
        return str if self._ids.kind == "str" else int

    @cached_property
    def item_ids(self) -> tuple[int, ...] | tuple[str, ...]:
        """The external id of each item, in row order."""
        return self._ids.listed()

    def describe_ids(self) -> str:
        """What ids there are, for a message: "ids 1..12101"."""
        return self._ids.describe()

    def __len__(self) -> int:
        return self.n_items

    def __repr__(self) -> str:
        scan = "" if self.scan_dtype == torch.float32 else f", scan_dtype={dtype_name(self.scan_dtype)}"
        others = self.n_rows - self.n_items
        return (
            f"ItemCatalog({self.n_items} items ({self.describe_ids()}), {others} other rows, dim={self.dim}, "
            f"{dtype_name(self.table.dtype)}, metric={self.metric!r}{scan}, device={self.device})"
        )

    # --- ids ----------------------------------------------------------------------------------------------------------

    def lookup(self, ids: Any) -> IntArray:
        """The row of each id of a flat sequence, array or tensor, as numpy int64; -1 for ids that name no item."""
        return self._ids.lookup(as_id_array(ids, "ItemCatalog.lookup: ids"))

    def known(self, ids: Any) -> IntArray:
        """Like `lookup`, but removed items count too: histories may still hold them."""
        return self._ids.known(as_id_array(ids, "ItemCatalog.known: ids"))

    def rows(self, ids: Any) -> Tensor:
        """The row of each id of a flat sequence, array or tensor, int64 on the CPU; CatalogError for unknown ids."""
        return torch.from_numpy(self._known(as_id_array(ids, "ItemCatalog.rows: ids"), "ItemCatalog.rows: ids"))

    @property
    def index(self) -> ItemIndex | None:
        """`known` in C++, which reads lists of ids itself; None where fastdiff._C was not built."""
        return self._ids.index

    @cached_property
    def device_ids(self) -> DeviceIds:
        """The ids as tensors where the catalogue is; there are none of strings."""
        return DeviceIds(self._ids, self.device)

    def external(self, rows: Tensor) -> Tensor | IdArray:
        """The external id of each row [B, K], -1 standing for none.

        Integers: int64, -1 for none; a special row is -1 too, but its row number where ids are row numbers.
        Strings: a numpy object array, None for none, and the names of special rows, such as "[PAD]".
        """
        if rows.is_cpu or self.id_type is str:
            return self._ids.external(rows)
        return self.device_ids.external(rows)

    def _known(self, ids: IdArray, where: str) -> IntArray:
        rows = self._ids.lookup(ids)
        if (rows < 0).any():
            at = int(np.flatnonzero(rows < 0)[0])
            raise CatalogError(
                f"{where}[{at}] is {shown(ids, at)}, which is no item; the catalogue has {self.describe_ids()}"
            )
        return rows

    # --- changes ------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, item_ids: Any, item_emb: Tensor) -> ItemCatalog:
        """A new snapshot with more items behind the table: ids that no item has yet, and their vectors [n, D]."""
        where = "ItemCatalog.add: item_ids"
        ids = as_id_array(item_ids, where)
        check_new_ids(ids, where)
        if not self._ids.takes(ids):
            kinds = "strings" if self.id_type is str else "integers"
            raise CatalogError(f"{where}: must be {kinds} like the ids of this catalogue (got {shown(ids, 0)})")
        taken = np.flatnonzero(self._ids.lookup(ids) >= 0)
        if len(taken):
            at = int(taken[0])
            raise CatalogError(
                f"{where}[{at}] is {shown(ids, at)}, which an item has already; use update() to change it"
            )
        vectors = self._vectors.append(self._checked(item_emb, len(ids), "ItemCatalog.add: item_emb"))
        return self._snapshot(
            vectors, self._ids.added(ids), F.pad(self.is_item, (0, len(ids)), value=True), self.special_rows
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, item_ids: Any, item_emb: Tensor) -> ItemCatalog:
        """A new snapshot in which the items named have other vectors [n, D]."""
        where = "ItemCatalog.update: item_ids"
        ids = as_id_array(item_ids, where)
        check_new_ids(ids, where)
        rows = torch.from_numpy(self._known(ids, where)).to(self.device)
        vectors = self._vectors.replace(rows, self._checked(item_emb, len(ids), "ItemCatalog.update: item_emb"))
        return self._snapshot(vectors, self._ids, self.is_item, self.special_rows)

    @torch.inference_mode(False)
    @torch.no_grad()
    def remove(self, item_ids: Any) -> ItemCatalog:
        """A new snapshot without the items named."""
        where = "ItemCatalog.remove: item_ids"
        ids = as_id_array(item_ids, where)
        check_new_ids(ids, where)
        rows = self._known(ids, where)
        is_item = self.is_item.clone()
        is_item[torch.from_numpy(rows).to(self.device)] = False
        return self._snapshot(self._vectors, self._ids.removed(rows), is_item, self.special_rows)

    def to(self, device: torch.device | str) -> ItemCatalog:
        """The catalogue on another device; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        vectors = ItemVectors.build(self.table.to(device), self.metric, self._vectors.scan.choice)
        return self._snapshot(vectors, self._ids, self.is_item.to(device), self.special_rows)

    def _checked(self, item_emb: Tensor, n: int, where: str) -> Tensor:
        vectors = _vectors(item_emb, self.dim, where)
        if len(vectors) != n:
            raise InvalidArgument(f"{where}: must hold one row per id, {n} (got {len(vectors)})")
        if vectors.dtype == self.table.dtype:
            return vectors.to(self.device)
        return _vectors(vectors.to(self.device, self.table.dtype), self.dim, where)  # which may have overflowed

    # --- ranking ------------------------------------------------------------------------------------------------------

    @in_plain_arithmetic
    def topk(
        self,
        query: Tensor,
        k: int,
        *,
        exclude_rows: Tensor | None = None,
        candidate_rows: Tensor | None = None,
        user_exclude: UserLists | None = None,
        user_candidates: UserLists | None = None,
        aggregation: str = "max",
        published: bool = False,
        n_published_rows: int | None = None,
        zeroed: UserLists | None = None,
        topk_op: BoundOp | None = None,
    ) -> TopK:
        """The k best items of each user: score descending, then row ascending.

        query             [B, D], or [B, M, D] with M samples per user; floating, scored as float32
        exclude_rows      [E] int64 rows that no user is shown        user_exclude     the same, per user
        candidate_rows    [C] int64, the only rows shown at all       user_candidates  the same, per user
        aggregation       of the M scores of an item: "max"; or "mean", which is the score of the mean query, taken in
                          float64 over the samples (normalised first where the metric is cosine) and rounded to float32
        published         rank as the authors do: all rows, special ones too, without filters
        n_published_rows  with `published`: only the first rows, which the authors' table had; None: all
        zeroed            with `published`: per user, rows whose score counts as 0
        topk_op           a bound `score_topk`; None: the best for the device
        """
        query, n_samples = self._queries(query, aggregation)
        _check_k(k)
        device, few = self.device, None
        if published:
            unfiltered = exclude_rows is None and candidate_rows is None
            if not (unfiltered and user_exclude is None and user_candidates is None):
                raise InvalidArgument("ItemCatalog.topk: published=True takes no filters; use published=False")
            n_rows = self.n_rows if n_published_rows is None else n_published_rows
            if not 0 <= n_rows <= self.n_rows:
                raise InvalidArgument(f"ItemCatalog.topk: n_published_rows must be 0..{self.n_rows} (got {n_rows})")
            allowed, user_exclude = None, zeroed
        else:
            if zeroed is not None or n_published_rows is not None:
                raise InvalidArgument("ItemCatalog.topk: zeroed and n_published_rows need published=True")
            n_rows = self.n_rows
            if candidate_rows is not None and self._worth_gathering(candidate_rows.numel()):
                few, candidate_rows = self._checked_rows(candidate_rows, "candidate_rows"), None
            allowed = self._allowed(exclude_rows, candidate_rows)
        if user_exclude is not None:
            user_exclude = user_exclude.to(device).repeat(n_samples)
        if user_candidates is not None:
            user_candidates = user_candidates.to(device).repeat(n_samples)
        op = topk_op or self._topk_op
        table, scan = self._vectors.scored, self._vectors.scan
        if n_rows != self.n_rows:
            table, scan = table[:n_rows], scan[:n_rows]
        if few is not None:
            rows, scores = topk_of_rows(op, query, table, k, few, allowed, user_exclude, user_candidates)
        else:
            rows, scores = op(query, table, k, allowed, user_exclude, user_candidates, scan)
        if n_samples != 1:
            wide = (query.shape[0] // n_samples, n_samples * k)
            rows, scores = merge_topk(rows.view(wide), scores.view(wide), k)
        if published and zeroed is not None:
            zero_rows = _first_rows(zeroed.to(device), k, n_rows)
            zero_scores = torch.zeros(zero_rows.shape, device=device).masked_fill_(zero_rows < 0, -torch.inf)
            rows, scores = merge_topk(torch.cat([rows, zero_rows], 1), torch.cat([scores, zero_scores], 1), k)
        return TopK(rows, scores)

    @cached_property
    def _topk_op(self) -> BoundOp:
        """`score_topk` bound once: to ask what can run here takes a third as long as to rank a small catalogue."""
        return score_topk.bind("auto", self.device)

    def _queries(self, query: Tensor, aggregation: str) -> tuple[Tensor, int]:
        """[B * M, D] float32 as it is scored, and M, which is 1 where the samples are averaged."""
        if not isinstance(query, Tensor) or not query.is_floating_point() or query.ndim not in (2, 3):
            raise InvalidArgument(
                f"ItemCatalog.topk: query must be a floating [B, D] or [B, M, D] tensor (got {describe(query)})"
            )
        shape, metric = query.shape, self._vectors.metric
        if shape[-1] != self.dim or 0 in shape[1:-1]:
            raise InvalidArgument(
                f"ItemCatalog.topk: query must hold vectors of {self.dim} numbers, one or more per user "
                f"(got shape {list(shape)})"
            )
        if query.device != self.device:
            raise InvalidArgument(
                f"ItemCatalog.topk: query must be where the catalogue is, {self.device} (got {query.device}); move it"
            )
        if aggregation not in AGGREGATIONS:
            raise InvalidArgument(
                f"ItemCatalog.topk: aggregation must be one of {', '.join(AGGREGATIONS)} (got {aggregation!r})"
            )
        if query.dtype != torch.float32 or query.requires_grad:
            query = query.detach().float()
        query = query if metric == "dot" else normalize(query)
        if len(shape) == 2:
            return query, 1
        n_samples = shape[1]
        if aggregation == "mean" and n_samples > 1:
            by_sample = query.transpose(1, 2)
            return (sum_in_order(by_sample, torch.ones_like(by_sample)) / n_samples).float(), 1
        return query.reshape(-1, self.dim), n_samples

    def _allowed(self, exclude_rows: Tensor | None, candidate_rows: Tensor | None) -> Tensor | None:
        """[n_rows] bool; None where every row may be shown."""
        if exclude_rows is not None:
            exclude_rows = self._checked_rows(exclude_rows, "exclude_rows")
        if candidate_rows is not None:
            candidate_rows = self._checked_rows(candidate_rows, "candidate_rows")
        return self._allowed_of(exclude_rows, candidate_rows)

    def _allowed_of(self, exclude: Tensor | None, candidates: Tensor | None) -> Tensor | None:
        """The same of rows that are checked, on the catalogue's device, which is not waited for."""
        allowed = self.is_item
        if candidates is not None:
            allowed = allowed & torch.zeros_like(allowed).index_fill_(0, candidates, True)
        if exclude is not None and exclude.numel():
            allowed = allowed.index_fill(0, exclude, False)
        elif candidates is None and self.n_items == self.n_rows:
            return None
        return allowed

    def _worth_gathering(self, n_candidates: int) -> bool:
        """Whether a table of the candidates alone is made sooner than this one is scanned with a mask of them.

        Known without a look at the device. The C++ engine reads few allowed rows where they lie; on a GPU, a table of
        2^28 numbers takes as long as the kernels that gather."""
        large = self.device.type != "cpu" and self.n_rows * self.dim >= 1 << 28
        return large and _FEW * n_candidates <= self.n_rows

    def _checked_rows(self, rows: Tensor, name: str) -> Tensor:
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise InvalidArgument(f"ItemCatalog.topk: {name} must be a flat int64 tensor (got {describe(rows)})")
        outside = rows[(rows < 0) | (rows >= self.n_rows)]
        if outside.numel():
            raise InvalidArgument(
                f"ItemCatalog.topk: {name} must hold rows 0..{self.n_rows - 1} (got {int(outside[0])})"
            )
        return upload([rows], self.device)[0] if rows.is_cpu and not self.is_item.is_cpu else rows.to(self.device)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write catalog.safetensors and catalog.json into a folder, which is made where it is missing."""
        facts: dict[str, Any] = {
            "metric": self.metric,
            "scan_dtype": None if self._vectors.scan.choice is None else dtype_name(self.scan_dtype),
            "special_rows": {str(row): name for row, name in self.special_rows.items()},
            "ids": self._ids.kind,
        }
        # a copy, because safetensors refuses views of a longer buffer
        tensors = {"table": self.table.to("cpu", copy=True).contiguous(), "is_item": self.is_item.cpu()}
        if isinstance(self._ids, IntegerIds):
            tensors["item_ids"] = torch.from_numpy(self._ids.by_row)
        elif isinstance(self._ids, StringIds):
            facts["item_ids"] = self._ids.by_row.tolist()
        catalog_files.write(Path(folder), facts, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> ItemCatalog:
        """The catalogue that `save` wrote, on the CPU. Raises CatalogError naming the file and what is wrong in it."""
        facts, tensors = catalog_files.read(Path(folder))
        try:
            special = {int(row): str(name) for row, name in facts["special_rows"].items()}
            is_item, kind = tensors["is_item"], facts["ids"]
            ids: ItemIds
            if kind == "row":
                ids = RowIds(is_item.numpy(), special)
            elif kind == "int":
                ids = IntegerIds(tensors["item_ids"].numpy(), is_item.numpy(), special)
            else:
                ids = StringIds(np.array(facts["item_ids"], dtype=object), is_item.numpy(), special)
            scan_dtypes: dict[str | None, torch.dtype | None] = {dtype_name(dtype): dtype for dtype in SCAN_DTYPES}
            scan_dtype = (scan_dtypes | {None: None})[facts["scan_dtype"]]
            vectors = ItemVectors.build(tensors["table"], facts["metric"], scan_dtype)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CatalogError(
                f"{Path(folder) / catalog_files.FACTS_FILE}: is damaged ({error!r}); save the catalogue again"
            ) from error
        return cls._snapshot(vectors, ids, is_item, special)


def _first_rows(lists: UserLists, k: int, n_rows: int) -> Tensor:
    """[B, min(k, longest)]: each user's k lowest rows, each once, -1 where there are fewer."""
    pairs = torch.unique(lists.users() * max(1, n_rows) + lists.values)
    users, rows = pairs // max(1, n_rows), pairs % max(1, n_rows)
    counts = torch.bincount(users, minlength=lists.n_users)
    place = torch.arange(users.numel(), device=users.device) - (counts.cumsum(0) - counts)[users]
    width = min(k, int(counts.max()) if counts.numel() else 0)
    first = torch.full((lists.n_users, width), -1, dtype=torch.int64, device=rows.device)
    kept = place < width
    first[users[kept], place[kept]] = rows[kept]
    return first


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidArgument(f"ItemCatalog.topk: k must be an integer of at least 1 (got {k!r})")


def _vectors(vectors: Tensor | npt.NDArray[Any], dim: int | None, where: str) -> Tensor:
    if isinstance(vectors, np.ndarray) and vectors.dtype.kind == "f":
        vectors = torch.from_numpy(vectors)
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or not vectors.is_floating_point():
        raise InvalidArgument(f"{where}: must be a floating tensor [n, D] (got {describe(vectors)})")
    if vectors.shape[1] == 0 or dim not in (None, vectors.shape[1]):
        wanted = "at least 1 number" if dim is None else f"{dim} numbers"
        raise InvalidArgument(f"{where}: vectors must have {wanted} (got shape {list(vectors.shape)})")
    if vectors.numel():
        low, high = torch.aminmax(vectors)  # NaN shows in both
        if not (bool(low.isfinite()) and bool(high.isfinite())):
            row = int((~vectors.isfinite().all(dim=1)).nonzero()[0])
            raise InvalidArgument(f"{where}[{row}]: holds NaN or infinity; vectors must be finite")
        if float(high.abs().maximum(low.abs())) > torch.finfo(torch.float32).max:
            row = int((vectors.abs() > torch.finfo(torch.float32).max).any(dim=1).nonzero()[0])
            raise InvalidArgument(f"{where}[{row}]: holds a number that float32 cannot; scale the vectors down")
    return vectors.detach()
