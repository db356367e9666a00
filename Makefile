# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint bench results clean

help:  ## this list
	@grep -E '^[a-z][a-zA-Z0-9%-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/; s/%/NAME/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv and install stexp with the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(READY)  ## train mclSTExp on generated sections, predict a held-out patient, write runs/demo/report.html
	$(BIN)/stexp-train data=demo data.root=data/demo output_dir=runs/demo trainer.max_epochs=20 trainer.accelerator=cpu
	@echo "open runs/demo/report.html in a browser"

data-%: $(READY)  ## download, verify, check and tile: data-her2st, data-cscc, data-alex10x
	$(BIN)/stexp-prepare data=$*

test: $(READY)  ## quick tests; those on real data run where STEXP_DATA names a folder
	$(BIN)/pytest -n 2 -m "not slow"

test-all: $(READY)  ## all tests
	$(BIN)/pytest -n 2

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)  ## speed and memory as ratios against plain alternatives, in one run
	$(BIN)/python experiments/bench.py
	$(BIN)/python experiments/bench_prepare.py
	$(BIN)/python experiments/bench_predict.py

results: $(READY)  ## the README's results table from experiments/results
	$(BIN)/python experiments/results.py

clean:  ## delete runs, caches and the environment; not data
	rm -rf .venv runs cache build dist .pytest_cache .ruff_cache
