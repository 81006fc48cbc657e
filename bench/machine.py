"""Where a row was measured, and whether anybody else was using the machine meanwhile."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
QUIET = 0.2
"""Cores that others may use before a row counts as noisy."""


def facts(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, ready for JSON."""
    values: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    if device.type == "cuda":
        values["gpu"] = torch.cuda.get_device_name(device)
        values["cuda"] = torch.version.cuda
    return values


def describe(machine: dict[str, Any]) -> str:
    """The machine line that stands beside every figure."""
    where = f"{machine['gpu']}, " if "gpu" in machine else ""
    return (
        f"{where}{machine['cpu']} ({machine['cores']} cores, {machine['simd']}), {machine['threads']} threads, "
        f"torch {machine['torch']}, Python {machine['python']}"
    )


@cache
def commit() -> str:
    """The short hash of the checkout, with "+" where the code that is measured differs from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", "fastdiff", "bench", "csrc", "kernels", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- who else is using it ---------------------------------------------------------------------------------------------


class Others:
    """How many cores other processes keep busy: all CPU time of the machine less this process's own.

    `cores()` is the mean since the object was made, or None where the system does not say (no /proc/stat).
    """

    def __init__(self) -> None:
        self._start = _usage()

    def cores(self) -> float | None:
        if self._start is None:
            return None
        now = _usage()
        assert now is not None
        wall, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else 0.0


def busy_now(seconds: float = 0.5) -> float | None:
    """Cores that others keep busy, over a short while in which this process sleeps."""
    others = Others()
    time.sleep(seconds)
    return others.cores()


def load_average() -> float:
    return os.getloadavg()[0]


def _usage() -> tuple[float, float, float] | None:
    """(wall clock, busy seconds of all cores, CPU seconds of this process and the children that it waited for)."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, soft, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    busy = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), busy, sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- the roof ---------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device) -> dict[str, float]:
    """The machine's own limits, measured in about a second: float32 GFLOP/s of a large matrix product, and GB/s read
    from memory by a sum over a tensor that no cache holds."""
    size, words = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    a = torch.ones(size, size, device=device)
    big = torch.ones(words, device=device)
    matmul = _best_seconds(lambda: a @ a, device)
    read = _best_seconds(lambda: big.sum(), device)
    return {"gflops": 2 * size**3 / matmul / 1e9, "gbps": 4 * words / read / 1e9}


def _best_seconds(call: Any, device: torch.device, repeats: int = 7) -> float:
    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    call()
    best = float("inf")
    for _ in range(repeats):
        start = finished()
        call()
        best = min(best, finished() - start)
    return best
