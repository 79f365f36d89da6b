# `make demo` and `make test` are all that a fresh machine needs; each makes .venv and installs what it needs into it.
PYTHON ?= python3
TORCH := torch==2.13.0
# In a folder of its own: its mpirun would take the place of Open MPI's.
MPICH := mpich==5.0.2
# As in pyproject.toml, [build-system].
BUILD_TOOLS := 'setuptools>=77' 'cmake>=3.26' ninja 'nanobind>=3.0'
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# Arguments for pytest, for example `make test ARGS="-n 0 -k guardian -x"`. Two processes: most tests wait for something.
ARGS ?=

export PATH := $(CURDIR)/$(BIN):$(PATH)

NATIVE := $(shell find native -type f)
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))
PACKAGE := $(shell find launcher -type f '(' -name '*.py' -o -name '*.pyi' -o -name py.typed ')') \
           $(NATIVE) setup.py CMakeLists.txt pyproject.toml MANIFEST.in $(wildcard README.md)

.PHONY: help demo test lint fix native bench wheel clean FORCE
.DEFAULT_GOAL := help

help:  ## show this
	@grep -hE '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+): .*## /  make \1\t/' | expand -t 16

demo: $(VENV)/.installed  ## train a small network on real digits with two ranks
	$(BIN)/python -m launcher --nproc-per-node 2 examples/digits/train.py

test: $(VENV)/.installed  ## run all tests; ARGS goes to pytest
	$(BIN)/pytest -n 2 $(ARGS)

lint: $(VENV)/.dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

fix: $(VENV)/.dev  ## repair what the linters can repair by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

native: $(VENV)/.tools  ## build the native part into the checkout; seconds after an edit
	$(BIN)/python setup.py --quiet build_ext --inplace

bench: $(VENV)/.installed  ## measure against the peers; results go to benchmarks/*/results
	@for bench in benchmarks/*/run.py; do echo "== $$bench"; $(BIN)/python "$$bench" || exit 1; done

wheel: $(VENV)/.tools  ## build dist/launcher-*.whl
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:  ## remove the environment and all that was built
	rm -rf $(VENV) build dist launcher.egg-info launcher/_guardian launcher/_agent launcher/*.so .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "cannot make $(VENV): install python3-venv" >&2; exit 1; }

# All that changes rarely: torch, and what builds the package. Building in this environment instead of an isolated one
# makes every later build incremental.
$(VENV)/.tools: pyproject.toml | $(BIN)/python
	$(PIP) install --upgrade pip
	$(PIP) install $(TORCH) $(BUILD_TOOLS)
	$(PIP) install --prefix $(CURDIR)/$(VENV)/mpich --ignore-installed --no-deps $(MPICH)
	@touch $@

# Installed as a user would have it, and built in place as well: `python -m launcher` in the root of the checkout imports
# the checkout, whatever is installed.
$(VENV)/.installed: $(PACKAGE) $(VENV)/.sources | $(VENV)/.tools
	$(PIP) install --no-build-isolation '.[test]'
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.installed
	$(PIP) install --no-build-isolation '.[dev]'
	@touch $@

# A file that was removed is no newer than the stamp; the list of files is.
$(VENV)/.sources: FORCE | $(BIN)/python
	@echo '$(sort $(PACKAGE))' | cmp -s - $@ || echo '$(sort $(PACKAGE))' > $@
