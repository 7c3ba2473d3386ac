# `make demo` trains a small model for a minute; `make test` runs the tests; `make help` lists all targets.
# Without make (Windows): README.md has the same commands one by one.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

NATIVE := $(if $(filter arm64 aarch64,$(shell uname -m)),-mcpu=native,-march=native)
CFLAGS ?= -O3 $(NATIVE) -ffp-contract=fast

.PHONY: help venv demo test lint check gpu-check faults reference clean

help:
	@echo "make demo       install into .venv, train a small model for one minute (three on a slow machine), print a sample, write an HTML report"
	@echo "make test       run all tests"
	@echo "make check      run ruff (lint and format), then all tests"
	@echo "make gpu-check  check a GPU beside the CPU, and measure it: eight minutes, no network (ARGS='--text FILE')"
	@echo "make faults     run the fault tests of docs/RELIABILITY.md: kills, signals, full disks, lost ranks (hours)"
	@echo "make reference  build GPT-2 in C: reference/build/gpt2"
	@echo "make venv       create .venv (to install your own build of PyTorch before make demo)"
	@echo "make clean      delete .venv, builds and caches; keep corpora and runs"

venv: .venv
.venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Fradique needs Python 3.10 to 3.13, and $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

$(READY): pyproject.toml constraints.txt | .venv
	@echo "installing into .venv (PyTorch is large: this can take several minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,test,dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python data/python_char/prepare.py
	@$(BIN)/python train.py config/train_python_char.py --overwrite
	@echo
	@$(BIN)/python sample.py --out_dir=out/python-char --start="def " --max_new_tokens=300
	@echo
	@$(BIN)/python -m lab.report --out_dir=out/python-char

test: $(READY)
	@echo "running all tests, a dot for each: 4 minutes on two cores"
	@$(BIN)/python -m pytest

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

check: lint test

# Uses the Python of .venv, or $(PYTHON) if there is none: it installs nothing, because a GPU may have no network.
gpu-check:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu_check $(ARGS)

faults: $(READY)
	@$(BIN)/python tests/faults/run.py

# GPT-2 in C. `make reference OPENMP=` builds it without threads (Apple's clang has no OpenMP).
OPENMP ?= $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
reference: reference/build/gpt2
reference/build/gpt2: reference/gpt2.c
	@mkdir -p reference/build
	$(CC) -std=c11 -Wall -Wextra -Werror $(CFLAGS) $(OPENMP) $< -o $@ -lm

clean:
	rm -rf .venv build reference/build *.egg-info .pytest_cache .ruff_cache .hypothesis
