"""Checks the Triton kernels where there is no GPU: compiles every configuration that a launcher may choose for sm_80,
sm_90 and sm_100, and runs the tests of ops, models and graphs with the kernels interpreted.

    python -m tests.kernels

Processes of their own: what is interpreted cannot be compiled. The tests run in two, side by side, for an interpreted
kernel takes one core.
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
LONGEST = "tests/ops/test_score_topk.py"
TESTS = ["-m", "pytest", "-k", "triton"]
CHECKS = {
    "compiled ahead of time": (COMPILED, [["-m", "fastdiff.kernels.precompile"]]),
    "interpreted": (
        INTERPRETED,
        [[*TESTS, LONGEST], [*TESTS, "tests/ops", "tests/models", "tests/test_graphs.py", f"--ignore={LONGEST}"]],
    ),
}


def main() -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    reason = why_not("triton", "cpu")
    if reason is not None:
        print(f"Triton kernels: SKIPPED: {reason}")
        return 0
    kernels = f"{sum('triton' in op.implementations for op in ALL)} ops"
    failed = []
    for check, (environment, commands) in CHECKS.items():
        began = time.monotonic()
        running = [subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment) for command in commands]
        codes = [process.wait() for process in running]
        passed = not any(codes)
        verdict = "passed" if passed else "FAILED"
        print(f"Triton kernels of {kernels}, {check}: {verdict} in {time.monotonic() - began:.0f} s", flush=True)
        if not passed:
            failed.append(check)
    print(f"Triton kernels: failed: {', '.join(failed)}" if failed else "Triton kernels: nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
