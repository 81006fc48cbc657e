"""Where a row was measured, and whether anybody else was using the machine meanwhile."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
QUIET = 0.2
"""Cores that others may use before a row counts as noisy."""


ISA_FLAGS = {
    "avx512f": "AVX512",
    "avx512_bf16": "BF16",
    "avx512_vnni": "VNNI",
    "amx_tile": "AMX",
    "sve": "SVE",
    "asimd": "NEON",
}
"""Flags of /proc/cpuinfo that decide how fast a row can be -> what the machine line calls them."""

PACKAGES = ("numpy", "triton", "faiss-cpu", "implicit", "usearch")


def facts(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, ready for JSON."""
    values: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "isa": _isa(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": _versions(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    if "FASTDIFF_CPU_CAPABILITY" in os.environ:
        values["forced"] = os.environ["FASTDIFF_CPU_CAPABILITY"]
    if os.environ.get("TRITON_INTERPRET") == "1":
        values["interpreted"] = True
    if device.type == "cuda":
        values["gpu"] = torch.cuda.get_device_name(device)
        values["cuda"] = torch.version.cuda
        values |= _gpu_facts(device)
    return values


GPU_FIELDS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "most_sm_mhz": "clocks.max.sm",
    "most_memory_mhz": "clocks.max.mem",
}
GPU_STATE = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "celsius": "temperature.gpu",
    "used_mib": "memory.used",
    "busy_per_cent": "utilization.gpu",
}


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    properties: Any = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30),
        **nvidia_smi(GPU_FIELDS),
    }


def nvidia_smi(fields: dict[str, str]) -> dict[str, str]:
    """What `nvidia-smi` says of the first GPU: our name -> its words; nothing where it cannot be asked."""
    query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (word.strip() for word in said.splitlines()[0].split(",")), strict=False))


def identity(machine: dict[str, Any]) -> str:
    """What rows must share to be put into one table: the hardware, the instructions used, and the threads."""
    where = f"{machine['gpu']}, " if "gpu" in machine else ""
    forced = ", Triton interpreted" if machine.get("interpreted") else ""
    forced += f", fastdiff held to {machine['forced']}" if "forced" in machine else ""
    return (
        f"{where}{machine['cpu']} ({machine['cores']} cores, {machine.get('isa') or machine['simd']}), "
        f"{machine['threads']} threads{forced}"
    )


def describe(machine: dict[str, Any]) -> str:
    """The machine line that stands beside every figure."""
    return f"{identity(machine)}, torch {machine['torch']}, Python {machine['python']}"


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


def _cpu_info(field: str) -> str:
    """The first entry of a field of /proc/cpuinfo; "" where there is none."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""


def _isa() -> str:
    flags = set((_cpu_info("flags") or _cpu_info("Features")).split())
    named = [name for flag, name in ISA_FLAGS.items() if flag in flags]
    return " ".join(named) or torch.backends.cpu.get_cpu_capability()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


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
