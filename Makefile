# Two commands for a fresh machine: `make quickstart` and `make test`. Each makes the environment it needs in .venv.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT_DIR ?= quickstart_output
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-min quality style clean

help:
	@echo "make quickstart   align a small text-to-image model on this CPU, about two minutes"
	@echo "make test         run the tests"
	@echo "make test-slow    run the slow tests as well"
	@echo "make test-min     run the tests on the oldest supported versions"
	@echo "make quality      lint and type checks; make style repairs what can be repaired"

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making an environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python setup.py constraints.txt
	@echo "Installing tgol_trainer and what it needs (some minutes on a first run)"
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need"
	@$(PIP) -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed
	@$(BIN)/tgol quickstart --output_dir $(OUTPUT_DIR)

test: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-slow: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not gpu'

test-min: constraints-min.txt
	@test -d .venv-min || $(PYTHON) -m venv .venv-min
	@.venv-min/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-min.txt torch
	@.venv-min/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-min.txt -e '.[dev]'
	@OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest -n $(WORKERS) --dist loadgroup

quality: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

style: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-min build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
