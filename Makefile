# Everything needs only make and Python >= 3.11; every target sets up .venv by itself.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check bench gpu ui clean
SHELL := /bin/sh

PYTHONS ?= python3.11 python3.12 python3.13 python3
ARGS ?=
# Test processes; at most four, because each takes up to a gigabyte.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
FOLDER ?= runs/demo
PORT ?= 5000

# `ray job submit` starts a bare `python`: it must be ours.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
# Without bytecode every Ray worker compiles torch, about 8 s of CPU each.
unexport PYTHONDONTWRITEBYTECODE
# Do not use a cluster that the shell points at.
unexport RAY_ADDRESS RAY_JOB_HEADERS
export RAY_USAGE_STATS_ENABLED := 0
export RAY_TRAIN_V2_ENABLED := 1
# img2dataset's resizer checks for updates when it is imported.
export NO_ALBUMENTATIONS_UPDATE := 1
# Two processes and 0.5 GB for the MLflow server instead of ten and 2 GB.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

setup: ## Make or refresh .venv from requirements.lock (the other targets do this automatically)
	@stamp="$$(cat requirements.lock pyproject.toml | cksum) $(CURDIR)"; \
	if [ "$$(cat .venv/.installed 2>/dev/null)" = "$$stamp" ] && .venv/bin/python -c pass 2>/dev/null; then exit 0; fi; \
	if ! .venv/bin/python -c 'import pip' 2>/dev/null; then \
		python=; \
		for name in $(PYTHONS); do \
			if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
				python=$$name; break; \
			fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "clipmill needs Python 3.11 or newer with its venv module; tried: $(PYTHONS)." >&2; \
			echo "Name another one with: make setup PYTHONS=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		echo "Setting up .venv with $$($$python --version): about 7 GB, a minute or two."; \
		rm -rf .venv; \
		$$python -m venv .venv || exit 1; \
	else \
		echo "Refreshing .venv: requirements.lock, pyproject.toml or the folder has changed."; \
	fi; \
	quiet=--quiet; if [ -t 2 ]; then quiet=; fi; \
	.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check uv && \
	.venv/bin/python -m uv pip install $$quiet --compile-bytecode -r requirements.lock && \
	.venv/bin/python -m uv pip install --quiet --compile-bytecode --no-deps --no-build-isolation --editable . && \
	echo "$$stamp" > .venv/.installed

demo: setup ## Refresh, pre-train, evaluate on a local Ray and MLflow; ends with a table (again from the start: ARGS=--fresh)
	@.venv/bin/python jobs/demo.py demo $(ARGS)

test: setup ## Run the tests except the slow ones (make test ARGS='tests/shards -k tar')
	@.venv/bin/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow" $(ARGS)

test-all: test ## Run every test: first `make test`, then the slow ones, last and one at a time those that watch the clock
	@.venv/bin/python -m pytest -n $(JOBS) --dist loadgroup -m "slow and not alone" $(ARGS)
	@.venv/bin/python -m pytest -m "slow and alone" $(ARGS)

check: setup ## Formatting, lint and types
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy

bench: setup ## Side-by-side speed measurements (minutes; not part of the tests)
	@for file in tests/benchmarks/*.py; do echo "== $$file"; .venv/bin/python "$$file" $(ARGS) || exit 1; done

gpu: setup ## Checks and figures of the GPU of this machine, eight minutes at most (without one: make gpu ARGS=--dry)
	@.venv/bin/python tests/gpu/run.py $(ARGS)

ui: setup ## Open the MLflow UI on the demo's runs (make ui FOLDER=runs/demo PORT=5000)
	@test -f "$(FOLDER)/mlflow.db" || { echo "No runs in $(FOLDER) yet: make demo makes some; for other runs: make ui FOLDER=$$HOME/.local/share/clipmill/mlflow" >&2; exit 1; }
	@echo "MLflow on http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning (Ctrl-C ends it)"
	@.venv/bin/mlflow server --backend-store-uri "sqlite:///$(abspath $(FOLDER))/mlflow.db" \
		--artifacts-destination "$(abspath $(FOLDER))/artifacts" --host 127.0.0.1 --port $(PORT) --workers 1

clean: ## Remove .venv and caches; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find pipeline jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +
