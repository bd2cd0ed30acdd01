# make quickstart    pairs -> tokenizers -> language model -> decoder -> captions, pictures and a report
# make test          formatting, lint, types, imports and tests
# make downloader    .venv-img2dataset, an environment with img2dataset for data_prep/download.py
# The first two set everything up in .venv first. PYTHON chooses the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/quickstart/quickstart.yaml
RUN ?=
DATA ?=
# Two workers: tests that start ranks of their own leave no cores idle, and more would only take turns.
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOWNLOADER := .venv-img2dataset
SCRIPTS := .ci/run $(wildcard launcher/slurm/*.sbatch launcher/slurm/*.sh benchmarks/*.sh)

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo 'lavit_dist needs Python 3.10-3.12; name one: make PYTHON=python3.12'; exit 1; }

.PHONY: quickstart test lint install downloader
.DELETE_ON_ERROR:

quickstart: $(INSTALLED)
	$(BIN)/python launcher/quickstart.py --config '$(CONFIG)' $(if $(DATA),'data=$(DATA)') $(if $(RUN),'run_dir=$(RUN)')

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup --durations 40 --durations-min 5

lint: $(INSTALLED)
	$(BIN)/ruff format --check --quiet . || { echo 'run $(BIN)/ruff format .'; exit 1; }
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SCRIPTS)

install: $(INSTALLED)

downloader: $(DOWNLOADER)/.installed

$(DOWNLOADER)/.installed: constraints-img2dataset.txt
	@$(CHECK_PYTHON)
	@echo 'Installing img2dataset into $(DOWNLOADER): half a minute, once.'
	@test -x $(DOWNLOADER)/bin/python || $(PYTHON) -m venv $(DOWNLOADER)
	@$(DOWNLOADER)/bin/python -m pip install --quiet --constraint constraints-img2dataset.txt img2dataset
	@touch $@

$(INSTALLED): setup.py constraints.txt
	@$(CHECK_PYTHON)
	@echo 'Installing into $(VENV): a few minutes, once.'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
