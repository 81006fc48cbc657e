"""score_topk in C++ (csrc/cpu/score_topk_search.cpp)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.ops.score_topk import check_topk
from fastdiff.ops.topk_scan import STORED, ScanTable
from fastdiff.ops.user_lists import UserLists


@cache
def _op() -> Any:
    return torch.ops.fastdiff.score_topk.default


def score_topk(
    query: Tensor,
    item_emb: Tensor,
    k: int,
    allowed: Tensor | None = None,
    user_exclude: UserLists | None = None,
    user_candidates: UserLists | None = None,
    scan: ScanTable | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastdiff.ops.score_topk.score_topk_ref`: the same bits."""
    check_topk(query, item_emb, k, allowed, user_exclude, user_candidates, scan)
    scan = ScanTable.build(item_emb) if scan is None else scan.to_scan(item_emb)
    try:
        found: tuple[Tensor, Tensor] = _op()(
            query,
            item_emb,
            k,
            allowed,
            None if user_exclude is None else user_exclude.values,
            None if user_exclude is None else user_exclude.offsets,
            None if user_candidates is None else user_candidates.values,
            None if user_candidates is None else user_candidates.offsets,
            STORED[scan.dtype],
            [] if scan.dtype == torch.float32 else scan.chunks,
            scan.bounds,
            scan.certified,
        )
    except RuntimeError as error:  # queries that are not finite, listed rows that do not exist
        message = str(error)
        at = message.find("score_topk: ")
        if at < 0:
            raise
        raise InvalidArgument(message[at:].splitlines()[0]) from None
    return found
