"""Builds and runs the standalone C++ tests (csrc/tests/test_*.cpp): no torch, no Python, only the code of csrc/cpu.

    python csrc/tests/run.py [plain] [address] [thread] [clang] [aarch64] [--only NAME] [--jobs 2]

    plain     with the flags of the library
    address   under AddressSanitizer and UndefinedBehaviorSanitizer
    thread    under ThreadSanitizer
    clang     only compiled, by clang++
    aarch64   cross-compiled, and run under qemu; the baseline is all there is

Without a mode: all of them. A mode whose tools are not installed is skipped, and the last lines say so; --strict makes
that an error. Ends with 1 where something failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import compilation  # noqa: E402
from compilation import CannotBuild  # noqa: E402

SECONDS_PER_TEST = 300
SHOWN = 6000  # characters of what a failed test said
PROGRAMS = {path.stem: path for path in sorted(HERE.glob("test_*.cpp"))}

SANITIZED = "-O1 -g1 -fno-omit-frame-pointer"


@dataclass(frozen=True)
class Mode:
    """compiler: None is the one that builds the library   runner: what a program is started with   needs: tools"""

    flags: str = ""
    link_flags: str = ""
    compiler: str | None = None
    machine: str | None = None
    runner: tuple[str, ...] = ()
    runs: bool = True
    needs: tuple[tuple[str, str], ...] = ()  # (program, Debian's package)


MODES = {
    "plain": Mode(),
    "address": Mode(
        f"{SANITIZED} -fsanitize=address,undefined -fno-sanitize-recover=all", "-fsanitize=address,undefined"
    ),
    "thread": Mode(f"{SANITIZED} -fsanitize=thread", "-fsanitize=thread"),
    "clang": Mode("-O1 -Wuninitialized", compiler="clang++", runs=False, needs=(("clang++", "clang"),)),
    "aarch64": Mode(
        compiler="aarch64-linux-gnu-g++",
        link_flags="-static",
        machine="aarch64",
        runner=("qemu-aarch64",),
        needs=(("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"),),
    ),
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_init_order=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "die_after_fork=0",  # the pool's test forks on purpose
}


class Failed(Exception):
    """A test failed."""


def check_symbols(folder: Path) -> None:
    """A kernel's object may share nothing that is compiled at other levels too: of an inline function or a template
    that stands in several objects, the linker keeps one copy for all, and it may be the one with AVX-512 in it."""
    for path in sorted(folder.glob("*_kernel.*.o")):
        level = path.name.split(".")[1]
        said = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        shared = [words[2] for words in map(str.split, said.splitlines()) if words[1] in "WVu"]
        foreign = [name for name in shared if f"{len(level)}{level}" not in name]
        if foreign:
            raise Failed(
                f"{path.name} holds functions that are not of its level: {', '.join(foreign)}; they must be in the "
                "namespace FASTDIFF_LEVEL, or never emitted"
            )


def missing(name: str) -> str | None:
    """Why a mode cannot run here."""
    mode = MODES[name]
    for program, package in mode.needs:
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian, Ubuntu: apt install {package})"
    return None


def build(name: str, programs: list[str], jobs: int) -> Path:
    """Compile and link the programs; what they have in common is compiled once."""
    mode = MODES[name]
    machine = mode.machine or platform.machine()
    folder = HERE.parents[1] / "build" / f"tests-{name}-{machine}"
    flags = f"{compilation.FLAGS} {mode.flags}" + ("" if mode.machine else f" {os.environ.get('CXXFLAGS', '')}")
    made = compilation.Build(folder, mode.compiler or compilation.find_compiler(), flags, machine)
    shared = [source for source in compilation.library_sources() if not compilation.needs_torch(source)]
    objects = [name for source in shared for name in made.compile(source)]
    own = {program: made.compile(PROGRAMS[program]) for program in programs}
    if mode.runs:
        made.archive("libkernels.a", objects)
        for program, parts in own.items():
            made.link(program, [*parts, "libkernels.a"], f"{mode.link_flags} -pthread")
    made.run(jobs)
    return folder


def start(command: list[str], more: dict[str, str]) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if key != "FASTDIFF_CPU_CAPABILITY"}
    try:
        done = subprocess.run(
            command,
            env={**environment, **ENVIRONMENT, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS_PER_TEST,
        )
    except subprocess.TimeoutExpired as error:
        return 1, f"{error.stdout or ''}\nno end after {SECONDS_PER_TEST} s"
    return done.returncode, done.stdout


def run(program: Path, runner: tuple[str, ...]) -> None:
    code, said = start([*runner, str(program)], {"FASTDIFF_EMULATED": "1"} if runner else {})
    # older ThreadSanitizers do not find their way through an address space as random as newer kernels make it
    if code != 0 and "unexpected memory mapping" in said and shutil.which("setarch"):
        code, said = start(["setarch", platform.machine(), "-R", str(program)], {})
    if code != 0:
        raise Failed(f"{program.name} ended with {code}\n{said[:SHOWN]}")


def main() -> int:
    parser = argparse.ArgumentParser(description="The standalone C++ tests.")
    parser.add_argument("modes", nargs="*", choices=[[], *MODES], metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--only", action="append", choices=list(PROGRAMS), help="one test; may be given more than once")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (default: 2)")
    parser.add_argument("--strict", action="store_true", help="a mode that is skipped is an error")
    arguments = parser.parse_args()
    failed, skipped = [], []
    for name in arguments.modes or MODES:
        reason = missing(name)
        if reason is not None:
            skipped.append(f"{name}: SKIPPED: {reason}")
            continue
        mode, programs = MODES[name], arguments.only or list(PROGRAMS)
        began = time.monotonic()
        try:
            folder = build(name, programs, arguments.jobs)
        except CannotBuild as error:
            failed.append(name)
            print(f"{name}: FAILED: {error}", flush=True)
            continue
        built = time.monotonic() - began
        if not mode.runs or (mode.runner and shutil.which(mode.runner[0]) is None):
            why = f"; not run: {mode.runner[0]} is not installed" if mode.runs else ""
            print(f"{name}: compiled in {built:.0f} s{why}", flush=True)
            continue
        print(f"{name}: built in {built:.0f} s", flush=True)
        if name == "plain":
            try:
                check_symbols(folder)
                print("plain: each level keeps to itself", flush=True)
            except Failed as error:
                failed.append("plain/symbols")
                print(f"plain: FAILED: {error}", flush=True)
        for program in programs:
            began = time.monotonic()
            try:
                run(folder / program, mode.runner)
                print(f"{name}: {program}: passed in {time.monotonic() - began:.1f} s", flush=True)
            except Failed as error:
                failed.append(f"{name}/{program}")
                print(f"{name}: {program}: FAILED: {error}", flush=True)
    print("\n".join([*skipped, f"failed: {', '.join(failed)}" if failed else "C++ tests: nothing failed"]))
    return 1 if failed or (skipped and arguments.strict) else 0


if __name__ == "__main__":
    sys.exit(main())
