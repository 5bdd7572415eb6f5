# Everything from a machine that has Python 3.11 and make. `make help` lists the targets.
PYTHON ?= python3.11
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
EXTRAS := train,datasets,build,serve-cpu,clients,integrations,loadtest,ray,privacy,tracing,bench,docs,dev

.PHONY: help install test lint demo results retrain serve stop clean
help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# --no-compile: of 34,000 modules a few thousand are ever imported, and Python compiles those then, and keeps them where
# the environment forbids that too (PYTHONDONTWRITEBYTECODE is common in containers): hundreds of processes import them
export PYTHONDONTWRITEBYTECODE :=
install: $(STAMP) ## create .venv with everything (instant once done)

$(STAMP): pyproject.toml constraints.txt requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null || { \
	  echo "Python 3.11 is needed, $(PYTHON) is none; where it has another name: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq --no-compile --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	$(PY) -m pip install -qq --no-compile --progress-bar off --no-deps -r requirements-no-deps.txt
	@touch $@

lint: $(STAMP)   ## ruff, mypy and bandit
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --num-workers 2
	$(VENV)/bin/bandit --quiet --configfile pyproject.toml --recursive ranking training build serving clients loadtest demo benchmarks disranker

# Three workers, since on two cores a third of the tests' time is waiting for a server, a kill or a pause. Each takes whole
# files, so that a file's servers start once; one that dies ends the run, which would wait for it otherwise. Models in
# tests are tiny: one thread each.
test: $(STAMP)   ## the whole test suite, real servers included
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --durations 20

demo: $(STAMP)   ## click log to A/B verdict on the built-in world; DATA=PATH LIMIT=400 OUT=runs/NAME ARGS=... for your own data
	$(PY) -m demo.run $(if $(DATA),--data "$(DATA:~/%=$(HOME)/%)" --limit $(or $(LIMIT),400) --out "$(or $(OUT:~/%=$(HOME)/%),runs/demo-data)",--out "$(or $(OUT:~/%=$(HOME)/%),runs/demo)") $(ARGS)

results: $(STAMP) ## every page of docs/results again, hours of work: ONLY=clicklog,metrics for some, ARGS=--show to see what would run
	$(PY) -m benchmarks.results $(if $(ONLY),--only $(ONLY)) $(ARGS)

retrain: $(STAMP) ## new clicks to the next A/B test: SINCE=2026-11-14, RUN=runs/demo (a demo run), OUT=runs/retrain, ARGS=...
	$(PY) -m demo.retrain --log $(or $(RUN),runs/demo)/ab/data --data $(or $(RUN),runs/demo)/data \
	  --student $(or $(RUN),runs/demo)/student --repository $(or $(RUN),runs/demo)/model_repository \
	  $(if $(findstring --teacher clicks,$(ARGS)),,--pretrained $(or $(RUN),runs/demo)/pretrained --last-teacher $(or $(RUN),runs/demo)/teacher) \
	  --out $(or $(OUT),runs/retrain) $(if $(SINCE),--since $(SINCE)) $(ARGS)

serve: $(STAMP)  ## tritonserver, A/B router and search page on the models of OUT (default: the last demo run)
	$(PY) -m demo.serve start $(if $(OUT),--out "$(OUT:~/%=$(HOME)/%)")

stop: $(STAMP)   ## stop what `make serve` started
	$(PY) -m demo.serve stop

# the rest of runs/ cannot be made again, or only at a price: A/B logs, the salt, people's judgments, labels, models
clean:           ## remove the two demos' runs and what tests and linters keep (nothing else of runs/, nor .venv)
	rm -rf runs/demo runs/demo-data .pytest_cache .mypy_cache .ruff_cache .hypothesis
