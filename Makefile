# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two stamps: what runs the main job, and what the tests, checks and docs need besides.
CORE := $(VENV)/.core
DEVELOP := $(VENV)/.develop
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install compare test test-slow check bench format docs clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "feedbackpath needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .
	@touch $@

$(DEVELOP): $(CORE)
	$(PIP_INSTALL) --editable '.[data,test,lint,docs]'
	@touch $@

install: $(DEVELOP)  ## the library and all that these targets need, into .venv

compare: $(CORE)  ## the main job: five rules on built-in data, 10 to 15 minutes on two cores
	$(BIN)/feedbackpath compare --out runs/compare --resume

test: $(DEVELOP)  ## the tests without the slow ones, 8 to 17 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not slow'

test-slow: $(DEVELOP)  ## all tests, those that take long too
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

check: $(DEVELOP) test  ## all that CI runs: format, lint, types, tests with doctests, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) docs

bench: $(CORE)  ## what each rule costs beside plain PyTorch, into runs/bench.json
	$(BIN)/feedbackpath bench

format: $(DEVELOP)  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEVELOP)  ## the site, into docs/_build
	$(BIN)/sphinx-build --quiet -W --keep-going -b html docs docs/_build

clean:  ## remove what these targets made, but for runs/
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache *.egg-info
