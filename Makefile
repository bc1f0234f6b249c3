# make convert   light environment, and one pipeline converted
# make test      the engine on CPU, every check and every test (what .ci/run calls)
# make generated every checked-in port, anew
# make env       only the environment of `make test`

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: convert test lint generated env wheel clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CLASS ?= diffusers.QwenImagePipeline
OUT ?= build/ports
JOBS ?= 2
PINS := porter/verify/requirements-cpu.txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
export PIP_ROOT_USER_ACTION := ignore

convert: $(VENV)/.light
	@$(BIN)/porter convert $(CLASS) --out $(OUT)
	@$(BIN)/porter status --ports --out $(OUT)

env: $(VENV)/.full

test: $(VENV)/.full lint
	$(BIN)/porter check
	$(BIN)/porter rules test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

lint: $(VENV)/.full
	$(BIN)/ruff check --quiet porter tests benchmarks
	$(BIN)/ruff format --quiet --check porter tests benchmarks
	$(BIN)/mypy --no-error-summary

generated: $(VENV)/.light
	$(BIN)/porter convert $$($(BIN)/python -c 'import json; print(*(p["source"] for p in json.load(open("generated/manifest.json"))["ports"]))')

wheel: $(VENV)/.light
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist

# Versions are the ones that verification pins, so that adding the engine changes nothing that is there.
$(VENV)/.light: pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed; say make PYTHON=..." >&2; exit 1; }
	@echo "making $(VENV) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint $(PINS) --editable .
	@touch $@

# The engine's packages come first and without their dependencies: nothing else may choose a torch.
$(VENV)/.full: $(VENV)/.light
	@echo "adding the engine (CPU) and the tools of development; a few minutes ..." >&2
	@PIP_QUIET=2 $(BIN)/python -m porter.verify.install
	@$(PIP) install --constraint $(PINS) --editable '.[dev]'
	@touch $@
