# kdcloud: `make` lists what can be asked for. Everything happens in .venv, which `make demo` and `make test` fill.

PYTHON ?= python3
RECIPE ?= recipes/quickstart.yaml
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-export test-slurm unit integration lint lock bench-plan wheel clean install install-dev

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: install  ## plan, run and report a whole distillation on this machine's CPU
	$(BIN)/kdcloud run $(RECIPE) --yes
	@$(BIN)/python scripts/where_is_the_report.py

test: install-dev  ## ruff, mypy, unit and integration tests, each with its time
	@$(BIN)/python scripts/parts.py lint unit integration

unit: install-dev  ## the quick tests only
	@$(BIN)/python scripts/parts.py unit

integration: install-dev  ## the slow tests only: real training, whole runs, kills
	@$(BIN)/python scripts/parts.py integration

test-export: install-dev  ## exported students against a real llama.cpp, which is built once (a C++ compiler)
	@$(BIN)/python scripts/llama_cpp.py
	@$(BIN)/python scripts/parts.py export

test-slurm:  ## with a real SkyPilot, on a Slurm of this machine's own (Debian, root)
	@$(PYTHON) scripts/install.py local,s3,dev,sky
	@$(PYTHON) scripts/parts.py slurm

lint: install-dev  ## ruff and mypy
	@$(BIN)/python scripts/parts.py lint

lock: install-dev  ## write requirements/*.txt anew (UPGRADE=1: with the newest versions)
	$(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

bench-plan: install-dev  ## how far the plan's models are off, into docs/estimates.md
	@$(BIN)/python scripts/bench_plan.py

wheel: install-dev  ## dist/kdcloud-VERSION-py3-none-any.whl
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove what the other targets made
	rm -rf .venv .venv-sky .venv-export build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

install:
	@$(PYTHON) scripts/install.py local,page

install-dev:
	@$(PYTHON) scripts/install.py local,page,dev
