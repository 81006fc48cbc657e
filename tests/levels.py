"""Runs the tests of ops and models once for each CPU level below this machine's highest, which `make test` runs.

    python -m tests.levels [LEVEL ...]

A level at which every kernel is compiled runs the tests of all ops and models, and those on recorded outputs; one that
only some kernels have (AVX-512 VNNI, say) the tests of their ops.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from fastdiff.ops import ALL
from fastdiff.ops.cpu import library

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = ["tests/ops", "tests/models", "tests/test_golden.py", "tests/test_engine.py"]


def ops_at(level: str) -> set[str]:
    """The kernels that are compiled for a level, by the first lines of their files (csrc/compilation.py)."""
    kernels = {}
    for source in (ROOT / "csrc" / "cpu").glob("*_kernel.cpp"):
        with source.open(encoding="utf-8") as file:
            kernels[source.stem.removesuffix("_kernel")] = file.readline().split()[2:]
    return {name for name, levels in kernels.items() if level in levels}


def tests_of(level: str) -> list[str]:
    kernels = ops_at(level)
    if kernels == ops_at("baseline"):
        return EVERYTHING
    # a kernel is named after its op, or its name begins with it (score_topk, score_topk_exact)
    files = {
        ROOT / "tests" / "ops" / f"test_{op.name}.py" for op in ALL for name in kernels if name.startswith(op.name)
    }
    return sorted(str(path.relative_to(ROOT)) for path in files)


def main(levels: list[str]) -> int:
    reason = library.why_not()
    if reason is not None:
        print(f"CPU levels: SKIPPED: {reason}")
        return 0
    failed = []
    for level in levels or library.available_levels()[:-1]:
        tests = tests_of(level)
        if not tests:
            print(f"CPU level {level}: no kernel of its own")
            continue
        began = time.monotonic()
        environment = {**os.environ, "FASTDIFF_CPU_CAPABILITY": level}
        done = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=environment)
        verdict = "passed" if done.returncode == 0 else "FAILED"
        print(f"CPU level {level}: {verdict} in {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode != 0:
            failed.append(level)
    print(f"CPU levels: failed: {', '.join(failed)}" if failed else "CPU levels: nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
