"""What this installation is and can do: versions, devices, the C++ parts, and each backend: "yes", or why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff import ops
from fastdiff.ops.backend import BACKENDS, why_no_op
from fastdiff.ops.cpu import library


def collect() -> dict[str, Any]:
    """The facts as one JSON-ready dict.

    versions   fastdiff, python, torch, triton, numpy; None where a package is not installed
    package    the folder that fastdiff is imported from
    devices    [{"device", "name", ...}], the CPU first
    threads    of torch, which the C++ ops use too
    cpu_ops    {"built": bool, ...}: the C++ ops' instruction set in use ("level") and those of this machine ("levels",
               lowest first), or why the ops cannot be used
    extension  {"built": bool, ...}: facts and CPU capabilities of fastdiff._C, or why it cannot be loaded
    backends   name -> {"available": bool, "why_not": {device: reason}}
    ops        op -> {backend: None or the reason why not}, for the device on which that backend would run
    """
    devices = _devices()
    places = list(dict.fromkeys(torch.device(device["device"]).type for device in devices))
    return {
        "versions": {
            "fastdiff": fastdiff.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "numpy")},
        },
        "package": str(Path(fastdiff.__file__).resolve().parent),
        "platform": platform.platform(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu_ops": _cpu_ops(),
        "extension": _extension(),
        "backends": {backend: _backend(backend, places) for backend in BACKENDS},
        "ops": {
            op.name: {backend: _first_reason([op.why_not(backend, place) for place in places]) for backend in BACKENDS}
            for op in ops.ALL
        },
    }


def report(facts: dict[str, Any]) -> str:
    """The facts of `collect` as text for people."""
    lines = [
        "versions   " + "  ".join(f"{name} {value or 'not installed'}" for name, value in facts["versions"].items()),
        f"package    {facts['package']}",
        f"platform   {facts['platform']}",
    ]
    for device in facts["devices"]:
        details = ", ".join(f"{value}" for name, value in device.items() if name != "device")
        lines.append(f"device     {device['device']}: {details}")
    lines.append(f"threads    {facts['threads']} (OMP_NUM_THREADS or torch.set_num_threads changes it)")
    cpu_ops = facts["cpu_ops"]
    if cpu_ops["built"]:
        highest = cpu_ops["levels"][-1]
        limit = "the highest here" if cpu_ops["level"] == highest else f"the highest here is {highest}"
        state = f"built; CPU level {cpu_ops['level']} ({limit}; FASTDIFF_CPU_CAPABILITY chooses a lower one)"
    else:
        state = f"not available: {cpu_ops['why_not']}"
    lines.append(f"C++ ops (libfastdiff)    {state}")
    extension = facts["extension"]
    if extension["built"]:
        state = "built: " + ", ".join(f"{name} {value}" for name, value in extension["facts"].items())
    else:
        state = f"not available: {extension['why_not']}"
    lines.append(f"C++ input reader (_C)    {state}")
    usable = list(dict.fromkeys(_instructions(facts)))
    if usable:
        lines.append(f"CPU        {', '.join(usable)}")
    lines.append("backends")
    for name, backend in facts["backends"].items():
        reasons = "; ".join(f"on {device}: {reason}" for device, reason in backend["why_not"].items())
        lines.append(f"  {name:<8} {'yes' if backend['available'] else 'no'}{f' ({reasons})' if reasons else ''}")
    if facts["ops"]:
        width = max(map(len, facts["ops"])) + 2
        lines.append("ops" + " " * (width + 1) + "".join(f"{backend:<8}" for backend in BACKENDS))
        for op, reasons in facts["ops"].items():
            cells = "".join(f"{'yes' if reasons[backend] is None else '-':<8}" for backend in BACKENDS)
            lines.append(f"  {op:<{width}}{'':<2}{cells}".rstrip())
        refused = dict.fromkeys(
            f"  {op} on {backend}: {reason}"
            for op, reasons in facts["ops"].items()
            for backend, reason in reasons.items()
            if reason is not None and facts["backends"][backend]["available"]
        )
        lines += refused
    return "\n".join(lines)


def _instructions(facts: dict[str, Any]) -> list[str]:
    """The instruction sets of this machine that the C++ parts know; ["baseline only"] where that is all."""
    known, named = False, []
    if facts["extension"]["built"]:
        known, named = True, [name for name, has in facts["extension"]["cpu_capabilities"].items() if has]
    if facts["cpu_ops"]["built"]:  # a level is a set of its own, except avx512, of which _C names the parts
        known = True
        named += [level for level in facts["cpu_ops"]["levels"][1:] if level != "avx512" or "avx512f" not in named]
    return named or (["baseline only"] if known else [])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": _cpu_name(), "cores": f"{os.cpu_count()} logical cores"}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": facts.name,
                    "capability": f"sm_{facts.major}{facts.minor}",
                    "memory": f"{facts.total_memory / 2**30:.1f} GiB",
                }
            )
    return devices


def _cpu_name() -> str:
    """The processor's own name: Linux keeps it in /proc/cpuinfo, where `platform.processor()` is often empty."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_ops() -> dict[str, Any]:
    reason = library.why_not()
    if reason is not None:
        return {"built": False, "why_not": reason}
    return {"built": True, "level": library.capability(), "levels": list(library.available_levels())}


def _extension() -> dict[str, Any]:
    if importlib.util.find_spec("fastdiff._C") is None:
        return {
            "built": False,
            "why_not": f"it was not built; build it: {library.BUILD}",
        }
    try:
        from fastdiff import _C
    except ImportError as error:
        return {"built": False, "why_not": f"it was built, and cannot be loaded: {error}"}
    return {"built": True, "facts": dict(_C.build_facts()), "cpu_capabilities": dict(_C.cpu_capabilities())}


def _backend(backend: str, places: list[str]) -> dict[str, Any]:
    reasons = {place: reason for place in places if (reason := why_no_op(backend, place)) is not None}
    available = len(reasons) < len(places)
    return {"available": available, "why_not": {} if available else reasons}


def _first_reason(reasons: list[str | None]) -> str | None:
    """None where one of the devices runs it; else what the last device lacks (a GPU, where there is one)."""
    return None if None in reasons else reasons[-1]
