"""Builds the C++ parts of fastdiff where a compiler is at hand, and maps kernels/ to the import name fastdiff.kernels.

    fastdiff/libfastdiff.so   the ops: C++ against torch's stable ABI, free of Python. Needs torch while it is built,
                              which an isolated build does not see: pip install --no-build-isolation
    fastdiff/_C.*.so          pybind11: build facts, and what is asked of Python objects. Needs no torch

Both are optional: without them the installation succeeds, says what is lost, and fastdiff runs in plain PyTorch. No
-march=native (every kernel is compiled once per instruction set and chosen at run time), and no network.

    python setup.py build_ops   only the ops, into fastdiff/
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # a build backend does not put the project's folder there
import compilation  # noqa: E402
from compilation import BuildFailed, CannotBuild  # noqa: E402

LIBRARY = "libfastdiff.so"
LOST = {
    "fastdiff.libfastdiff": (
        "the C++ ops (fastdiff/libfastdiff.so) were not built: {reason}. fastdiff works without them, in plain "
        "PyTorch; lost is the 'cpu' backend, which is many times faster on CPUs. To have it, install a C++17 compiler "
        "(Debian, Ubuntu: apt install g++), then torch, setuptools, wheel, pybind11 and ninja, and then: "
        "pip install --no-build-isolation . (in a checkout: make clean, and make again)"
    ),
    "fastdiff._C": (
        "the C++ module fastdiff._C was not built: {reason}. fastdiff works without it; lost are the fast reading of "
        "histories and the 'C++ part' and 'CPU' lines of `fastdiff env`. To have it, install a C++17 compiler and the "
        "Python headers (Debian, Ubuntu: apt install g++ python3-dev) and install fastdiff again"
    ),
}

TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020b000000000000"
STABLE_ABI_SINCE = (2, 11)

# --- the ops ----------------------------------------------------------------------------------------------------------


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


def build_ops(output: Path) -> None:
    """Compile and link the ops library to `output`, each source once, each kernel once per level; only what changed is
    built. Raises CannotBuild with the compiler's words."""
    include, lib = (shlex.quote(str(path)).replace("$", "$$") for path in torch_paths())  # for a shell, in ninja's file
    flags = f"{compilation.FLAGS} {TORCH_FLAGS} {os.environ.get('CXXFLAGS', '')} -isystem {include}"
    build = compilation.Build(ROOT / "build" / f"ops-{platform.machine()}", compilation.find_compiler(), flags)
    objects = [name for source in compilation.library_sources() for name in build.compile(source)]
    build.link(
        str(output.resolve()),
        objects,
        f"-shared -L{lib} -ltorch_cpu -lc10 -lpthread -Wl,--no-undefined -Wl,--exclude-libs,ALL -Wl,-z,defs",
    )
    jobs = os.environ.get("MAX_JOBS")
    build.run(int(jobs) if jobs else None)


class BuildOps(Command):  # type: ignore[misc]
    """The C++ parts, into the source tree: what a developer runs after a change in csrc/. Ends with an error where the
    sources of the ops do not compile; with --if-possible, a missing tool is none."""

    description = "build fastdiff/libfastdiff.so"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("if-possible", None, "where a tool is missing, say what is lost and go on"),
        ("and-module", None, "fastdiff._C as well"),
    ]
    boolean_options: ClassVar[list[str]] = ["if-possible", "and-module"]

    def initialize_options(self) -> None:
        self.if_possible = self.and_module = False

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        try:
            build_ops(ROOT / "fastdiff" / LIBRARY)
        except CannotBuild as error:
            if not self.if_possible or isinstance(error, BuildFailed):
                raise SystemExit(f"fastdiff: {error}") from None
            print(f"fastdiff: {LOST['fastdiff.libfastdiff'].format(reason=error)}", file=sys.stderr)
        if self.and_module:
            self._build_module()

    def _build_module(self) -> None:
        modules = [extension for extension in self.distribution.ext_modules if extension.name == "fastdiff._C"]
        built = ROOT / "fastdiff" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        sources = [ROOT / name for extension in modules for name in (*extension.sources, *extension.depends)]
        if not built.exists() or any(source.stat().st_mtime > built.stat().st_mtime for source in sources):
            self.distribution.ext_modules = modules
            self.reinitialize_command("build_ext", inplace=True)
            self.run_command("build_ext")


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
            raise CompileError(str(error)) from error  # what setuptools lets pass for an optional extension

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
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/python").glob("*.h"))
    return [ops, Pybind11Extension("fastdiff._C", sources, depends=headers, cxx_std=17, optional=True)], commands


ext_modules, cmdclass = extensions()
setup(
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels"],
    package_dir={"fastdiff.kernels": "kernels"},
    package_data={"fastdiff": ["py.typed", "*.pyi"], "fastdiff.demo": ["model/*"]},
    include_package_data=False,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
