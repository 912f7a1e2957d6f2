# Both `make demo` and `make test` start from a bare machine with Python 3.11+ and a C++ compiler.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO_DIR ?= demo

# Two of them wait for Slurm a part of the time; tests/conftest.py decides which tests share a process.
PYTEST := $(RUN) -m pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder

# mkdocs 1.6 is pinned; its plugins would warn of a version 2 each time.
MKDOCS := NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(VENV)/bin/mkdocs

.PHONY: setup demo lint test test-quick check docs site gpu-check clean

setup: $(STAMP)

# Once: a second call installs nothing until one of the two files changes.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip setuptools wheel
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# For one test, in an environment of its own: it needs an older webdataset.
$(VENV)/img2dataset/bin/img2dataset: | setup
	$(PYTHON) -m venv $(VENV)/img2dataset
	$(VENV)/img2dataset/bin/pip install --quiet img2dataset==1.47.0

demo: setup
	$(RUN) -m pretrain.demo --dir $(DEMO_DIR)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Everything.
test: setup
	$(PYTEST)

# Lint, types and the tests that start no process: three minutes.
test-quick: lint
	$(PYTEST) -m "not integration"

# The documentation at http://127.0.0.1:8000, made again at each change.
docs: setup
	$(MKDOCS) serve

# The documentation in build/site; a broken link or anchor is an error.
site: setup
	$(MKDOCS) build --strict --quiet

# What a commit must pass, and what CI runs.
check: lint site test

# On a machine with a GPU: the kernels and a run, checked and timed within nine minutes.
gpu-check: setup
	$(RUN) -m benchmarks.gpu

clean:
	rm -rf $(DEMO_DIR)
