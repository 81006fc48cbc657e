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

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # a build backend does not put the project's folder there
import compilation  # noqa: E402
from compilation import BuildFailed, CannotBuild  # noqa: E402

LIBRARY = "libfastdiff.so"
OPS, READER = "fastdiff.libfastdiff", "fastdiff._C"
LOST = {
    OPS: (
        "the C++ ops (fastdiff/libfastdiff.so)",
        "the 'cpu' backend, which is many times faster on CPUs than plain PyTorch",
    ),
    READER: ("the C++ input reader (fastdiff._C)", "the fast reading of histories"),
}

TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020b000000000000"
STABLE_ABI_SINCE = (2, 11)
UNAVAILABLE: dict[str, str] = {}
"""What cannot even be tried, and why: of LOST."""


def what_is_lost(failed: dict[str, str]) -> str:
    """One message for what was not built: extension -> why."""
    reasons = dict.fromkeys(failed.values())
    parts = "; ".join(
        f"{' and '.join(LOST[name][0] for name in failed if failed[name] == reason)} were not built: {reason}"
        for reason in reasons
    )
    return (
        f"{parts}. fastdiff works without; lost: {', and '.join(LOST[name][1] for name in failed)}. To build what is "
        "missing, install a C++17 compiler and the Python headers (Debian, Ubuntu: apt install g++ python3-dev); in a "
        "checkout, then: make build; elsewhere install torch, setuptools, wheel, pybind11 and ninja, and then: "
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    )


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
        ("stamp=", None, "a file to write where everything asked for was built, and to remove where not"),
    ]
    boolean_options: ClassVar[list[str]] = ["if-possible", "and-module"]

    def initialize_options(self) -> None:
        self.if_possible = self.and_module = False
        self.stamp: str | None = None

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        stamp = None if self.stamp is None else Path(self.stamp)
        if stamp is not None:
            stamp.unlink(missing_ok=True)
        failed: dict[str, str] = {}
        try:
            build_ops(ROOT / "fastdiff" / LIBRARY)
        except BuildFailed as error:
            raise SystemExit(f"fastdiff: {error}") from None
        except CannotBuild as error:
            failed[OPS] = str(error)
        if self.and_module:
            failed |= self._build_module()
        if failed:
            if not self.if_possible:
                raise SystemExit(f"fastdiff: {what_is_lost(failed)}")
            print(f"fastdiff: {what_is_lost(failed)}", file=sys.stderr)
        elif stamp is not None:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()

    def _build_module(self) -> dict[str, str]:
        modules = [extension for extension in self.distribution.ext_modules if extension.name == READER]
        built = ROOT / "fastdiff" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        sources = [ROOT / name for extension in modules for name in (*extension.sources, *extension.depends)]
        if modules and built.exists() and all(path.stat().st_mtime <= built.stat().st_mtime for path in sources):
            return {}
        self.distribution.ext_modules = modules
        command = self.reinitialize_command("build_ext", inplace=True)
        command.reports = False
        self.run_command("build_ext")
        return dict(command.failed)


# --- both parts, as setuptools knows them -----------------------------------------------------------------------------


class OptionalBuild(build_ext):  # type: ignore[misc]
    """Goes on where an extension cannot be built, and says once what is lost."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.failed = dict(UNAVAILABLE)
        self.reports = True

    def run(self) -> None:
        super().run()
        if self.failed and self.reports:
            print(f"fastdiff: {what_is_lost(self.failed)}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == OPS:
                output = Path(self.get_ext_fullpath(ext.name))
                output.parent.mkdir(parents=True, exist_ok=True)
                build_ops(output)
            else:
                super().build_extension(ext)
        except Exception as error:  # every compiler class of setuptools has errors of its own
            self.failed[ext.name] = _in_one_line(error)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libfastdiff"):  # no Python in it, so none in its name
            return str(Path(*fullname.split(".")[:-1], LIBRARY))
        return str(super().get_ext_filename(fullname))


def _in_one_line(error: Exception) -> str:
    if not isinstance(error, CannotBuild):  # setuptools says only which command failed
        try:
            compilation.find_compiler()
        except CannotBuild as better:
            error = better
    return " ".join(str(error).split())


def extensions() -> tuple[list[Extension], dict[str, Any]]:
    ops = Extension(OPS, [], optional=True)
    commands: dict[str, Any] = {"build_ext": OptionalBuild, "build_ops": BuildOps}
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        UNAVAILABLE[READER] = "pybind11 is not installed"
        return [ops], commands
    sources = ["csrc/module.cpp", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/python").glob("*.cpp"))]
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/python").glob("*.h"))
    return [ops, Pybind11Extension(READER, sources, depends=headers, cxx_std=17, optional=True)], commands


ext_modules, cmdclass = extensions()
setup(
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels"],
    package_dir={"fastdiff.kernels": "kernels"},
    package_data={
        "fastdiff": ["py.typed", "*.pyi"],
        "fastdiff.demo": ["models/*/*"],
        "fastdiff.kernels": ["configs/*.json"],
        "fastdiff.train": ["settings/*.yaml"],
    },
    include_package_data=False,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
