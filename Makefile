# make demo   sets up .venv and runs the tour on this machine's GPU, or on a scripted one
# make test   sets up .venv and runs the tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-old-kernel ray lint notebooks nbval setup clean

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make test-old-kernel   the notebook's tests on ipykernel 6.29 and IPython 8"
	@echo "make ray   installs Ray, which the tests of its engine need (400 MB)"
	@echo "make lint   ruff, mypy and the import contracts"
	@echo "make notebooks   runs the notebooks and saves their outputs (installs PyTorch)"
	@echo "make nbval   runs the notebooks and compares (installs PyTorch)"
	@echo "make clean   removes .venv and what the tools have left"

demo: $(VENV)/.demo
	$(BIN)/python scripts/run_notebook.py notebooks/tour.ipynb

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

notebooks: $(VENV)/.dev $(VENV)/.torch
	$(BIN)/python scripts/run_notebook.py --save notebooks/tour.ipynb
	$(BIN)/python scripts/run_notebook.py --save notebooks/isolated.ipynb
	$(BIN)/python scripts/run_notebook.py --save notebooks/priorities.ipynb
	$(BIN)/python scripts/run_notebook.py --save notebooks/several.ipynb
	$(BIN)/python scripts/run_notebook.py --save notebooks/sweep.ipynb
	$(BIN)/python scripts/run_notebook.py --save notebooks/train_torch.ipynb

nbval: $(VENV)/.dev $(VENV)/.torch
	GPUSCHED_BACKEND=fake $(BIN)/python -m pytest -p nbval --nbval-lax --nbval-sanitize-with notebooks/sanitize.cfg \
	  --nbval-cell-timeout 300 -p no:cacheprovider -W default --timeout 900 notebooks

# The kernel runs on ipykernel 6.29 and IPython 8; the tests themselves stay in $(VENV).
test-old-kernel: $(VENV)/.dev $(VENV)/.old-kernel
	GPUSCHED_KERNEL_PYTHON=$(CURDIR)/$(VENV)/old-kernel/bin/python $(BIN)/python -m pytest \
	  $(PYTEST_ARGS) tests/test_cells.py tests/test_magics.py tests/test_extension.py \
	  tests/test_isolated.py

# Apart from everything else: it brings some fifty packages in versions of its own choice.
ray: $(VENV)/.ray

setup: $(VENV)/.dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "gpusched_ipy needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "Python's venv is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[test,lint]'
	@touch $@

$(VENV)/.torch: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[torch]'
	@touch $@

$(VENV)/.old-kernel: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m venv $(VENV)/old-kernel
	$(VENV)/old-kernel/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e . 'ipykernel==6.29.*' 'ipython>=8.20,<9'
	@touch $@

$(VENV)/.ray: | $(VENV)/bin/python
	$(BIN)/python -m venv $(VENV)/ray
	$(VENV)/ray/bin/python -m pip install --quiet --disable-pip-version-check 'ray[default]==2.60.*'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist build
