# Both `make demo` and `make test` start from a bare machine with Python 3.11+ and a C++ compiler.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO_DIR ?= demo

.PHONY: setup demo test check clean

setup: $(STAMP)

# Once: a second call installs nothing until requirements.txt changes.
$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip setuptools wheel
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(RUN) -m pretrain.demo --dir $(DEMO_DIR)

test: setup
	$(RUN) -m pytest

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest

clean:
	rm -rf $(DEMO_DIR)
