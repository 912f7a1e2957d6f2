# Both `make demo` and `make test` start from a bare machine with Python 3.11+ and a C++ compiler.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO_DIR ?= demo

# Two of them wait for Slurm a part of the time; tests/conftest.py decides which tests share a process.
PYTEST := $(RUN) -m pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder

.PHONY: setup demo lint test test-quick check gpu-check clean

setup: $(STAMP)

# Once: a second call installs nothing until one of the two files changes.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip setuptools wheel
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

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

# What a commit must pass, and what CI runs.
check: lint test

# On a machine with a GPU: the kernels and a run, checked and timed within nine minutes.
gpu-check: setup
	$(RUN) -m benchmarks.gpu

clean:
	rm -rf $(DEMO_DIR)
