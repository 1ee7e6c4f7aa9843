# `make demo` and `make test` are complete from a fresh clone: they need Python >= 3.11 and make, and create the environment .venv on the way.
# Another interpreter: make PYTHON=/path/to/python test

PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
IN_VENV := $(VENV)/bin/python

.PHONY: help demo test test-slow lint docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       embed a real tissue, print a table, write figures and the .h5ad to demo/"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make lint       check style and types"
	@echo "make docs       build the documentation into docs/_build/html, running the tutorials"
	@echo "make clean      remove environment and outputs"

demo: $(VENV)/.installed
	$(IN_VENV) tutorials/demo.py --out demo

test: $(VENV)/.installed
	$(IN_VENV) -m pytest -m "not slow"

# Status 5: no test is marked slow.
test-slow: $(VENV)/.installed
	$(IN_VENV) -m pytest -m slow || test $$? -eq 5

lint: $(VENV)/.installed-dev
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy

docs: $(VENV)/.installed-dev
	$(IN_VENV) -m sphinx -E -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) demo docs/_build docs/api/generated

# Installed once, and again when the requirements change. --group needs pip 25.1.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "spatialfm needs Python >= 3.11 and found none; name one: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into $(VENV): some minutes, this once"
	test -x $(IN_VENV) || $(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install --quiet --upgrade "pip>=25.1"
	$(IN_VENV) -m pip install --quiet -c constraints.txt -e . --group test
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(IN_VENV) -m pip install --quiet -c constraints.txt --group dev
	@touch $@
