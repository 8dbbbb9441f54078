# `make train` and `make test` are all a newcomer needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run with one torch thread, training with every core.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: train test stress lint type-check bench table wheel clean

train: $(VENV)/.installed
	$(BIN)/python -m agents.train_ppo

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -m "not stress"

stress: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -m stress

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type-check: $(VENV)/.installed-dev
	$(BIN)/mypy

# With DSA_DATA_ROOT set, the real people among the environments are measured too.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m eval.bench env --write docs/performance.md
	$(BIN)/python -m eval.bench masks --write docs/performance.md
	$(BIN)/python -m eval.bench scale --write docs/performance.md

table: $(VENV)/.installed
	$(BIN)/python -m eval.headline -P n_epochs:10 --write README.md

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-wheel dist
