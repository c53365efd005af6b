# make demo   a picture made by two ranks on this machine, in demo.png; TYPE=transformer or student: other models
# make test   the whole test suite      make check   format, lint and types
# make matrix the README's tables from the registry, a run of every cell, and the slow tests of other files
# Each sets up .venv first where it is missing or the requirements have changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle on a blue background
RANKS ?= 2
TYPE ?= unet
WORKERS ?= 2

# Hundreds of processes import the same modules: each would compile them again. What no process imports, three
# files of four that pip installs, is never compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check matrix gpu-matrix format clean

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] or 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python demo/ask.py $(TYPE) --ranks $(RANKS) --prompt "$(PROMPT)" --out demo.png

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

matrix: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_matrix.py -m 'slow or not slow'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --ignore=tests/test_matrix.py
	$(BIN)/python -m tests.tables --write

gpu-matrix: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_matrix

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis demo.png
