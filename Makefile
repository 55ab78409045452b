# The one way in, on a laptop and in CI alike.

PYTHON ?= python3
BIN := .venv/bin
# Real data for tests and examples, where there is any; they say so and skip where there is none.
export HAWQ_DATA ?= $(abspath ../shared/data)

.PHONY: demo test test-cluster check bench clean

demo: .venv/ready ## Set everything up and run a whole search on handwritten digits.
	$(BIN)/hawq run configs/digits.yaml

test: .venv/ready ## Set everything up and run the tests.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not cluster"

test-cluster: .venv/ready ## A cluster of three nodes on this machine that loses one, then its head: three minutes alone.
	$(BIN)/python -m pytest -m cluster

check: .venv/ready ## Formatting, lints and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: bench-search bench-allocate bench-finetune bench-scaling bench-convergence bench-curvature bench-agents bench-networks bench-service ## All benchmarks; each writes build/bench/NAME.json.

bench-%: .venv/ready ## One of tests/benchmarks/.
	$(BIN)/python -m tests.benchmarks.$*

clean: ## Remove what the targets above made.
	rm -rf .venv build runs *.egg-info

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
