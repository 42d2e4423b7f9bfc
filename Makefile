# What a person types.  Each target sets up what it needs in a virtual environment of the checkout; nothing else
# on the machine is touched.  PYTHON (>= 3.10), VENV, JOBS and RECIPE can be overridden: make demo RECIPE=my.yaml
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
RECIPE ?= recipes/demo.yaml
OUT ?= runs/$(basename $(notdir $(RECIPE)))
BIN := $(VENV)/bin

SOURCES := CMakeLists.txt pyproject.toml constraints.txt Makefile \
	$(shell find csrc hpa_ext python -type f -not -name '*.pyc' -not -path '*/__pycache__*' 2>/dev/null)

# Pinned versions for the packages and for the isolated build; slow registries are asked again, not skipped.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL := $(BIN)/python -m pip install --quiet --retries 10 --timeout 120
# A variable, because a comma would end an argument of call.
EVERYTHING := '.[demo,test,lint,bench]'
retry = for attempt in 1 2 3; do $(1) && break; test $$attempt -lt 3 || exit 1; \
	echo "attempt $$attempt failed, trying again"; sleep 10; done

.PHONY: help demo test lint format dev bench clean
help:
	@echo "make demo    set up and run the main job: a small model learns six tasks, with and without repair (~10 min)"
	@echo "make test    set up and pass the tests"
	@echo "make lint    ruff, mypy, clang-format and the layer rule"
	@echo "make bench   time the kernels beside what one would write by hand (~8 min; BENCH_ARGS=--quick: 1 min)"
	@echo "make dev     editable install for working on the code (build folder kept, warnings are errors)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: where an index offers several builds the pinned one is taken, and pip downloads it once.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing torch (the largest download by far)"
	@$(call retry,$(PIP_INSTALL) torch)
	@touch $@

$(VENV)/.installed: $(SOURCES) | $(VENV)/.torch
	@echo "building and installing hpa-ext"
	@$(call retry,$(PIP_INSTALL) $(EVERYTHING))
	@$(BIN)/python -m hpa_ext
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/hpa run $(RECIPE) --out $(OUT) --jobs $(JOBS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(PYTEST_ARGS) tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc bench -name '*.cpp' -o -name '*.h')
	$(BIN)/pytest -q tests/test_layering.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc bench -name '*.cpp' -o -name '*.h')

bench: $(VENV)/.installed
	$(BIN)/python bench/run.py $(BENCH_ARGS)

dev: | $(VENV)/.torch
	@$(call retry,$(PIP_INSTALL) scikit-build-core pybind11 ninja cmake)
	@$(call retry,$(PIP_INSTALL) --no-build-isolation --config-settings=cmake.define.HPA_WERROR=ON --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=80 --editable $(EVERYTHING))
	@$(BIN)/python -m hpa_ext

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
