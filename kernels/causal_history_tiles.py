"""Tiles, warps and stages of the kernels over packed histories: what serves everywhere, and what a GPU may prefer.

More rows read the weights less often and leave fewer programs; two stages in place of three leave room for another
program beside it, and for smaller GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastdiff.kernels.causal_transformer import CASES, DTYPES, BlockSizes, stage_bytes
from fastdiff.kernels.packing import LEAST
from fastdiff.kernels.padded_transformer import dtype_key
from fastdiff.kernels.tuning import Config, Key, bucket

_MANY_ROWS = 64 * 128  # from here on the larger tiles still give every multiprocessor of a large GPU one
MOST_ROWS = 64
"""Of a tile: buffers hold whole tiles of as many."""


def row_key(sizes: BlockSizes, dtype: torch.dtype, n_rows: int) -> Key:
    """What decides the tiles of `n_rows` rows."""
    many = "many" if n_rows >= _MANY_ROWS else "few"
    return bucket(n_rows), many, sizes.block_d, sizes.block_e, sizes.padded_hidden, dtype_key(dtype)


def row_candidates(rows: int, many: str, block_d: int, block_e: int, padded_hidden: int, dtype: str) -> list[Config]:
    """Of the kernels that act on rows."""
    half, wide = dtype != "float32", block_d > 128
    units = min(padded_hidden, (32 if wide else 64) if half else 16)
    depth = 32 if half and block_d >= 32 else 16
    warps = 4 if block_d <= 64 else 8
    first = (32 if wide else MOST_ROWS) if half and many == "many" else 16
    shapes = [(first, warps, 3, units, depth), (first, warps, 2, units, depth)]
    if half and not wide:  # float32 and wide blocks would spill
        shapes.insert(1, (32, warps, 3, units, depth))
        shapes.insert(2, (16, 12 - warps, 3, units, depth) if first == 16 else (16, warps, 3, units, depth))
    if wide:
        shapes.append((16, warps, 2, 16, 16))
    return [
        Config(
            {"BLOCK_R": block_r, "BLOCK_F": block_f, "BLOCK_K": block_k},
            num_warps,
            stages,
            maxnreg=None if half else 255,  # else ptxas spills to make room for another program
            shared=(stages - 1) * stage_bytes(block_r, block_f, block_k, block_d, block_e, 2 if half else 4),
        )
        for block_r, num_warps, stages, block_f, block_k in shapes
    ]


def attend_key(sizes: BlockSizes, dtype: torch.dtype, longest: int, only_last: bool) -> Key:
    """What decides the tiles of attention over at most `longest` slots."""
    return bucket(longest, least=LEAST), "last" if only_last else "each", sizes.block_dh, dtype_key(dtype)


def attend_candidates(slots: int, which: str, block_dh: int, dtype: str) -> list[Config]:
    """Of attention: queries of a program, and slots at a time. Other warps than the first one's, and more slots."""
    half = dtype != "float32"
    block_q = LEAST if which == "last" else min(32, slots)
    block_p = 32 if half else 16

    def config(block_q: int, block_p: int, fewer: int = 1) -> Config:
        warps = 2 if half and block_q * block_dh <= 1024 else 4
        return Config({"BLOCK_Q": block_q, "BLOCK_P": block_p}, max(1, warps // fewer), 2)

    found = [config(block_q, block_p), config(block_q, 2 * block_p)]
    if which == "each":
        found += [config(block_q, block_p, fewer=2), *([config(LEAST, block_p)] if block_q > LEAST else [])]
    return found


def row_cases() -> Iterator[tuple[str, BlockSizes, str, Config, bool]]:
    """Of each of `CASES`: dtype, sizes, "few" or "many" rows, and what a kernel on rows is launched with: unasked, or
    else where it was measured to be faster, of the sizes that are tuned, or where no other fits, of wide ones."""
    for name, sizes in CASES:
        seen: list[Config] = []
        for rows, n_rows in (("few", 1), ("many", _MANY_ROWS)):
            first, *others = row_candidates(*row_key(sizes, DTYPES[name], n_rows))  # type: ignore[arg-type]
            if first not in seen:
                yield name, sizes, rows, first, True
            others = others if _is_tuned(name, sizes) else others[-1:] if sizes.block_d > 128 else []
            new = [config for config in others if config not in seen]
            for config in new:
                yield name, sizes, f"{rows} {config.words()} stages={config.num_stages}", config, False
            seen += [first, *new]


def attend_cases() -> Iterator[tuple[str, BlockSizes, bool, Config, bool]]:
    """The same of attention; in place of the rows, whether only the last slots attend."""
    for name, sizes in CASES:
        for only_last in (False, True):
            first, *others = attend_candidates(*attend_key(sizes, DTYPES[name], 50, only_last))  # type: ignore[arg-type]
            yield name, sizes, only_last, first, True
            for config in others if _is_tuned(name, sizes) else []:
                yield name, sizes, only_last, config, False


def _is_tuned(name: str, sizes: BlockSizes) -> bool:
    return sizes.dim == 128 and name != "bf16"  # but for float16's twin
