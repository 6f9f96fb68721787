# Everything a user or a developer runs goes through here; `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Flower looks up updates and reports usage by default; a hospital's software does neither.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help install demo test deployed others check lint types imports doctests clean

help:
	@echo "make demo     install, then run one whole study on real patients (two to three minutes)"
	@echo "make test     install, then run the tests"
	@echo "make check    style, types, import contract, doctests and tests"
	@echo "make clean    remove the environment and caches (results in runs/ stay)"

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,ray]'
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/consilium simulate deploy/examples/wisconsin.toml --run runs/demo --replace

# Tests of whole deployments mostly wait, and keep time: two federations go on beside the other
# tests, which give way to them. Ctrl-C ends both.
DEPLOYED := $(wildcard tests/e2e/test_deploy*.py)
JOBS ?= 2
test: $(VENV)/.installed-dev
	+$(MAKE) --no-print-directory --jobs 2 deployed others

deployed: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(DEPLOYED)

others: $(VENV)/.installed-dev
	nice -n 5 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(DEPLOYED:%=--ignore=%)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

doctests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --doctest-modules common client server simulations

check: lint imports
	+$(MAKE) --no-print-directory --jobs 2 types doctests
	+$(MAKE) --no-print-directory test

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
