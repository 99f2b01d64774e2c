# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs first; `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 30
FUZZ ?= 1000000
# A file stays with one worker, so that nothing is set up twice.
IN_PARALLEL := -n logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast soak gpu-check lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12
	@echo
	@echo 'Variables: PYTHON (>= 3.11), MINUTES and FUZZ (of soak), and ARGS: options of `lynx demo`, of pytest'
	@echo '(test, test-fast), of `python -m tests.soak` or of `python -m scripts.gpu_check`'

setup: ## make .venv with vLLM for this machine, and the small model
	@$(PYTHON) -m scripts.setup

demo: setup ## two vLLM servers and a router: one prompt, speculative and blocking
	@$(BIN)/lynx demo $(ARGS)

test: setup ## all tests that this machine can run
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest $(IN_PARALLEL) tests/unit
	$(BIN)/python -m pytest --ignore tests/unit
endif

test-fast: setup ## the tests that need no vLLM server or engine, at most 4 minutes
	$(BIN)/python -m pytest $(IN_PARALLEL) tests/unit $(ARGS)

soak: setup ## a million inputs a parser, MINUTES (30) of mixed load with faults; report in soak/
	LYNX_FUZZ_INPUTS=$(FUZZ) $(BIN)/python -m pytest -n logical --maxprocesses 4 -o timeout=3600 tests/unit/fuzz
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --out soak $(ARGS)

gpu-check: ## all Triton kernels, in 8 minutes; no setup: PYTHON needs torch, Triton and numpy
	@$(PYTHON) -m scripts.gpu_check $(ARGS)

lint: setup ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean: ## remove what builds, tests and the demo left (.venv and the model stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-logs demo-report.json demo-timeline.png soak gpu-check.json
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
