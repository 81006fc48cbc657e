"""Compiles every kernel ahead of time for GPUs that need not be here, and holds it to each chip's limits.

    python -m fastdiff.kernels.precompile [--arch 80 90 100] [--op NAME ..]

Every kernel module has a function `cases()`: the kernels and the configurations that its launcher may choose. Triton's
own compiler compiles each, and the table shows registers, spills and shared memory. A case fails where it does not
compile, needs more shared memory than the chip has, spills though it is hot, or lacks the tensor-core instruction that
it is meant to use.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table 30)."""

TENSOR_CORE = {80: r"mma\.sync", 86: r"mma\.sync", 89: r"mma\.sync", 90: r"mma\.sync|wgmma", 100: r"mma\.sync|tcgen05"}

_DIVISIBLE = re.compile(r"p_|depth$|capacity$|(?!items_).*stride$")


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, as its launcher would ask for it.

    name         the sizes and dtypes that it stands for
    kernel       the @triton.jit function
    signature    argument -> Triton's type ("*fp32", "i32", ..), of those that are not constant
    constants    argument -> value
    options      num_warps, num_stages, maxnreg, ..
    hot          whether spilled registers are an error
    tensor_core  whether the code must use the matrix units
    divisible    arguments known to be multiples of 16 (None: every pointer, and what rows of 16 k numbers make so:
                 depths, capacities and strides, but not those of histories, which may be of any length)
    archs        the compute capabilities that it is chosen for (None: all)
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    hot: bool = True
    tensor_core: bool = False
    divisible: tuple[str, ...] | None = None
    archs: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Compiled:
    """What came of a case: of the cubin, as cuobjdump tells it."""

    op: str
    name: str
    arch: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    seconds: float = 0.0
    wrong: str | None = None


def modules() -> list[str]:
    """The kernel modules that have cases."""
    folder = Path(__file__).parent
    names = [module.name for module in pkgutil.iter_modules([str(folder)])]
    return [name for name in names if re.search(r"^def cases\(", (folder / f"{name}.py").read_text("utf-8"), re.M)]


def cases_of(op: str) -> list[Case]:
    cases: Iterator[Case] = importlib.import_module(f"fastdiff.kernels.{op}").cases()
    return list(cases)


def compile_case(op: str, index: int, arch: int) -> Compiled:
    """Compile case number `index` of `op` for sm_<arch>."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = cases_of(op)[index]
    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.signature and name not in case.constants]
    if missing:
        return Compiled(op, case.name, arch, wrong=f"the case gives no type or value for {', '.join(missing)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = case.divisible
    if divisible is None:
        divisible = tuple(name for name in case.signature if _DIVISIBLE.match(name))
    source = ASTSource(
        case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    began = time.monotonic()
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Compiled(op, case.name, arch, wrong=f"{type(error).__name__}: {lines[-1] if lines else error!r}")
    seconds = time.monotonic() - began
    registers, spilled = _resources(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    wrong = None
    if shared > SHARED_MEMORY[arch]:
        wrong = f"{shared} bytes of shared memory, sm_{arch} has {SHARED_MEMORY[arch]}"
    elif spilled and case.hot:
        wrong = f"{spilled} bytes of registers spilled"
    elif case.tensor_core and not re.search(TENSOR_CORE[arch], compiled.asm["ptx"]):
        wrong = f"no tensor-core instruction ({TENSOR_CORE[arch]})"
    return Compiled(op, case.name, arch, registers, spilled, shared, seconds, wrong)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it keeps in local memory: spills, mostly."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", told.stdout + told.stderr)
    if usage is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of registers: {told.stdout}{told.stderr}")
    registers, stack, local = (int(number) for number in usage.groups())
    return registers, stack + local


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdiff.kernels.precompile", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities (80 90 100)")
    parser.add_argument("--op", nargs="+", default=modules(), choices=modules(), help="only these kernels")
    asked = parser.parse_args(arguments)
    unknown = [arch for arch in asked.arch if arch not in SHARED_MEMORY]
    if unknown:
        parser.error(f"--arch: unknown {unknown}; known: {', '.join(map(str, SHARED_MEMORY))}")
    if triton.knobs.runtime.interpret:
        parser.error("kernels cannot be compiled where they are interpreted; unset TRITON_INTERPRET")
    work = [
        (op, i, arch)
        for op in asked.op
        for i, case in enumerate(cases_of(op))
        for arch in asked.arch
        if case.archs is None or arch in case.archs
    ]
    print(f"{'op':<26}{'case':<44}{'sm':>4}{'regs':>6}{'spill B':>9}{'smem B':>9}{'s':>7}", flush=True)
    failed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(compile_case, *zip(*work, strict=True)):
            failed += row.wrong is not None
            numbers = f"{row.registers:>6}{row.spilled:>9}{row.shared:>9}{row.seconds:>7.1f}"
            print(f"{row.op:<26}{row.name:<44}{row.arch:>4}{numbers}", end="", flush=True)
            print(f"  FAILED: {row.wrong}" if row.wrong else "", flush=True)
    print(f"{len(work)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
