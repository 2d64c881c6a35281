# Requires Python 3.11 or newer, pip and make; everything else is installed into .venv/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Nothing here contacts a hub. Waiting threads sleep, because on a busy machine spinning threads make each other ten times
# slower.
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help install demo check unit test loaders chaos lint docs seed-table bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## install qbatch and the development tools into .venv/

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qbatch needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## make two small models, quantize and measure them: no server, GPU or hub needed
	$(BIN)/python -m examples.make_models
	QBATCH_HOME="$(CURDIR)/.qbatch" $(BIN)/qbatch run --models examples/models.txt --bits 4,8

# Whole files, in the order of tests/conftest.py. More at a time than there are cores: half of the time is spent waiting
# for leases to run out.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

check: install ## style, types and the unit tests: for every change, in two minutes
	$(MAKE) --jobs 2 lint unit

# Beside the check of types, which keeps one core busy.
unit: install
	$(PYTEST) -m "not gpu and not slow" --numprocesses 2 tests/unit

# The page of a report is opened in a browser where there is one: pip cannot install it.
export CHROMIUM ?= $(firstword $(foreach name,chromium chromium-browser google-chrome chrome,$(shell command -v $(name))))

test: install ## all tests that need no GPU
	$(if $(CHROMIUM),,@echo "There is no Chromium here (Debian: apt-get install chromium), so no report is opened in it.")
	$(PYTEST) -m "not gpu and not loaders$(if $(CHROMIUM),, and not browser)" --numprocesses 3

# LOADERS_PYTHON names an interpreter that has PEFT and sentence-transformers, instead of the one that is made here. An
# engine's own pins differ from ours: ENGINE_PYTHON names its interpreter, and without it no engine is tried. Each test
# starts several processes that import torch, and an engine, which take minutes on a busy machine.
LOADERS_STAMP := .venv-loaders/.installed

loaders: install $(if $(LOADERS_PYTHON),,$(LOADERS_STAMP)) ## load checkpoints with PEFT, sentence-transformers and, if ENGINE_PYTHON names it, vLLM
	LOADERS_PYTHON="$(or $(LOADERS_PYTHON),$(CURDIR)/.venv-loaders/bin/python)" $(BIN)/python -m pytest -m loaders --timeout 1200 tests/loaders

$(LOADERS_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-loaders
	.venv-loaders/bin/python -m pip install --quiet --constraint constraints.txt '.[loaders,torchao]'
	@touch $@

CHAOS_KILLS ?= 200

chaos: install ## kill processes at random while batches run, then check every job (CHAOS_KILLS=1000 for a long run)
	$(BIN)/python -m tests.chaos --kills $(CHAOS_KILLS)

lint: install ## check style, types, which package may import which, and that the long tests can be imported
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@found=$$($(BIN)/python -m pytest --collect-only -q --ignore tests/unit 2>&1) || { echo "$$found"; exit 1; }

docs: install ## write docs/cli.md anew from the commands' help
	$(BIN)/python docs/generate_cli.py

seed-table: install ## the recipe's table for bloom-1b7's architecture (random weights; 11 GB of disk, 10 GB of memory)
	$(BIN)/python benchmarks/seed_table.py

bench: install ## compare with doing the same without qbatch
	@failed=; for name in quantize why batch warm_worker database submit_many starting large_fleet long_lived; do \
		echo "benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "these did not meet what they compare with:$$failed"; exit 1; }

clean: ## remove generated files, but not .venv/
	rm -rf .qbatch build dist examples/models .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
