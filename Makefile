# One target for each thing you do with MIRage. Every target that needs the environment makes it first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Another installer may take pip's place: make setup INSTALL="uv pip install"
INSTALL ?= $(BIN)/python -m pip install --quiet
# uv reads the folders of wheels that pip is given (a CPU build of torch, say) under a name of its own.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

# make datagen OUT=DIR SEED=N SIZE=small|mini|paper
OUT  ?= data/mis
SEED ?= 0
SIZE ?= small
# make train RECIPE=NAME ARGS="train.lr=1e-5"; tiny and mini ones run as two CPU processes, others as accelerate is configured
RECIPE ?= mini_internvl_mis
LAUNCH ?= $(if $(filter tiny_% mini_%,$(RECIPE)),--config_file recipes/accelerate/cpu2.yaml)
ARGS   ?=
# make experiment QUICK=1: one family, one seed, four conditions; ARGS="--lanes 2" runs two side by side
QUICK  ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo experiment datagen datagen-endpoint train test lint check gpu-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv and install MIRage with its tests' tools (nothing to do when it is there)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make setup PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (one to three minutes) ..."
	@$(INSTALL) -e '.[dev]'
	@$(BIN)/python -c 'import shutil, torch; torch.version.cuda and not shutil.which("nvidia-smi") and \
	  print("note: this torch is a CUDA build and there is no GPU here; docs/install.md says how to get the CPU build")'
	@touch $@

demo: $(STAMP) ## the whole chain on two CPU processes: data, training, evaluation, summary
	$(BIN)/python -m data_gen make --out data/mini --size mini --seed 0
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu2.yaml mirage/train.py recipe=mini_internvl_mis
	$(BIN)/mirage report runs/mini_internvl_mis

experiment: $(STAMP) ## the paper's comparison on tiny models, with its page: QUICK=1, ARGS="--seeds 0 ..."
	$(BIN)/python -m mirage.miniature.experiment $(if $(QUICK),--quick) $(ARGS)

datagen: $(STAMP) ## write a dataset folder: OUT=DIR SEED=N SIZE=small|mini|paper
	$(BIN)/python -m data_gen make --out $(OUT) --size $(SIZE) --seed $(SEED)

datagen-endpoint: $(STAMP) ## generate with tiny models behind a real OpenAI-compatible server on this machine
	@$(INSTALL) -e '.[serve]'
	$(BIN)/python -m pytest -m slow tests/integration/test_datagen_endpoint.py

train: $(STAMP) ## train a recipe: RECIPE=NAME ARGS="key=value ..."
	$(BIN)/accelerate launch $(LAUNCH) mirage/train.py recipe=$(RECIPE) $(ARGS)

test: $(STAMP) ## the tests that need no GPU and no network, file by file on up to four processes
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mirage data_gen

check: lint test ## everything a change must pass

gpu-check: $(STAMP) ## on an NVIDIA GPU: each GPU path at real sizes against fp32 (a table), and the GPU tests
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m mirage.gpu_check $(ARGS); table=$$?; \
	  $(BIN)/python -m pytest -m gpu && exit $$table; \
	else \
	  echo "gpu-check: no NVIDIA GPU on this machine; the GPU tests were not run"; \
	fi

clean: ## remove the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mirage data_gen tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
