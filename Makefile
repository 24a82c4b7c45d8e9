# Everything from a fresh machine with Python and make: `make demo`, `make test`.
#
# TORCH is the torch requirement, TORCH_PIP what pip is told for it. Without an NVIDIA driver the CPU build is asked for,
# which is a tenth of the size of the CUDA build; with one, pip's default is. Another choice:
#     make demo TORCH=torch==2.9.1 TORCH_PIP="--index-url https://download.pytorch.org/whl/cu128"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_PIP ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
BASE := models/SmolLM2-135M-Instruct
# Rebuilt when what is installed changes.
READY := $(VENV)/.ready

.PHONY: help demo test lint install clean

help:
	@echo "make demo     merge the example experts on Ray, show where prompts are routed, and generate"
	@echo "make test     lint, types and all tests"
	@echo "make install  only the environment, in $(VENV)"

install: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@# -qq: where the CPU index can't be reached, pip tries it in vain before it takes TORCH from its default index.
	$(PIP) -qq --retries 1 -c constraints.txt $(TORCH_PIP) "$(TORCH)"
	$(PIP) -c constraints.txt -e ".[test]"
	touch $@

$(BASE)/config.json: scripts/fetch_example_base.py | $(READY)
	$(BIN)/python scripts/fetch_example_base.py $(BASE)

demo: $(READY) $(BASE)/config.json
	$(BIN)/raymoe merge configs/example.yaml out/demo --overwrite
	$(BIN)/python scripts/demo.py out/demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(BASE)/config.json
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
