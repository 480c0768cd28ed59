# Everything happens in a virtual environment of its own, .venv, made on first use with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test check clean

train: $(READY)  ## train for a session, resuming from the best checkpoint there is
	$(BIN)/castore train --resume best

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest

check: $(READY)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "castore needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove the virtual environment and caches; checkpoints stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
