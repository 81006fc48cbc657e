"""Builds fastdiff._C where a C++ compiler is at hand, and maps kernels/ to the import name fastdiff.kernels.

The extension is optional: without it the installation succeeds and fastdiff runs in plain PyTorch. No -march=native, so
that a wheel runs on every machine of its architecture, and no network.
"""

from __future__ import annotations

import sys
from typing import Any

from setuptools import Extension, find_packages, setup

LOST = (
    "fastdiff: the C++ module fastdiff._C was not built ({reason}). fastdiff works without it, in plain PyTorch; lost "
    "are the 'C++ part' and 'CPU' lines of `fastdiff env`. To have it, install a C++17 compiler and the Python headers "
    "(Debian, Ubuntu: apt install g++ python3-dev) and install fastdiff again."
)


def extension() -> tuple[list[Extension], dict[str, Any]]:
    """The extension and the command that builds it; nothing without pybind11 (which only build isolation brings)."""
    try:
        from pybind11.setup_helpers import Pybind11Extension, build_ext
    except ImportError:
        print(LOST.format(reason="pybind11 is not installed"), file=sys.stderr)
        return [], {}

    class OptionalBuild(build_ext):  # type: ignore[misc]
        """Says what is lost where setuptools would only warn that building failed."""

        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:  # every compiler class of setuptools has errors of its own
                print(LOST.format(reason=" ".join(str(error).split())), file=sys.stderr)
                raise

    return [Pybind11Extension("fastdiff._C", ["csrc/module.cpp"], cxx_std=17, optional=True)], {
        "build_ext": OptionalBuild
    }


ext_modules, cmdclass = extension()
setup(
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels"],
    package_dir={"fastdiff.kernels": "kernels"},
    package_data={"fastdiff": ["py.typed", "*.pyi"], "fastdiff.demo": ["model/*"]},
    include_package_data=False,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
