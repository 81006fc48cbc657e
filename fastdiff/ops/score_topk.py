"""score_topk: the k best items of each query, exactly, without ever holding a score per item and user.

The answer is defined apart from how it is found (`topk_definition`), so that every backend, batch, chunk and shard
gives the same bits:

    score(b, n) = float32( ((q_0 e_0 + q_1 e_1) + q_2 e_2) + ... )    each product exact, each sum rounded to float64
    order       = score descending, then row ascending

A fast scan in lower precision (`topk_scan`) proposes rows; it drops a row only where a proven bound says that it cannot
be among the k best. What is left is scored by the definition. Where too many rows are within the bound (many equal
rows, norms out of scale), that query is scored by the definition throughout: slower, and the same answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.backend import Op
from fastdiff.ops.topk_definition import (
    NO_KEY,
    best_of_pairs,
    budget,
    from_keys,
    pair_scores,
    rows_of,
    slices,
    to_keys,
    topk_by_definition,
)
from fastdiff.ops.topk_scan import (
    LARGEST,
    SCAN_DTYPES,
    ScanTable,
    chunk_rows,
    scan_at_once,
    scan_in_chunks,
    worth_at_once,
)
from fastdiff.ops.user_lists import UserLists, describe

__all__ = ["SCAN_DTYPES", "ScanTable", "UserLists", "merge_topk", "score_topk", "score_topk_ref", "topk_of_rows"]


def score_topk_ref(
    query: Tensor,
    item_emb: Tensor,
    k: int,
    allowed: Tensor | None = None,
    user_exclude: UserLists | None = None,
    user_candidates: UserLists | None = None,
    scan: ScanTable | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of `item_emb` with the highest dot product with each query, in order (score desc, row asc).

    query            [B, D] float32, finite
    item_emb         [N, D] float32, finite, N < 2^31
    k                at least 1
    allowed          [N] bool, the rows that may be returned; None: all
    user_exclude     rows that may not be returned to each user, or None
    user_candidates  the only rows that may be returned to each user, or None; the three restrictions intersect
    scan             the table as the scan reads it; None: made for this call from `item_emb`, in float32
    Returns rows [B, k] int64 and scores [B, k] float32, filled with -1 and -inf where fewer than k rows are left.
    The score is the float64 dot product summed in index order, rounded once to float32; a zero is +0. Subnormal floats
    count, so torch.set_flush_denormal(True) changes the scores of vectors that hold them.
    Raises InvalidArgument for wrong shapes, dtypes and devices, rows outside the table, and queries with NaN or inf.
    The triton backend does not wait for a CUDA device to look at values: there, listed rows outside the table are
    ignored, and a query with NaN or inf is answered with rows -1 and scores NaN.
    """
    check_topk(query, item_emb, k, allowed, user_exclude, user_candidates, scan)
    check_rows(item_emb.shape[0], user_exclude, user_candidates)
    n_users, n_rows = query.shape[0], item_emb.shape[0]
    if n_users == 0 or n_rows == 0:
        return _nothing(n_users, k, query.device)
    if user_candidates is not None:
        check_finite(query)
        users, rows = _candidate_pairs(user_candidates, n_rows, allowed, user_exclude)
        return from_keys(best_of_pairs(users, rows, pair_scores(query, item_emb, users, rows), n_users, k))
    if scan is None:
        scan = ScanTable.build(item_emb)
    if allowed is not None and 4 * int(allowed.sum()) <= n_rows:
        return _topk_of_few(query, item_emb, k, allowed, user_exclude, scan)
    found, wanted = [], min(k, n_rows)
    for lo, hi in slices(n_users, 4 * budget(query.device) // chunk_rows(n_users, n_rows, k, query.device)):
        excluded = _between(user_exclude, lo, hi)
        found.append(_topk_of_users(query[lo:hi], item_emb, wanted, allowed, excluded, scan))
    rows, scores = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    if k > wanted:
        return F.pad(rows, (0, k - wanted), value=-1), F.pad(scores, (0, k - wanted), value=-torch.inf)
    return rows, scores


score_topk = Op(
    "score_topk",
    score_topk_ref,
    {"cpu": "fastdiff.ops.cpu.score_topk:score_topk", "triton": "fastdiff.kernels.score_topk:score_topk"},
)


def topk_of_rows(
    op: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    item_emb: Tensor,
    k: int,
    rows: Tensor,
    allowed: Tensor | None = None,
    user_exclude: UserLists | None = None,
    user_candidates: UserLists | None = None,
) -> tuple[Tensor, Tensor]:
    """`op`, a bound `score_topk`, where only `rows` may be returned: what it gives with a mask of them, bit for bit.

    rows  [C] int64 on the device of the query, each within the table; a row may stand more than once
    The rows are gathered into a table of their own, in their order, so that ties fall as before; the other rows are
    not read. No value is looked at, so a CUDA device is not waited for.
    """
    rows = rows.sort().values
    n_rows = rows.numel()
    padded = F.pad(rows, (0, 1), value=-1)  # a last row that is not allowed, for whatever is listed and not gathered
    at = padded.clamp(min=0)
    may = padded >= 0
    may[1:] &= padded[1:] != padded[:-1]
    if allowed is not None:
        may &= allowed[at]

    def found_in(lists: UserLists | None) -> UserLists | None:
        if lists is None:
            return None
        place = torch.searchsorted(rows, lists.values)
        return UserLists.trusted(torch.where(padded[place] == lists.values, place, n_rows), lists.offsets)

    found, scores = op(query, item_emb[at], k, may, found_in(user_exclude), found_in(user_candidates))
    return torch.where(found >= 0, padded[found.clamp(min=0)], -1), scores


def merge_topk(rows: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of several top-k lists side by side: of the shards of a table, or of the samples of a user.

    rows    [B, P] int64, -1 for none; a row may stand more than once, and then its highest score counts
    scores  [B, P] float32
    Returns rows [B, k] and scores [B, k] in the order of `score_topk`, filled with -1 and -inf.
    """
    if rows.ndim != 2 or rows.shape != scores.shape or rows.dtype != torch.int64 or scores.dtype != torch.float32:
        raise InvalidArgument(
            "merge_topk: rows must be [B, P] int64 and scores [B, P] float32 "
            f"(got {describe(rows)} and {describe(scores)})"
        )
    keys = to_keys(scores + 0.0, rows).masked_fill_(rows < 0, NO_KEY)
    keys = keys.sort(dim=1, descending=True).values
    by_row, order = rows_of(keys).sort(dim=1, stable=True)  # equal rows keep their order, the best first
    keys = keys.gather(1, order)
    keys[:, 1:].masked_fill_(by_row[:, 1:] == by_row[:, :-1], NO_KEY)
    best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return from_keys(F.pad(best, (0, k - best.shape[1]), value=NO_KEY))


# --- ways to the answer -----------------------------------------------------------------------------------------------


def _topk_of_users(
    query: Tensor, item_emb: Tensor, k: int, allowed: Tensor | None, exclude: UserLists | None, scan: ScanTable
) -> tuple[Tensor, Tensor]:
    """(rows, scores), k <= N: scan, then score what the scan keeps."""
    (n_users, dim), n_rows = query.shape, item_emb.shape[0]
    norm = float(torch.linalg.vector_norm(query, dim=1, dtype=torch.float64).max())
    if not norm * scan.looseness(dim) * max(scan.max_norm, 1.0) < LARGEST:  # also where it is NaN
        check_finite(query)
        return from_keys(_by_definition(query, item_emb, k, allowed, exclude, torch.arange(n_users).to(query.device)))
    denied = None if allowed is None else torch.where(allowed, 0.0, -torch.inf)
    if worth_at_once(n_users, n_rows, k, scan):
        found = scan_at_once(query, item_emb, k, denied, exclude, scan, scan.worst_slack(norm, dim))
        if found is not None:
            return found
    users, rows, too_many = scan_in_chunks(query, k, denied, exclude, scan)
    keys = best_of_pairs(users, rows, pair_scores(query, item_emb, users, rows), n_users, k)
    if too_many.numel():
        keys[too_many] = _by_definition(query, item_emb, k, allowed, exclude, too_many)
    return from_keys(keys)


def _by_definition(
    query: Tensor, item_emb: Tensor, k: int, allowed: Tensor | None, exclude: UserLists | None, users: Tensor
) -> Tensor:
    """[len(users), k] keys of some of the users, a few at a time, so that each step still holds many rows."""
    return torch.cat(
        [
            topk_by_definition(query[some], item_emb, k, allowed, None if exclude is None else exclude.select(some))
            for some in torch.split(users, 16)
        ]
    )


def _topk_of_few(
    query: Tensor, item_emb: Tensor, k: int, allowed: Tensor, exclude: UserLists | None, scan: ScanTable
) -> tuple[Tensor, Tensor]:
    """(rows, scores) over a small table of the allowed rows only; they keep their order, so ties fall as before."""
    kept = allowed.nonzero().flatten()
    if not kept.numel():
        return _nothing(query.shape[0], k, query.device)
    table = item_emb[kept]
    if exclude is not None:
        place = torch.searchsorted(kept, exclude.values).clamp(max=kept.numel() - 1)
        hit = kept[place] == exclude.values
        counts = torch.bincount(exclude.users()[hit], minlength=exclude.n_users)
        exclude = UserLists(place[hit], F.pad(counts.cumsum(0), (1, 0)))
    scan = ScanTable.build(table, certified=scan.certified)
    rows, scores = score_topk_ref(query, table, k, None, exclude, None, scan)
    return torch.where(rows >= 0, kept[rows.clamp(min=0)], -1), scores


def _candidate_pairs(
    candidates: UserLists, n_rows: int, allowed: Tensor | None, exclude: UserLists | None
) -> tuple[Tensor, Tensor]:
    """(users [P], rows [P]): each user's candidates that nothing else forbids, each once."""
    pairs = torch.unique(candidates.users() * n_rows + candidates.values)
    if exclude is not None:
        pairs = pairs[torch.isin(pairs, exclude.users() * n_rows + exclude.values, invert=True)]
    users, rows = pairs // n_rows, pairs % n_rows
    if allowed is None:
        return users, rows
    kept = allowed[rows]
    return users[kept], rows[kept]


def _between(lists: UserLists | None, lo: int, hi: int) -> UserLists | None:
    if lists is None or hi - lo == lists.n_users:
        return lists
    return lists.select(torch.arange(lo, hi, device=lists.values.device))


def _nothing(n_users: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.full((n_users, k), -1, dtype=torch.int64, device=device)
    return rows, torch.full((n_users, k), -torch.inf, device=device)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_topk(
    query: Tensor,
    item_emb: Tensor,
    k: int,
    allowed: Tensor | None,
    user_exclude: UserLists | None,
    user_candidates: UserLists | None,
    scan: ScanTable | None,
) -> None:
    """What every backend checks before it looks at a number."""
    wide, table = query.shape, item_emb.shape  # once: to ask a tensor takes a tenth of a microsecond
    if len(wide) != 2 or query.dtype != torch.float32 or wide[1] == 0:
        raise InvalidArgument(f"score_topk: query must be [B, D] float32, D at least 1 (got {describe(query)})")
    (n_users, dim), device = wide, query.device
    if len(table) != 2 or item_emb.dtype != torch.float32 or table[1] != dim:
        raise InvalidArgument(
            f"score_topk: item_emb must be [N, {dim}] float32, as wide as the query (got {describe(item_emb)})"
        )
    n_rows = table[0]
    if n_rows >= 1 << 31:
        raise InvalidArgument(
            f"score_topk: item_emb may hold at most 2^31 - 1 rows (got {n_rows}); score shards and merge_topk them"
        )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidArgument(f"score_topk: k must be an integer of at least 1 (got {k!r})")
    if item_emb.device != device:
        raise _elsewhere("item_emb", item_emb.device, device)
    if allowed is not None:
        if allowed.dtype != torch.bool or allowed.shape != (n_rows,):
            raise InvalidArgument(f"score_topk: allowed must be [{n_rows}] bool, one per row (got {describe(allowed)})")
        if allowed.device != device:
            raise _elsewhere("allowed", allowed.device, device)
    if scan is not None:
        if scan.n_rows != n_rows or scan.dim != dim:
            raise InvalidArgument(
                f"score_topk: scan must be of item_emb, {list(item_emb.shape)} (got {[scan.n_rows, scan.dim]})"
            )
        if scan.device != device:
            raise _elsewhere("scan", scan.device, device)
    for name, lists in (("user_exclude", user_exclude), ("user_candidates", user_candidates)):
        if lists is not None:
            if lists.n_users != n_users:
                raise InvalidArgument(
                    f"score_topk: {name} must hold one list per query, {n_users} (got {lists.n_users})"
                )
            if lists.values.device != device:
                raise _elsewhere(name, lists.values.device, device)


def _elsewhere(name: str, place: torch.device, device: torch.device) -> InvalidArgument:
    return InvalidArgument(f"score_topk: {name} must be where the query is, on {device} (got {place}); move it")


def check_rows(n_rows: int, user_exclude: UserLists | None, user_candidates: UserLists | None) -> None:
    """Waits for the device."""
    for name, lists in (("user_exclude", user_exclude), ("user_candidates", user_candidates)):
        if lists is not None and lists.values.numel():
            low, high = (int(bound) for bound in torch.aminmax(lists.values))
            if low < 0 or high >= n_rows:
                wrong = low if low < 0 else high
                raise InvalidArgument(f"score_topk: {name} must hold rows 0..{n_rows - 1} (got {wrong})")


def check_finite(query: Tensor) -> None:
    """Raise InvalidArgument where a query [.., D] holds NaN or infinity; waits for the device."""
    finite = query.isfinite().flatten(0, -2).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise InvalidArgument(
            f"score_topk: query must be finite (got NaN or infinity in query[{row}]); check the model's weights"
        )
