# `make help` lists the targets. They need Python 3.11 or newer, pip and make; everything else goes into .venv.
# Each group of dependencies is installed once, and again only after its stamp in .venv is older than
# pyproject.toml, constraints.txt or the package's version.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# Set PYTHON to choose the interpreter; else the first of these that is recent enough.
PYTHON ?=
PYTHON_CANDIDATES := $(or $(PYTHON),python3.11 python3)

VENV := .venv
PY := $(VENV)/bin/python
# -qq: errors only.
PIP_INSTALL := $(PY) -m pip install -qq -c constraints.txt
PINS := pyproject.toml constraints.txt sb3_agpo/__about__.py

PYTEST_ARGS ?=
DEMO_ARGS ?=
SOAK_ARGS ?=
SPEED_ARGS ?=
# Test files are spread over the cores; every process uses one torch thread (tests/conftest.py).
PYTEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15

RUFF_CHECK := $(PY) -m ruff check .
RUFF_FORMAT := $(PY) -m ruff format
MYPY := $(PY) -m mypy

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# A root user's pip warns even inside a virtual environment's build steps.
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON (interpreter for .venv), PYTEST_ARGS (e.g. \"-k name\" or \"-m 'not slow'\"), DEMO_ARGS, SOAK_ARGS, SPEED_ARGS."

.PHONY: demo
demo: $(VENV)/.installed-demo ## Install what the demo needs, then run it
	$(PY) -m sb3_agpo.demo $(DEMO_ARGS)

.PHONY: test
test: $(VENV)/.installed-test ## Install what the tests need, then lint, type-check and test
	$(RUFF_CHECK)
	$(RUFF_FORMAT) --check .
	$(MYPY)
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: soak
soak: $(VENV)/.installed-test ## Kill, repeat and soak AGPO for hours; write docs/benchmarks/reliability.json
	$(PY) -m sb3_agpo.benchmark reliability $(SOAK_ARGS)

.PHONY: speed
speed: $(VENV)/.installed-test ## Measure speed on a quiet machine; write docs/benchmarks/speed.csv and the tables of docs/performance.md
	$(PY) -m sb3_agpo.benchmark speed $(SPEED_ARGS)

.PHONY: lint
lint: $(VENV)/.installed-test ## Check style and formatting
	$(RUFF_CHECK)
	$(RUFF_FORMAT) --check .

.PHONY: format
format: $(VENV)/.installed-test ## Apply the formatter and the safe lint fixes
	$(RUFF_CHECK) --fix-only
	$(RUFF_FORMAT) .

.PHONY: types
types: $(VENV)/.installed-test ## Check types
	$(MYPY)

.PHONY: docs
docs: $(VENV)/.installed-docs ## Build the documentation into docs/_build/html; warnings are errors
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

.PHONY: dist
dist: $(VENV)/.installed-test ## Build the source distribution and the wheel into dist/
	rm -rf dist
	$(PY) -m build --outdir dist .

.PHONY: clean
clean: ## Remove build products and caches
	rm -rf build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info MUJOCO_LOG.TXT
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Also remove .venv
	rm -rf $(VENV)

# The virtual environment, which counts as made once it has a working pip. One that was begun is completed.
$(VENV)/.created:
	@for candidate in $(PYTHON_CANDIDATES); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "Creating $(VENV) with $$("$$candidate" --version)"; \
	        "$$candidate" -m venv $(VENV); \
	        $(PY) -m pip --version >/dev/null; \
	        touch $@; \
	        exit 0; \
	    fi; \
	done; \
	echo "error: sb3-agpo needs Python 3.11 or newer; tried:" >&2; \
	for candidate in $(PYTHON_CANDIDATES); do \
	    echo "  $$candidate: $$("$$candidate" --version 2>&1 | head -n 1 || true)" >&2; \
	done; \
	echo "Install one, or name it: make PYTHON=/path/to/python3 ..." >&2; \
	exit 1

# torch first and by itself, with its pin: see constraints.txt.
$(VENV)/.installed-torch: constraints.txt | $(VENV)/.created
	@echo "Installing torch (the first time takes a few minutes)"
	$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.installed-demo: $(PINS) $(VENV)/.installed-torch
	$(PIP_INSTALL) -e '.[plot]'
	@touch $@

$(VENV)/.installed-test: $(PINS) $(VENV)/.installed-torch
	$(PIP_INSTALL) -e '.[all,dev]'
	@touch $@

$(VENV)/.installed-docs: $(PINS) $(VENV)/.installed-torch
	$(PIP_INSTALL) -e '.[all,docs]'
	@touch $@
