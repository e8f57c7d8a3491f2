# Entry points: `make demo` and `make test` set everything up by themselves.
#
#   PYTHON=python3.12           another interpreter (3.11 or newer)
#   TORCH_INDEX=URL             another index for torch and torchvision, e.g. the CPU builds at
#                               https://download.pytorch.org/whl/cpu
#   VENV=.venv                  where the environment lives
#   TESTERS=2                   processes of the tests

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TESTERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST = $(BIN)/python -m pytest -q -p tests.cputime
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test lint fast nightly docs settings oldest bench lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

setup: $(READY)  ## the virtual environment, from the pinned lock

$(READY): requirements.lock pyproject.toml tools/environment.py
	@echo "Setting up $(VENV) from requirements.lock (torch and its libraries: some minutes the first time)"
	$(PYTHON) tools/environment.py $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install -q -c requirements.lock --index-url $(TORCH_INDEX) torch torchvision)
	$(BIN)/python -m pip install -q -c requirements.lock -e '.[train,test,lint,deepspeed]'
	@touch $@

demo: $(READY)  ## shards, RKDO and I-Con on two ranks, a table and a figure (embedded digits; about two minutes)
	PATH="$(abspath $(BIN)):$$PATH" bash launch/demo.sh

test: lint  ## everything CI runs: lint and every test but the nightly ones (15 minutes on two cores)
	$(PYTEST) -m 'not nightly' -n $(TESTERS) --dist worksteal --durations 12

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

fast: $(READY)  ## the loop of daily work: no whole jobs
	$(PYTEST) -m 'not slow and not nightly' -n $(TESTERS) --dist worksteal

nightly: $(READY)  ## endurance: 53 kills, long runs, every command of README and docs, a browser (25 minutes)
	$(PYTEST) -m nightly --durations 0

docs: $(READY)  ## the documentation site, built strictly into site/; no page needs the network
	$(BIN)/python -m pip install -q -c requirements.lock -e '.[docs]'
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html (its search needs a server: python -m http.server -d site)"

settings: $(READY)  ## docs/settings.md, from the code
	$(BIN)/python -m rkdo_dist settings --markdown > docs/settings.md

oldest:  ## the losses' tests on the oldest torch they support, in .venv-oldest (torch and numpy are all it has)
	$(PYTHON) tools/environment.py .venv-oldest
	.venv-oldest/bin/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.4.1 'numpy<2.3' \
	  pytest hypothesis
	PYTHONPATH=. .venv-oldest/bin/python -m pytest -q tests/test_losses.py tests/test_loss_in_loops.py tests/test_tiled.py

bench: $(READY)  ## comparisons in one run; results go to benchmarks/results/
	$(BIN)/python -m pip install -q -c requirements.lock -e '.[bench]'
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/views.py

lock: $(READY)  ## pin new versions (keep torch and torchvision a matched pair)
	$(BIN)/python -m pip install -q uv
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' > $(VENV)/pair.txt
	{ echo '# Exact versions for every platform, used as constraints: only what is asked for is installed.'; \
	  echo '# Made by `make lock`; torch and torchvision must stay a matched pair.'; \
	  $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra all --extra test --extra lint --extra docs \
	  -c $(VENV)/pair.txt --upgrade --no-annotate --no-header --quiet; } > $(VENV)/new.lock && mv $(VENV)/new.lock requirements.lock

clean:  ## remove the environment, the demo's data and runs
	rm -rf $(VENV) .venv-oldest build dist site data/digits runs/demo
