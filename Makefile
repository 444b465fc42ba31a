# make demo   the whole path on a built-in example, into ./statecore-demo/
# make test   every test
# make check  formatting and lint
# make gpu    on a machine with an NVIDIA GPU: build, tests and benchmarks there, into benchmarks/results (or OUT=folder)
#
# The first three work on a fresh machine (Linux, Python >= 3.10, CMake >= 3.18, a C++20 compiler): they create .venv when
# there is none. The last installs nothing: it takes .venv where there is one, else PYTHON, which must import torch and pytest.
# Overridable: PYTHON=python3.12 VENV=/path TORCH=2.14.1 TRANSFORMERS=5.23.0; installed versions of both are kept.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TRANSFORMERS ?= 5.17.0
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f) build_backend/statecore_build.py

.PHONY: demo test check gpu clean
.DEFAULT_GOAL := test

demo: $(VENV)/.statecore-installed
	$(BIN)/statecore demo

test: $(VENV)/.statecore-installed
	cmake -S . -B build -DPYTHON=$(abspath $(BIN)/python) -DSTATECORE_CUDA=OFF > build.log || { cat build.log; exit 1; }
	cmake --build build --target native_tests --parallel >> build.log || { cat build.log; exit 1; }
	ctest --test-dir build --output-on-failure --parallel $$(nproc)
	STATECORE_REQUIRE_EMULATOR=1 $(BIN)/python -m pytest python_tests

check: $(VENV)/.statecore-installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

gpu:
	@PYTHON=$(firstword $(wildcard $(BIN)/python) $(PYTHON)) cuda_tests/run_gpu.sh || test $$? -eq 77

$(VENV)/bin/python:
	@echo "statecore: creating the virtual environment $(VENV)"
	$(PYTHON) -m venv $(VENV)

# torch first: the package is compiled against the torch it finds.
$(VENV)/.statecore-installed: $(VENV)/bin/python $(SOURCES)
	@$(BIN)/python -c "import torch" 2> /dev/null || { echo "statecore: installing torch $(TORCH)"; $(BIN)/python -m pip install --quiet torch==$(TORCH); }
	@$(BIN)/python -c "import transformers" 2> /dev/null || { echo "statecore: installing transformers $(TRANSFORMERS)"; $(BIN)/python -m pip install --quiet transformers==$(TRANSFORMERS); }
	@echo "statecore: compiling the operators and installing the package (about a minute)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf build build.log *.egg-info statecore/_C.so $(VENV)/.statecore-installed
