# make install   a virtual environment in .venv with minidiff_fast (editable) and everything CI uses
# make test      lint, types, tests: what CI runs
# make demo      train a policy on the embedded demonstrations, evaluate it, write runs/demo
# make lint | format | bench | clean
#
# Needs python3 >= 3.10 and make. PYTHON=python3.12 chooses another interpreter, VENV=path another folder,
# PYTEST="..." passes arguments to pytest.

PYTHON ?= python3
VENV ?= .venv
PYTEST ?=
BIN := $(VENV)/bin

# A relative path, because pip splits this variable at spaces. PIP_CONSTRAINT reaches the isolated build
# up to pip 25.2, PIP_BUILD_CONSTRAINT from 25.3 on.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip

# What an installed copy does not follow by itself: the metadata and the compiled part.
BUILD_FILES := pyproject.toml constraints.txt CMakeLists.txt minidiff_fast/_version.py $(shell find csrc -type f)

.PHONY: install test demo lint format bench clean

install: $(VENV)/.installed-dev

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "minidiff_fast needs Python >= 3.10, and %s is %d.%d: make PYTHON=python3.10" % (sys.executable, v[0], v[1]))'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(BUILD_FILES)
	$(PIP) install -e '.[dev]'
	@touch $(VENV)/.installed-demo $@

$(VENV)/.installed-demo: $(VENV)/.created $(BUILD_FILES)
	$(PIP) install -e '.[train,pusht]'
	@touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One torch thread a worker: the workers fill the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses=8 --dist=loadfile $(PYTEST)

demo: $(VENV)/.installed-demo
	$(BIN)/minidiff-fast demo --out runs/demo

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/run.py attention

# Keeps runs/ and the virtual environment.
clean:
	rm -rf build dist wheelhouse .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
