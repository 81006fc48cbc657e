"""What is installed: a lean import, every package in the wheel, and fastdiff.kernels under no other name."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = ("triton", "scipy", "matplotlib", "yaml", "pytest", "hypothesis", "pandas", "torch.utils.cpp_extension")


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds fastdiff in `paths` only, whatever this one has installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")


def test_importing_fastdiff_is_lean() -> None:
    """Neither the package nor its engine loads a heavy package, compiles something or touches a device."""
    result = python(
        f"""
import sys, subprocess
def refuse(*args, **kwargs): raise AssertionError("a process was started")
subprocess.Popen.__init__ = refuse
import fastdiff
assert "torch" not in sys.modules, "torch"
import torch
before = set(sys.modules)  # torch itself brings some of them
for name in fastdiff.__all__: getattr(fastdiff, name)
loaded = [name for name in {HEAVY!r} if name in sys.modules and name not in before]
assert not loaded, loaded
assert not torch.cuda.is_initialized()
assert not [name for name in sys.modules if name.startswith(("fastdiff.demo", "fastdiff.cli", "fastdiff.train"))]
""",
        ROOT,
    )
    assert result.returncode == 0, result.stderr


def test_kernels_cannot_be_taken_for_the_package_of_that_name() -> None:
    result = python("import kernels", ROOT)
    assert result.returncode == 1
    assert "ImportError: fastdiff.kernels: " in result.stderr
    assert "got 'kernels'" in result.stderr


def copy_of_the_checkout(folder: Path) -> Path:
    """What a build reads, so that it leaves nothing behind in the checkout."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("building fastdiff needs pip and setuptools in this environment (pip install -e '.[dev]')")
    left_out = shutil.ignore_patterns("__pycache__", "*.so", ".*", "*.egg-info", "build", "dist", "tests", "bench")
    return Path(shutil.copytree(ROOT, folder / "source", ignore=left_out))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_checkout(folder)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("fastdiff-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_package_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = {path.relative_to(ROOT) for path in (ROOT / "fastdiff").rglob("*.py")}
    source |= {Path("fastdiff") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    source |= {path.relative_to(ROOT) for path in (ROOT / "fastdiff/demo/model").iterdir()}
    expected = {path.as_posix() for path in source}
    assert expected <= names, sorted(expected - names)
    assert "fastdiff/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    foreign = [name for name in names if not name.startswith(("fastdiff/", "fastdiff-"))]
    assert not foreign, "a wheel of fastdiff installs nothing beside it"


def test_an_installed_wheel_runs_without_the_checkout(installed: Path) -> None:
    result = python(
        """
import fastdiff, fastdiff.kernels
from fastdiff.demo.__main__ import MODEL
print(fastdiff.from_pretrained(MODEL).generate([["Reef, part 1"]], top_k=1, seed=0).item_ids)
""",
        installed,
    )
    assert result.returncode == 0, result.stderr
    assert "Reef, part 2" in result.stdout


def test_the_extension_tells_how_it_was_built(installed: Path) -> None:
    if not list(installed.glob("fastdiff/_C.*.so")):
        pytest.skip("no C++ compiler here: the wheel is without fastdiff._C")
    result = python(
        """
from fastdiff import _C
facts, capabilities = _C.build_facts(), _C.cpu_capabilities()
assert facts["cxx_standard"] == "17" and facts["optimized"] == "yes", facts
assert all(isinstance(value, str) for value in facts.values()), facts
assert set(capabilities) <= {"avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni"}, capabilities
assert all(isinstance(value, bool) for value in capabilities.values()), capabilities
""",
        installed,
    )
    assert result.returncode == 0, result.stderr


def test_without_a_compiler_the_build_goes_on_and_says_what_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    compilers = dict.fromkeys(("CC", "CXX"), "no-such-compiler")
    result = subprocess.run(
        command, cwd=copy_of_the_checkout(tmp_path), capture_output=True, text=True, env={**os.environ, **compilers}
    )
    assert result.returncode == 0, result.stderr
    assert "fastdiff._C was not built" in result.stderr
    assert "fastdiff works without it, in plain PyTorch; lost are" in result.stderr
    assert not list((tmp_path / "build").rglob("_C*.so"))


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
