"""How the C++ of fastdiff is compiled: instruction sets, flags, sources, and the ninja files made of them.

setup.py builds the ops library with it, csrc/tests/run.py the standalone tests. It needs neither torch nor setuptools.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CSRC = Path(__file__).resolve().parent

# What each level of csrc/cpu/capability.h may use; a level has what stands before it too.
X86_LEVELS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mprefer-vector-width=512",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
    "amx": "-mamx-tile -mamx-bf16 -mamx-int8",
}
# GCC 12 calls the undefined vectors of its own AVX-512 headers uninitialized; csrc/tests/run.py has clang look for such
# mistakes, which does not know one of the names.
FLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off -fno-math-errno "
    "-fno-strict-aliasing "
    "-fno-trapping-math -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"
)


class CannotBuild(Exception):
    """Why something cannot be built here: a tool is missing."""


class BuildFailed(CannotBuild):
    """The tools are there, and the sources do not compile."""


# --- sources and levels -----------------------------------------------------------------------------------------------


def levels(machine: str | None = None) -> dict[str, str]:
    """Level -> compiler flags, for an architecture; None is this machine's."""
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64"):
        return {"baseline": ""}
    flags, so_far = {}, ""
    for level, more in X86_LEVELS.items():
        flags[level] = so_far = f"{so_far} {more}".strip()
    return flags


def levels_of(source: Path) -> list[str]:
    """The levels that a kernel names in its first line: `// levels: baseline avx2 avx512`."""
    words = source.open(encoding="utf-8").readline().split()
    unknown = [word for word in words[2:] if word not in X86_LEVELS]
    if words[:2] != ["//", "levels:"] or unknown:
        raise CannotBuild(
            f"the first line of {source.name} must name its levels, // levels: baseline avx2 .., out of "
            f"{', '.join(X86_LEVELS)} (got {' '.join(words)})"
        )
    return words[2:]


def library_sources() -> list[Path]:
    """Every source of the ops library."""
    return sorted([*(CSRC / "cpu").glob("*.cpp"), *(path for path in CSRC.glob("*.cpp") if path.name != "module.cpp")])


def needs_torch(source: Path) -> bool:
    text = source.read_text(encoding="utf-8")
    return "tensors.h" in text or "<torch/" in text


# --- tools ------------------------------------------------------------------------------------------------------------


def find_compiler() -> str:
    """A compiler that knows C++17 and every instruction set: the variable CXX, or else c++, g++ or clang++."""
    wanted = os.environ.get("CXX", "").strip()
    found = [name for name in ([wanted] if wanted else ["c++", "g++", "clang++"]) if shutil.which(name.split()[0])]
    if not found:
        raise CannotBuild(
            f"there is no '{wanted}', which the variable CXX names"
            if wanted
            else "no C++ compiler was found (c++, g++, clang++, or the variable CXX)"
        )
    command = [*found[0].split(), *FLAGS.split(), *list(levels().values())[-1].split()]
    try:
        done = subprocess.run(
            [*command, "-x", "c++", "-c", "-", "-o", os.devnull],
            input="#include <vector>\nstd::vector<int> numbers;\n",
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise CannotBuild(f"the compiler {found[0]!r} does not start ({error})") from None
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise CannotBuild(
            f"the compiler {found[0]!r} cannot compile C++17 for every instruction set; GCC 11 or clang 12 can "
            f"({said[0] if said else f'it ended with {done.returncode}'})"
        )
    return found[0]


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR

        found = shutil.which("ninja", path=BIN_DIR)
    except ImportError:
        found = None
    found = found or shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja was not found (pip install ninja)")
    return found


# --- ninja files ------------------------------------------------------------------------------------------------------


@dataclass
class Build:
    """One folder of objects and what is linked from them.

    compiler, flags   for every source
    machine           the architecture compiled for; None is this machine's
    """

    folder: Path
    compiler: str
    flags: str
    machine: str | None = None
    _lines: list[str] = field(default_factory=list)

    def compile(self, source: Path, more: str = "", prefix: str = "") -> list[str]:
        """The objects of a source: one, or for a kernel one per level that this architecture has."""
        if not source.stem.endswith("_kernel"):
            return [self._object(source, f"{prefix}{source.stem}.o", more)]
        known = levels(self.machine)
        return [
            self._object(source, f"{prefix}{source.stem}.{level}.o", f"-DFASTDIFF_LEVEL={level} {known[level]} {more}")
            for level in levels_of(source)
            if level in known
        ]

    def link(self, output: str, objects: list[str], flags: str) -> None:
        self._lines += [f"build {_path(output)}: link {' '.join(map(_path, objects))}", f"  flags = {flags}"]

    def archive(self, output: str, objects: list[str]) -> None:
        """Objects of which a program takes those that it needs."""
        self._lines.append(f"build {_path(output)}: archive {' '.join(map(_path, objects))}")

    def run(self, jobs: int | None = None) -> None:
        """Build what changed; raises BuildFailed after printing the compiler's words. Two builds of one folder at the
        same time wait for each other."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._run(jobs)

    def _run(self, jobs: int | None) -> None:
        rules = [
            f"cxx = {self.compiler}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            "  command = $cxx $in -o $out $flags",
            "  description = $out",
            "rule archive",
            "  command = rm -f $out && ar crs $out $in",
        ]
        (self.folder / "build.ninja").write_text("\n".join(rules + self._lines) + "\n", encoding="utf-8")
        command = [find_ninja(), *(["-j", str(jobs)] if jobs else [])]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        said = done.stdout + done.stderr
        if done.returncode != 0:
            print(said, file=sys.stderr)
            raise BuildFailed("the compiler stopped with the errors above")
        if "warning:" in said:
            print(said, file=sys.stderr)

    def _object(self, source: Path, name: str, more: str) -> str:
        # a relative path: a copy of the tree, objects and all, is up to date as well
        source = Path(os.path.relpath(source, self.folder))
        self._lines += [f"build {_path(name)}: compile {_path(source)}", f"  flags = {self.flags} {more}"]
        return name


def _path(path: Path | str) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
