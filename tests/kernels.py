"""Checks the Triton kernels where there is no GPU: compiles every configuration that a launcher may choose for sm_80,
sm_90 and sm_100, and runs the tests of ops and models with the kernels interpreted.

    python -m tests.kernels

Both are processes of their own: what is interpreted cannot be compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from fastdiff.ops import ALL
from fastdiff.ops.backend import why_not
from tests.conftest import ROOT

INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1"}
COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
CHECKS = {
    "compiled ahead of time": (COMPILED, ["-m", "fastdiff.kernels.precompile"]),
    "interpreted": (INTERPRETED, ["-m", "pytest", "tests/ops", "tests/models", "-k", "triton"]),
}


def main() -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    reason = why_not("triton", "cpu")
    if reason is not None:
        print(f"Triton kernels: SKIPPED: {reason}")
        return 0
    kernels = f"{sum('triton' in op.implementations for op in ALL)} ops"
    failed = []
    for check, (environment, command) in CHECKS.items():
        began = time.monotonic()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment)
        verdict = "passed" if done.returncode == 0 else "FAILED"
        print(f"Triton kernels of {kernels}, {check}: {verdict} in {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode != 0:
            failed.append(check)
    print(f"Triton kernels: failed: {', '.join(failed)}" if failed else "Triton kernels: nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
