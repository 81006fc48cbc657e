"""What is installed: a lean import, every package in the wheel, and fastdiff.kernels under no other name."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

HEAVY = ("triton", "scipy", "matplotlib", "yaml", "pytest", "hypothesis", "pandas", "torch.utils.cpp_extension")

RECORD = "kernels/configs/GPU.json"


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
    left_out = shutil.ignore_patterns("__pycache__", "*.so", ".*", "*.egg-info", "build", "dist", "bench")
    source = Path(shutil.copytree(ROOT, folder / "source", ignore=left_out))
    for objects in (ROOT / "build").glob("ops-*"):  # compiled already: what is not up to date is compiled again
        shutil.copytree(objects, source / "build" / objects.name)
    return source


def why_no_ops() -> str | None:
    """Why the C++ ops cannot be built here."""
    return (
        None if shutil.which(os.environ.get("CXX", "c++")) and (shutil.which("ninja") or find("ninja")) else "no tools"
    )


def find(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def build(command: list[str], source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=source, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_checkout(folder)
    (source / RECORD).parent.mkdir(exist_ok=True)
    (source / RECORD).write_text("{}")  # what kernels/tuning.py writes on a GPU
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
    source |= {path.relative_to(ROOT) for path in (ROOT / "fastdiff/demo/models").glob("*/*")}
    expected = {path.as_posix() for path in source}
    assert expected <= names, sorted(expected - names)
    assert "fastdiff/py.typed" in names
    assert f"fastdiff/{RECORD}" in names
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


def test_the_wheel_holds_the_cpp_ops(installed: Path) -> None:
    if why_no_ops() is not None:
        pytest.skip("no C++ compiler or no ninja here: the wheel is without the C++ ops")
    result = python(
        """
import torch
from fastdiff.ops.backend import available_backends
from fastdiff.ops.cpu import library
from fastdiff.ops.sampler_step import sampler_step
assert library.why_not() is None, library.why_not()
assert library.LIBRARY.name == "libfastdiff.so" and library.capability() in library.available_levels()
assert "cpu" in available_backends()
x = torch.randn(3, 5)
assert torch.equal(sampler_step.bind("cpu", "cpu")(x, x, None, 2.0, 0.0, 0.0), 2 * x)
""",
        installed,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_build_goes_on_and_says_what_is_lost(compiler: str, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    source = copy_of_the_checkout(tmp_path)
    result = build(["setup.py", "-q", "build_ext", "--inplace"], source, CC=compiler, CXX=compiler)
    assert result.returncode == 0, result.stderr
    said = "the C++ ops (fastdiff/libfastdiff.so) and the C++ input reader (fastdiff._C) were not built: "
    assert said in result.stderr
    assert "fastdiff works without; lost: the 'cpu' backend, which is many times faster on CPUs" in result.stderr
    assert "make build" in result.stderr
    assert (result.stderr.count("were not built"), result.stderr.count("failed")) == (1, 0)
    assert not list(source.rglob("*.so"))
    stamp = source / "build" / "ready"
    stamp.parent.mkdir(exist_ok=True)
    stamp.touch()
    command = ["setup.py", "-q", "build_ops", "--if-possible", "--and-module", f"--stamp={stamp}"]
    developer = build(command, source, CC=compiler, CXX=compiler)
    assert (developer.returncode, developer.stderr.count("were not built: ")) == (0, 1)
    assert not stamp.exists(), "what was not built is tried again"
    asked = build(["setup.py", "-q", "build_ops"], source, CXX=compiler)
    assert (asked.returncode, asked.stderr.count("were not built: ")) == (1, 1)


def test_a_checkout_that_hides_an_installation_says_so_and_warns_once(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for folder in (checkout, site):
        shutil.copytree(ROOT / "fastdiff", folder / "fastdiff", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (site / "fastdiff-0.1.0.dist-info").mkdir()
    (site / "fastdiff-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fastdiff\nVersion: 0.1.0\n"
    )
    code = """
import fastdiff
from fastdiff.demo.__main__ import MODEL
for backend in ("torch", "auto", "auto"):
    print(backend, set(fastdiff.from_pretrained(MODEL, backend=backend).backends.values()))
"""
    result = python(code, checkout, site)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning: fastdiff runs in plain PyTorch on this CPU") == 1
    assert f"{checkout / 'fastdiff' / 'libfastdiff.so'} is not there" in result.stderr
    assert f"it hides the fastdiff that is installed in {site}" in result.stderr
    assert "<string>:5: UserWarning" in result.stderr, "it points at the caller's line"
    quiet = python("import fastdiff; from fastdiff.ops import ALL; [op.bind('torch', 'cpu') for op in ALL]", checkout)
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_torch_may_lie_in_a_folder_with_a_space(tmp_path: Path) -> None:
    if why_no_ops() is not None:
        pytest.skip("no C++ compiler or no ninja here")
    folder = tmp_path / "site packages"
    folder.mkdir()
    (folder / "torch").symlink_to(Path(torch.__file__).parent)
    compiler, said = tmp_path / "c++", tmp_path / "said"
    # notes what it is told, one word a line, and compiles nothing but the trial from standard input
    note = f"for word; do echo \"$word\"; done >> '{said}'"
    compiler.write_text(f"#!/bin/sh\n{note}\ncase \" $* \" in *' -x '*) exit 0;; esac\nexit 1\n")
    compiler.chmod(0o755)
    source = copy_of_the_checkout(tmp_path)
    build(["setup.py", "-q", "build_ops"], source, CXX=str(compiler), PYTHONPATH=str(folder))
    words = said.read_text().splitlines()
    assert str(folder / "torch" / "include") in words


def test_a_blank_name_of_a_compiler_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if why_no_ops() is not None:
        pytest.skip("no C++ compiler or no ninja here")
    result = python("import compilation; print(compilation.find_compiler())", ROOT / "csrc")
    monkeypatch.setenv("CXX", " ")
    assert python("import compilation; print(compilation.find_compiler())", ROOT / "csrc").stdout == result.stdout
    assert result.returncode == 0


def test_an_isolated_build_cannot_see_torch_and_says_what_is_lost(tmp_path: Path) -> None:
    source = copy_of_the_checkout(tmp_path)
    hidden = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'build_ops', '--if-possible']"
    )
    result = build(["-c", f"{hidden}; runpy.run_path('setup.py')"], source)
    assert result.returncode == 0, result.stderr
    assert "were not built: torch is not installed, or hidden by an isolated build. " in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_sources_that_do_not_compile_are_an_error(tmp_path: Path) -> None:
    if why_no_ops() is not None:
        pytest.skip("no C++ compiler or no ninja here")
    source = copy_of_the_checkout(tmp_path)
    with (source / "csrc" / "cpu" / "capability.cpp").open("a") as file:
        file.write("this is not C++\n")
    result = build(["setup.py", "-q", "build_ops", "--if-possible"], source)
    assert result.returncode != 0
    assert "error:" in result.stderr
    assert "fastdiff: the compiler stopped with the errors above" in result.stderr


def test_a_source_distribution_builds_like_a_checkout(tmp_path: Path) -> None:
    source = copy_of_the_checkout(tmp_path)
    result = build(["setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)], source)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("fastdiff-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = [path for folder in ("csrc", "kernels", "fastdiff") for path in (source / folder).rglob("*.*")]
    needed += [source / name for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile")]
    missing = {path.relative_to(source).as_posix() for path in needed if "__pycache__" not in path.parts} - names
    assert not missing, sorted(missing)


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
