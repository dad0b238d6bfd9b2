# Every target works in a fresh clone: the first one that runs makes the environment.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Real recordings for the tests, the demo and the tutorials.
ifneq ($(wildcard ../shared/data/.),)
export PYRODYN_DATA ?= $(abspath ../shared/data)
endif

# Processes that compile every module anew take seconds longer to start, and tests start many.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo test long check format tutorials bench calibrate fuzz kills clean

help:  ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(INSTALLED)

# The constraints hold for Python 3.11; a newer Python takes the newest versions that the metadata allow. Modules are
# compiled where they are imported: most never are, and all of them take a minute.
$(INSTALLED): pyproject.toml constraints/py311.txt
	$(PYTHON) -m venv --clear $(VENV)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	    constraints="--constraint constraints/py311.txt"; \
	else \
	    constraints=""; \
	fi; \
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[nwb,demo,geometry,dev]' $$constraints
	touch $@

demo: $(INSTALLED)  ## fit real recordings under two engines and draw the results
	$(BIN)/pyrodyn demo

# A process a core: a second thread of the linear algebra would only wait for its turn.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4

test: $(INSTALLED)  ## run the tests
	$(PYTEST) --dist loadfile --durations 30 -m "not long"

long: $(INSTALLED)  ## run the tests that hold samplers against each other for half a minute and more
	$(PYTEST) --dist load -m long

check: $(INSTALLED)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)  ## put imports and layout in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

NOTEBOOKS := $(patsubst tutorials/%.py,build/tutorials/%.ipynb,$(wildcard tutorials/*.py))

build/tutorials/%.ipynb: tutorials/%.py $(INSTALLED)
	mkdir -p $(@D)
	$(BIN)/jupytext --quiet --to ipynb --output $@ $<

tutorials: $(NOTEBOOKS)  ## execute every tutorial as a notebook
	$(if $(NOTEBOOKS),,$(error tutorials/ holds no .py file))
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=900 --overwrite $(NOTEBOOKS)

# The scripts in benchmarks/ are sorted by the first word of their names.
define run_scripts
	$(if $(wildcard benchmarks/$(1)_*.py),,$(error benchmarks/ holds no $(1)_*.py))
	for script in benchmarks/$(1)_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done
endef

PEERS := .venv-peers

$(PEERS)/.installed: constraints/peers.txt
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --requirement constraints/peers.txt
	touch $@

bench: $(INSTALLED) $(PEERS)/.installed  ## time kernels and engines beside their peers: benchmarks/bench_*.py
	export PYRODYN_PEERS=$(abspath $(PEERS))/bin/python; $(call run_scripts,bench)

calibrate: $(INSTALLED)  ## coverage and agreement tables: benchmarks/calibrate_*.py
	$(call run_scripts,calibrate)

fuzz: $(INSTALLED)  ## damaged files are refused or read back equal: benchmarks/fuzz_*.py
	$(call run_scripts,fuzz)

kills: $(INSTALLED)  ## killed runs resume to the same draws: benchmarks/kill_*.py
	$(call run_scripts,kill)

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) $(PEERS) build .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
