# `make demo` and `make test` are all a newcomer needs; both make .venv themselves.
PYTHON ?= python3
VENV ?= .venv
# TORCH=0 leaves PyTorch out; the tests that compare with it then skip by name.
TORCH ?= 1
comma := ,
EXTRAS = $(if $(filter 0,$(TORCH)),dev,dev$(comma)torch)
BIN := $(VENV)/bin
WORKERS ?= 2
ARGS ?=

.PHONY: demo test test-all lint format bench aot notebooks docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m effscale.experiments.quickstart $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "" --durations=25 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-newest .pytest_cache .ruff_cache build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@ $(VENV)/.demo
