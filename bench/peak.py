"""Peak memory of one call, in a process of its own: `python -m bench.peak JSON` prints what `peak_of` measured.

The peak is that of the resident set during the call, less what was resident before it: the table, the weights and
whatever the first small call leaves behind are not counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cases import Measured
from bench.machine import ROOT

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def why_not() -> str | None:
    return None if STATUS.is_file() and CLEAR.exists() else "it needs Linux's /proc to read the peak of a process"


def peak_of(call: Callable[[], Any]) -> Measured:
    """Run `call` once and see how much memory it needed beyond what is resident now."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what was freed is given back, so that the call cannot have it unseen
    CLEAR.write_text(RESET_PEAK)
    before = _resident("VmRSS")
    start = time.perf_counter()
    output = call()
    seconds = time.perf_counter() - start
    return Measured(output, seconds, float(_resident("VmHWM") - before))


def in_child(function: str, **arguments: Any) -> Measured:
    """`function`, "module:name", called with the arguments in a fresh process; it returns (a small call, the call that
    is measured). Both return (rows, scores); the output is the rows."""
    job = json.dumps({"function": function, "arguments": arguments, "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, "-m", "bench.peak", job], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the child process failed: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Measured((torch.tensor(found["rows"]), None), found["seconds"], found["peak_bytes"])


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(text: str) -> None:
    import importlib

    job = json.loads(text)
    torch.set_num_threads(job["threads"])
    module, _, name = job["function"].partition(":")
    with torch.inference_mode():
        small, call = getattr(importlib.import_module(module), name)(**job["arguments"])
        small()
        found = peak_of(call)
    rows, _ = found.output
    print(json.dumps({"rows": rows.tolist(), "seconds": found.seconds, "peak_bytes": found.peak_bytes}))


if __name__ == "__main__":
    main(sys.argv[1])
