# Every target sets up what it needs. `make VENV=path` uses another environment; a second run is cheap.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.mm-setup

.PHONY: setup quickstart test test-all test-faults test-demo check format bench published demo demo-classify clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "mm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Use: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# references of parity tests and benchmarks; their own requirements (data sets, old tools) are not needed for what is compared
	$(BIN)/python -m pip install --quiet --no-deps clip-benchmark==1.6.1 DALL-E==0.1 taming-transformers-rom1504==0.0.6
	@touch $@

quickstart: setup
	$(BIN)/mm quickstart

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# the page in Chromium, with screenshots in build/screenshots, and under load for LOAD_SECONDS
LOAD_SECONDS ?= 120
MM_CHROMIUM  ?= $(shell command -v chromium)
test-demo: setup
	@test -x '$(MM_CHROMIUM)' || \
	    { echo "Chromium is missing: apt-get install -y chromium, or make test-demo MM_CHROMIUM=/path/to/chromium" >&2; exit 1; }
	MM_CHROMIUM='$(MM_CHROMIUM)' MM_LOAD_SECONDS=$(LOAD_SECONDS) $(BIN)/python -m pytest -m 'browser or slow' tests/demos

# the fifteen faults of docs/faults.md, the long ones included; KILLS is how often each run of fault 1 is killed
KILLS ?= 50
test-faults: setup
	MM_KILLS=$(KILLS) $(BIN)/python -m pytest -m fault tests/faults tests/data tests/training

test-all: setup
	$(BIN)/python -m pytest -m 'not gpu'

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	@mkdir -p bench/results
	for name in contrastive retrieval rerank input_pipeline clip decode writing painters diffusion; do \
	    $(BIN)/python bench/$$name.py --json bench/results/$$name.json || exit 1; done

published: setup
	$(BIN)/python tools/published.py --write $(if $(DATA),--data $(DATA))

# a page in the browser; more models and folders: make demo ARGS='--models runs/clip --folders photos'
demo: setup
	$(BIN)/python demos/app.py $(ARGS)

demo-classify: setup quickstart
	$(BIN)/python demos/zero_shot_imagefolder.py runs/quickstart/pictures --labels "dog face,pizza,automobile,crab,smiling face"

clean:
	rm -rf .venv dist .pytest_cache .ruff_cache .hypothesis
