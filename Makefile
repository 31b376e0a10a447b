# `make train` and `make test` install what they need into .venv; nothing else has to be there but Python 3.11 and make.
PYTHON ?= python3
RECIPE ?= recipes/demo/overfit.yaml
ACCELERATE ?= cpu
ARGS ?=
BIN := .venv/bin

.PHONY: install train ppo rloo test test-slow test-reliability test-engines test-range lint format bench reproduce results clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: install
ifeq ($(RECIPE),recipes/demo/overfit.yaml)
	$(BIN)/python recipes/demo/make_demo.py --output_dir outputs/demo
endif
	$(BIN)/accelerate launch --config_file accelerate_configs/$(ACCELERATE).yaml -m reward_recipes.train --config $(RECIPE) $(ARGS)

# A policy against the demo's reward model, which is trained first if it is not there.
ppo rloo: install outputs/demo/run/run_summary.json
	$(BIN)/python recipes/demo/rlhf.py $@ --config recipes/demo/$@.yaml $(ARGS)

outputs/demo/run/run_summary.json:
	$(MAKE) train RECIPE=recipes/demo/overfit.yaml ARGS=

# Two processes, because most tests wait for a process of their own; each file stays in one of them.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: install
	$(PYTEST) $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)

# Kills, signals and faults at many points: what `make test` leaves out of what a run survives.
test-reliability: install
	$(PYTEST) -m reliability $(ARGS)

# FSDP2 and DeepSpeed on two CPU processes. DeepSpeed compiles a part of itself, for which it needs gcc and g++. It and what it
# lacks are installed without their dependencies, so that pip cannot exchange torch for another one.
DEEPSPEED := deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0

test-engines: .venv/engines
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m engines tests/engines $(ARGS)

.venv/engines: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DEEPSPEED)
	touch $@

# The oldest and the newest versions that pyproject.toml admits, each in an environment of its own.
TORCH ?= torch==2.13.0
LOWEST := transformers==5.17.0 accelerate==1.15.0 trl==1.12.0

test-range: .venv-lowest/installed .venv-newest/installed
	.venv-lowest/bin/python -m pytest $(ARGS)
	.venv-newest/bin/python -m pytest $(ARGS)

.venv-lowest/installed: PINS = $(LOWEST)
.venv-%/installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check $(TORCH) $(PINS) -e '.[dev]'
	touch $@

# The heart: what a newcomer reads first. `lint-imports` holds the arrows between the rooms.
HEART := config data trainer callback train
HEART_LINES := 869

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@lines=$$(cat $(HEART:%=src/reward_recipes/%.py) | wc -l); \
		test $$lines -le $(HEART_LINES) || { echo "the heart has $$lines lines, expected at most $(HEART_LINES)"; exit 1; }

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCH_TOKENIZER ?= ../shared/data/gpt2-tokenizer
BENCH_DATA ?= ../shared/data/hh-rlhf

bench: install
	$(BIN)/python recipes/benchmark/benchmark.py --model_name_or_path $(BENCH_TOKENIZER) --random_gpt2 6x256 \
		--dataset_name $(BENCH_DATA) --max_length 512 --output_dir outputs/benchmark $(ARGS)

PLAN ?= recipes/reproduce/full.yaml

reproduce: install
	$(BIN)/python recipes/reproduce/reproduce.py --plan $(PLAN) $(ARGS)
	$(BIN)/python recipes/reproduce/results.py

results: install
	$(BIN)/python recipes/reproduce/results.py

clean:
	rm -rf .venv .venv-lowest .venv-newest outputs
