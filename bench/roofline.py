"""The roof: what the machine can do, measured in the same run, and how near to it a row comes.

A call that must read some bytes and do some operations takes at least

    max(bytes / read rate, operations / rate of the arithmetic)

and the share of the ceiling is that over the time that it took. The read rate is that of a buffer of the same size,
since a small table stays in a cache from call to call, and is read faster than memory can be.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIB = 1 << 20
READ_SIZES = tuple(size * MIB for size in (4, 16, 32, 64, 128, 256, 512, 1024))
"""The last of them is what counts as memory."""

PRODUCT_SIZE = 2048
GPU_PRODUCT_SIZE = 8192


def ceilings(device: torch.device) -> dict[str, Any]:
    """The machine's own limits, measured in a few seconds.

    gflops, gflops_bfloat16, gflops_int8   a large matrix product in that arithmetic (absent where torch has none)
    gbps                                   bytes read from memory, the best of several ways
    gbps_of                                [[bytes, the same for a buffer of that size], ..], CPU only
    """
    found: dict[str, Any] = {
        "gflops": _product_rate(device, torch.float32),
        "gflops_bfloat16": _product_rate(device, torch.bfloat16),
        "gflops_int8": _product_rate(device, torch.int8),
    }
    if device.type == "cuda":
        big = torch.randn(1 << 30, device=device)
        return found | {"gbps": 4 * big.numel() / _best_seconds(big.sum, device) / 1e9}
    buffer = torch.zeros(READ_SIZES[-1] // 4).add_(1.0)  # written, so that its pages exist
    by_size = [[size, read_rate(buffer[: size // 4])] for size in READ_SIZES]
    return found | {"gbps": by_size[-1][1], "gbps_of": by_size}


def describe(found: dict[str, Any]) -> str:
    """The ceilings in a line."""
    products = [
        f"{found[key]:,.0f} {unit} ({name})"
        for key, unit, name in (
            ("gflops", "GFLOP/s", "float32 product"),
            ("gflops_bfloat16", "GFLOP/s", "bfloat16"),
            ("gflops_int8", "GOP/s", "int8"),
        )
        if found.get(key)
    ]
    by_size = ", ".join(f"{size // MIB} MiB {rate:.0f}" for size, rate in found.get("gbps_of", []))
    return f"{', '.join(products)}, {found['gbps']:.0f} GB/s read" + (f" ({by_size})" if by_size else "")


# --- measuring --------------------------------------------------------------------------------------------------------


def read_rate(buffer: Tensor) -> float:
    """GB/s at which all threads read a float32 buffer on the CPU: the best of a sum, a dot product and memcmp."""
    threads = torch.get_num_threads()
    size = 4 * buffer.numel()
    half = size // 2 // threads * threads
    start, piece = buffer.data_ptr(), half // threads
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def compare(part: int) -> int:
        return int(memcmp(start + part * piece, start + half + part * piece, piece))

    with ThreadPoolExecutor(threads) as pool:
        ways = [
            (size, lambda: torch.dot(buffer, buffer)),
            (size, lambda: buffer.sum()),
            (2 * half, lambda: list(pool.map(compare, range(threads)))),
        ]
        return max(read / _best_seconds(way) for read, way in ways) / 1e9


def _product_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    size = GPU_PRODUCT_SIZE if device.type == "cuda" else PRODUCT_SIZE
    # random numbers: a GPU that multiplies ones draws less power, and runs faster than it can in earnest
    a = torch.randint(-127, 128, (size, size), device=device).to(dtype)
    if dtype != torch.int8:
        a = torch.randn(size, size, device=device).to(dtype)
    try:
        ways: list[Callable[[], Any]] = [lambda: torch._int_mm(a, a) if dtype == torch.int8 else a @ a]
        if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # what torch.compile calls: MKL, behind `@`, is half as fast on processors that are not Intel's
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], ""))
        taken = min(_best_seconds(way, device) for way in ways)
    except RuntimeError:  # this torch has no such product here
        return None
    return 2 * size**3 / taken / 1e9


def _best_seconds(call: Callable[[], Any], device: torch.device | None = None, repeats: int = 5) -> float:
    def finished() -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    call()
    best = float("inf")
    for _ in range(repeats):
        start = finished()
        call()
        best = min(best, finished() - start)
    return best


# --- a row under the roof ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Achieved:
    """GFLOP/s and GB/s of a row, None where its operations or bytes are not known; its share of the roof, 1 is all of
    it, and what that roof is made of: "memory" or "compute"."""

    gflops: float | None
    gbps: float | None
    share: float | None
    bound: str | None


def achieved(row: dict[str, Any]) -> Achieved:
    seconds, found = row["median_s"], row["ceilings"]
    rates = {name: row[name] / seconds / 1e9 if row.get(name) else None for name in ("flops", "bytes")}
    shares = []
    usable = row.get("arithmetic", "float32").split(" or ")
    product = max(found.get("gflops" if kind == "float32" else f"gflops_{kind}") or 0.0 for kind in usable)
    if rates["flops"] and product:
        shares.append((rates["flops"] / product, "compute"))
    if rates["bytes"]:
        shares.append((rates["bytes"] / _read_ceiling(row["bytes"], found), "memory"))
    share, bound = max(shares, default=(None, None))
    return Achieved(rates["flops"], rates["bytes"], share, bound)


def _read_ceiling(size: float, found: dict[str, Any]) -> float:
    """The rate of the smallest measured buffer that is as large."""
    return next((rate for measured, rate in found.get("gbps_of", []) if measured >= size), found["gbps"])
