PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
STORAGE ?= runs
WORKERS ?= 2
TOGETHER = -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 30
export TOKENIZERS_PARALLELISM := false

.PHONY: help install quickstart test test-fast test-all test-kills exactness bench bench-train bench-sweep bench-cluster lint format docs constraints clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## make .venv with the pinned dependencies and this package

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "pause_ray needs Python 3.11 to 3.13; name one with make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: install  ## a whole sweep on a real small model: table, report and MLflow store under runs/
	$(BIN)/pause-ray sweep sweeps/quickstart.yaml --storage $(STORAGE)

# Tests of the command line read its output, into which a Ray cluster of the same process could write: the heavy ones run apart.
HEAVY := torch or mlflow or ray or real
# Several test processes share the cores, so a waiting thread must not keep one busy.
test test-fast test-all: export OMP_WAIT_POLICY := passive
test: install lint  ## lint, types, and the tests that need no GPU and do not take long (a quarter of an hour on 2 cores)
	$(PYTEST) $(TOGETHER) -m "not gpu and not slow and not ($(HEAVY))"
	$(PYTEST) $(TOGETHER) -m "not gpu and not slow and ($(HEAVY))"

test-fast: install  ## tests without Ray, torch or a model, with few examples of each property (a minute and a half on 2 cores)
	$(PYTEST) $(TOGETHER) --fast

test-all: install lint  ## every test that needs no GPU: lost machines, clouds, servers, model families and exactness too
	$(PYTEST) $(TOGETHER) -m "not gpu and not slow and not ($(HEAVY))"
	$(PYTEST) $(TOGETHER) -m "not gpu and (slow or $(HEAVY))"

test-kills: install  ## a sweep whose driver is killed at twenty random moments (ten minutes on 2 cores)
	PAUSE_RAY_KILLS=20 $(PYTEST) tests/sweep/test_robust_sweep.py -k killed_again

exactness: install  ## answers with and without sharing, over 300 cells of the real model (half an hour on 2 cores)
	PAUSE_RAY_EXACTNESS=full $(PYTEST) tests/real/test_exactness.py

bench: install  ## planned grids against generate per cell on the real model (20 minutes on 2 cores)
	$(BIN)/python bench/nih_grid.py --storage $(STORAGE)

bench-train: install  ## training side by side with Hugging Face Trainer + PEFT, and the time to the first step
	$(BIN)/python bench/train.py --storage $(STORAGE)
	$(BIN)/python bench/train.py --storage $(STORAGE) --start

bench-sweep: install  ## what a sweep of a thousand trials costs beyond its trainings and answers
	$(BIN)/python bench/sweep.py

bench-cluster: install  ## cells and rows per second on 1 to 8 nodes of one CPU, and what a thousand GPUs would take
	$(BIN)/python bench/cluster.py --storage $(STORAGE)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: install  ## write the versions that are installed now into constraints.txt
	{ echo "# Every package of a tested installation, for pip's -c. Made by: make constraints"; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

docs: install  ## write docs/configuration.md from the specs
	$(BIN)/python docs/generate_configuration.py

clean:  ## remove caches and the environment, keep runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
