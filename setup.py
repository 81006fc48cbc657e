"""Builds the C++ parts of fastdiff where a compiler is at hand, and maps kernels/ to the import name fastdiff.kernels.

    fastdiff/libfastdiff.so   the ops: C++ against torch's stable ABI, free of Python. Needs torch while it is built, which
                              an isolated build does not see: pip install --no-build-isolation
    fastdiff/_C.*.so          pybind11: build facts, and what is asked of Python objects. Needs no torch

Both are optional: without them the installation succeeds, says what is lost, and fastdiff runs in plain PyTorch. No
-march=native (every kernel is compiled once per instruction set and chosen at run time), and no network.

    python setup.py build_ops   only the ops, into fastdiff/
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libfastdiff.so"
LOST = {
    "fastdiff.libfastdiff": (
        "the C++ ops (fastdiff/libfastdiff.so) were not built: {reason}. fastdiff works without them, in plain PyTorch; "
        "lost is the 'cpu' backend, which is many times faster on CPUs. To have it, install a C++17 compiler (Debian, Ubuntu: "
        "apt install g++), then torch and ninja, and then: pip install --no-build-isolation ."
    ),
    "fastdiff._C": (
        "the C++ module fastdiff._C was not built: {reason}. fastdiff works without it; lost are the fast reading of "
        "histories and the 'C++ part' and 'CPU' lines of `fastdiff env`. To have it, install a C++17 compiler and the "
        "Python headers (Debian, Ubuntu: apt install g++ python3-dev) and install fastdiff again"
    ),
}

# What each level of csrc/cpu/capability.h may use; a level has what stands before it too.
X86_LEVELS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mprefer-vector-width=512",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
    "amx": "-mamx-tile -mamx-bf16 -mamx-int8",
}
FLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -DTORCH_TARGET_VERSION=0x020b000000000000"
)
STABLE_ABI_SINCE = (2, 11)


class CannotBuild(Exception):
    """Why a C++ part cannot be built here."""


# --- the ops ----------------------------------------------------------------------------------------------------------


def levels() -> dict[str, str]:
    """Level -> compiler flags, for the architecture of this machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"baseline": ""}
    flags, so_far = {}, ""
    for level, more in X86_LEVELS.items():
        flags[level] = so_far = f"{so_far} {more}".strip()
    return flags


def levels_of(source: Path) -> list[str]:
    """The levels that a kernel names in its first line: `// levels: baseline avx2 avx512`."""
    words = source.open(encoding="utf-8").readline().split()
    if words[:2] != ["//", "levels:"]:
        raise CannotBuild(f"the first line of {source.name} must name its levels: // levels: baseline avx2 ..")
    known = levels()
    return [level for level in words[2:] if level in known]


def torch_paths() -> tuple[Path, Path]:
    """Where torch's headers and libraries are."""
    try:
        import torch
    except ImportError:
        raise CannotBuild("torch is not installed, or hidden by an isolated build") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < STABLE_ABI_SINCE:
        raise CannotBuild(f"torch is {torch.__version__}, and 2.11 or later is needed")
    home = Path(torch.__file__).parent
    return home / "include", home / "lib"


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    raise CannotBuild("no C++ compiler was found (c++, g++, clang++, or the variable CXX)")


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        found = shutil.which("ninja", path=BIN_DIR)
    except ImportError:
        found = None
    found = found or shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja was not found (pip install ninja)")
    return found


def write_ninja(folder: Path, output: Path) -> Path:
    """The build of the ops library: each source once, each kernel once per level."""
    include, lib = torch_paths()
    flags = f"{FLAGS} {os.environ.get('CXXFLAGS', '')} -isystem {include}"
    lines = [
        f"cxx = {compiler()}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{lib} -ltorch_cpu -lc10 -lpthread -Wl,--no-undefined "
        "-Wl,--exclude-libs,ALL -Wl,-z,defs",
        "  description = $out",
    ]
    objects = []

    def add(source: Path, name: str, more: str) -> None:
        objects.append(name)
        lines.extend([f"build {name}: compile {source}", f"  flags = {flags} {more}"])

    by_level = levels()
    for source in sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")]):
        if source.name == "module.cpp":
            continue
        if source.stem.endswith("_kernel"):
            for level in levels_of(source):
                add(source, f"{source.stem}.{level}.o", f"-DFASTDIFF_LEVEL={level} {by_level[level]}")
        else:
            add(source, f"{source.stem}.o", "")
    lines.append(f"build {output}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def build_ops(output: Path) -> None:
    """Compile and link the ops library to `output`; raises CannotBuild with the compiler's words."""
    folder = ROOT / "build" / f"ops-{platform.machine()}"
    path = write_ninja(folder, output.resolve())
    jobs = os.environ.get("MAX_JOBS")
    command = [ninja(), "-f", path.name, *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout, done.stderr, file=sys.stderr)
        raise CannotBuild("the compiler stopped with the errors above")
    warnings = done.stdout + done.stderr
    if "warning:" in warnings:
        print(warnings, file=sys.stderr)


class BuildOps(Command):  # type: ignore[misc]
    """Only the ops library, into the source tree: what a developer runs after a change in csrc/."""

    description = "build fastdiff/libfastdiff.so"
    user_options: list[tuple[str, str | None, str]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        try:
            build_ops(ROOT / "fastdiff" / LIBRARY)
        except CannotBuild as error:
            raise SystemExit(f"fastdiff: {error}") from None


# --- both parts, as setuptools knows them -----------------------------------------------------------------------------


class OptionalBuild(build_ext):  # type: ignore[misc]
    """Says what is lost where setuptools would only warn that building failed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == "fastdiff.libfastdiff":
                output = Path(self.get_ext_fullpath(ext.name))
                output.parent.mkdir(parents=True, exist_ok=True)
                build_ops(output)
            else:
                super().build_extension(ext)
        except Exception as error:  # every compiler class of setuptools has errors of its own
            reason = LOST[ext.name].format(reason=" ".join(str(error).split()))
            print(f"fastdiff: {reason}", file=sys.stderr)
            raise

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libfastdiff"):  # no Python in it, so none in its name
            return str(Path(*fullname.split(".")[:-1], LIBRARY))
        return str(super().get_ext_filename(fullname))


def extensions() -> tuple[list[Extension], dict[str, Any]]:
    ops = Extension("fastdiff.libfastdiff", [], optional=True)
    commands: dict[str, Any] = {"build_ext": OptionalBuild, "build_ops": BuildOps}
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        print(f"fastdiff: {LOST['fastdiff._C'].format(reason='pybind11 is not installed')}", file=sys.stderr)
        return [ops], commands
    sources = ["csrc/module.cpp", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/python").glob("*.cpp"))]
    return [ops, Pybind11Extension("fastdiff._C", sources, cxx_std=17, optional=True)], commands


ext_modules, cmdclass = extensions()
setup(
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels"],
    package_dir={"fastdiff.kernels": "kernels"},
    package_data={"fastdiff": ["py.typed", "*.pyi"], "fastdiff.demo": ["model/*"]},
    include_package_data=False,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
