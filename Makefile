# Every command sets up what it needs: the first one makes .venv with PyTorch and fastdiff in it, the next ones start at once.
# `make help` lists the commands and what can be set.

PYTHON ?= python3
VENV ?= .venv
# PyTorch goes in first and by its exact version, so that nothing after it ever resolves a bare "torch".
TORCH ?= torch==2.13.0
# Triton has wheels for Linux on x86-64 only.
TRITON ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),triton==3.7.1)
# More arguments for pytest, for example: make test ARGS="tests/ops -x"
ARGS ?=

PIP_INSTALL = $(PY) -m pip install -qq --disable-pip-version-check

# Stamps are written last and named after what was asked for, so a set-up that was interrupted, or made for another
# Python or PyTorch, is not taken for a complete one.
ASKED := $(shell printf '%s' '$(PYTHON) $(VENV) $(TORCH) $(TRITON)' | cksum | cut -d' ' -f1)
ifeq ($(VENV),none)
PY := $(PYTHON)
INSTALLED := check-environment
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.fastdiff-ready-$(ASKED)
endif
# The C++ parts of the checkout; built again when their sources change. setup.py writes the stamp, and only where both
# were built: after a failure, or where the library is gone, every command tries again.
READY := build/ready-$(ASKED)
GONE := $(if $(wildcard fastdiff/libfastdiff.so),,again)
CPP := $(sort $(wildcard csrc/*.cpp csrc/*.h csrc/*.py csrc/cpu/*.cpp csrc/cpu/*.h csrc/python/*.cpp csrc/python/*.h))

.PHONY: help demo test check bench gpu lint build clean check-environment again

help:
	@echo "make demo    recommendations from the model that ships with fastdiff, and how good they are (seconds)"
	@echo "make test    the tests (minutes); ARGS='tests/ops -x' goes to pytest"
	@echo "make check   what takes longer: every CPU level, sanitizers, other compilers, Triton kernels, many threads (10 minutes)"
	@echo "make bench   time fastdiff against the published algorithms"
	@echo "make gpu     on a machine with an NVIDIA GPU: tests, sanitizer, tuning and times; call it again to go on"
	@echo "make lint    ruff, ruff format --check, mypy --strict"
	@echo "make build   only the C++ parts, such as after a compiler was installed; the environment stays"
	@echo "make clean   remove .venv, builds and caches"
	@echo ""
	@echo "PYTHON=$(PYTHON)  Python 3.10 or later, to make the environment with"
	@echo "VENV=$(VENV)  the environment; a path of yours is filled, never emptied; VENV=none uses PYTHON as it is"
	@echo "TORCH='$(TORCH)'  what pip is given for PyTorch; add --index-url to choose a build without CUDA"
	@echo "TRITON='$(TRITON)'  empty: none"

demo: $(READY)
	@$(PY) -W 'ignore:fastdiff runs in plain PyTorch' -m fastdiff.demo # setup.py has said so, just above

test: $(READY)
	@$(PY) -m pytest $(ARGS)

check: $(READY)
	@$(PY) csrc/tests/run.py
	@$(PY) -m tests.levels
	@$(PY) -m tests.kernels
	@FASTDIFF_TEST_SECONDS=60 $(PY) -m pytest tests/test_concurrency.py

bench: $(READY)
	@$(PY) -m bench $(ARGS)

gpu: $(READY)
	@$(PY) -m bench.gpu --output build/gpu $(ARGS)

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy --strict -p fastdiff

clean:
	@rm -rf .venv build dist *.egg-info fastdiff/*.so
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-environment:
	@$(PY) -c 'import torch, numpy, safetensors, tqdm' || { \
	  echo "make: VENV=none uses $(PYTHON) as it is, and the packages above are not in it; leave VENV out to have them installed in .venv" >&2; \
	  exit 1; }

build: $(INSTALLED)
	@$(PY) setup.py -q build_ops --and-module --stamp=$(READY)

# A tool that is missing is no error, and setup.py says what is lost; sources that do not compile are one.
$(READY): $(CPP) setup.py $(GONE) $(if $(filter none,$(VENV)),|) $(INSTALLED)
	@if $(PY) -c 'import setuptools' 2>/dev/null; then \
	  $(PY) setup.py -q build_ops --if-possible --and-module --stamp=$@; \
	else echo "make: the C++ parts are left as they are: $(PYTHON) has no setuptools to build them with$(if $(GONE),; fastdiff runs in plain PyTorch)" >&2; fi

ifneq ($(VENV),none)
# An environment of the caller's own (VENV=path) keeps the PyTorch that it has and is never emptied.
OURS := $(filter file,$(origin VENV))

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no '$(PYTHON)' (Python 3.10 or later is needed); install it, or name one: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1) (Python 3.10 or later is needed); name one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@test -x $(PY) || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make environments: its venv or ensurepip module is missing; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@if [ -n "$(OURS)" ] && [ ! -e $@ ]; then rm -rf $(VENV); fi; rm -f $(VENV)/.fastdiff-ready-*
	@test -x $(PY) || { echo "Setting up $(VENV) (once)"; $(PYTHON) -m venv $(VENV); }
	@if [ -n "$(OURS)" ] || ! $(PY) -c 'import torch' 2>/dev/null; then \
	  echo "  $(TORCH)"; $(PIP_INSTALL) $(TORCH); fi
	@if [ -n "$(TRITON)" ] && ! $(PY) -c 'import triton' 2>/dev/null; then \
	  echo "  $(TRITON)"; $(PIP_INSTALL) $(TRITON); fi
	@echo "  fastdiff and the tools of its developers"
	@$(PIP_INSTALL) 'setuptools>=77' wheel 'pybind11>=2.12' ninja
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@
endif
