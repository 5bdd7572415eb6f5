# Everything from a machine that has Python 3.11 and make. `make help` lists the targets.
PYTHON ?= python3.11
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
EXTRAS := train,datasets,build,serve-cpu,clients,loadtest,ray,bench,dev

.PHONY: help install test lint demo clean
help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(STAMP) ## create .venv with everything (instant once done)

$(STAMP): pyproject.toml constraints.txt requirements-no-deps.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	$(PY) -m pip install -qq --progress-bar off --no-deps -r requirements-no-deps.txt
	@touch $@

lint: $(STAMP)   ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: $(STAMP)   ## the whole test suite, real servers included
	$(PY) -m pytest

demo: $(STAMP)   ## the whole product on the built-in world
	@echo "make demo: not there yet"; exit 1

clean:           ## remove what tests and demos made (keeps .venv)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
