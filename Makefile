# Each target sets up what it needs: a virtual environment, the package, and what it runs.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
STAMP = $(VENV)/.reticent-installed
RUN ?= runs/demo
WORKERS ?= 2

export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1

.PHONY: demo test chaos faults test-all lint format setup clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)  ## run the default plan: a private federation, its artifact and its report
	$(BIN)/reticent simulate --run $(RUN)

test: $(STAMP)  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ray and not packaging and not chaos and not faults"

chaos: $(STAMP)  ## kill and tear ledgers many times, and print what was found
	$(BIN)/python -m pytest -q -s -m chaos

faults: $(STAMP)  ## kill real processes, damage their network, and compare the models
	$(BIN)/python -m pytest -q -s -m faults

test-all: $(STAMP)  ## run every test, also those that need Ray, build packages or kill processes
	$(BIN)/python -m pip install --quiet -e '.[simulation]'
	$(BIN)/python -m pytest -q

lint: $(STAMP)  ## check style, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)  ## make the virtual environment and install the package in it

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:  ## remove caches and build products, not runs
	rm -rf dist build .pytest_cache .ruff_cache .hypothesis
