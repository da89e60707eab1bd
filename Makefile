# One command each; every target sets up what it needs on a fresh machine (see `make setup`).
# Set-up is idempotent: a stamp under build/stamps/ is newer than what it was made from.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STAMPS  := build/stamps
DATA    := mnist shakespeare
# Threads: each peer is a process of its own, so BLAS must not fan out on every one of them.
export OMP_NUM_THREADS ?= 1

.PHONY: help
help: ## this list
	@echo "p2pflock: train models in a peer-to-peer swarm, with provenance anyone can check"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18 | sed 's/^/  make /'

# --- set-up ---------------------------------------------------------------------------------------------
.PHONY: setup
setup: $(STAMPS)/python $(STAMPS)/contracts $(STAMPS)/data ## virtual environment, npm packages, data sets

# Says what is missing before pip fails with a page of compiler output.
$(STAMPS)/tools:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found"; echo "fix: install Python 3.10 or newer"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $$($(PYTHON) -V) is too old"; echo "fix: make PYTHON=python3.11 (3.10 or newer)"; exit 1; } >&2
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "error: Python has no venv module"; echo "fix: apt-get install python3-venv"; exit 1; } >&2
	@command -v cc >/dev/null \
	  || { echo "error: no C compiler (fastecdsa, a dependency of libp2p, is compiled)"; echo "fix: apt-get install gcc python3-dev libgmp-dev"; exit 1; } >&2
	@echo '#include <gmp.h>' | cc -E - >/dev/null 2>&1 \
	  || { echo "error: gmp.h not found (fastecdsa, a dependency of libp2p, is compiled)"; echo "fix: apt-get install libgmp-dev"; exit 1; } >&2
	@command -v npm >/dev/null \
	  || { echo "error: npm not found (anvil, forge and solc come from it)"; echo "fix: install Node.js 18 or newer"; exit 1; } >&2
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/python: pyproject.toml constraints.txt | $(STAMPS)/tools
	@echo "== python packages"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,fast]'
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/bench: $(STAMPS)/python
	@echo "== packages for plots"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

$(STAMPS)/contracts: $(wildcard contracts/package.json contracts/package-lock.json) | $(STAMPS)/tools
	@echo "== npm packages (anvil, forge, solc, OpenZeppelin)"
	@cd contracts && npm ci --no-audit --no-fund --loglevel=error
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/data: $(wildcard p2pflock/learning/data.py) | $(STAMPS)/python
	@echo "== data sets"
	@$(BIN)/python -m p2pflock.learning.data fetch $(DATA)
	@mkdir -p $(STAMPS) && touch $@

# --- show -----------------------------------------------------------------------------------------------
.PHONY: demo demo-short
demo: setup ## 4 peers train on MNIST, agree, anchor, get paid; then verify and claim
	@$(BIN)/p2pflock up --task mnist --peers 4 --demo --home build/demo

demo-short: setup ## the same with fewer rounds
	@$(BIN)/p2pflock up --task mnist --peers 4 --rounds 3 --demo --home build/demo-short

# --- test -----------------------------------------------------------------------------------------------
.PHONY: test test-kubo test-churn test-contracts check fuzz
test: setup ## unit, property, simulation, process and attack tests
	@$(BIN)/python -m pytest tests --ignore=tests/interop --ignore=tests/chaos

test-kubo: $(STAMPS)/python ## the Kubo adapter against a daemon with its RPC (npm, 250 MB the first time)
	@$(BIN)/python -m pytest tests/interop

FUZZ_SECONDS ?= 600
fuzz: $(STAMPS)/fuzz ## coverage-guided fuzzing of the payload decoder, FUZZ_SECONDS=600
	@PYTHONPATH=. $(BIN)/python tests/fuzz/decoder.py --seconds $(FUZZ_SECONDS) --folder build/fuzz --out docs/benchmarks/fuzz.json

$(STAMPS)/fuzz: $(STAMPS)/python
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	@mkdir -p $(STAMPS) && touch $@

test-churn: setup ## ten real peers, three of them frozen or killed in every one of 20 rounds (minutes, 10 GB)
	@$(BIN)/python -m pytest -s tests/chaos

test-contracts: $(STAMPS)/contracts ## forge: unit, fuzz, invariants, committed ABI equals a fresh build
	@contracts/tools/test.sh

check: $(STAMPS)/python $(STAMPS)/contracts ## ruff, mypy --strict, import direction, forge fmt
	@echo "== ruff" && $(BIN)/ruff check .
	@echo "== mypy --strict" && $(BIN)/mypy
	@echo "== import direction" && $(BIN)/python -m pytest -q tests/unit/test_imports.py
	@echo "== forge fmt" && contracts/tools/forge fmt --check --root contracts
	@echo "check: all passed"

# --- measure --------------------------------------------------------------------------------------------
.PHONY: bench
bench: ## all of them, many hours
bench: bench-codec bench-determinism bench-exchange bench-bytes bench-utilisation bench-scale bench-attacks \
  bench-attacks-lm bench-late bench-churn bench-flower bench-p2pfl bench-quality bench-table

.PHONY: bench-codec bench-determinism
bench-codec: setup ## codec and fold at 10 million parameters: times, memory, payload size
	@$(BIN)/python benchmarks/codec.py --out docs/benchmarks/codec.json

bench-determinism: setup ## 500 rounds, six unlike peers and seven builds: one model
	@$(BIN)/python benchmarks/determinism.py --out docs/benchmarks/determinism.json

.PHONY: bench-churn bench-late
bench-late: $(STAMPS)/data $(STAMPS)/bench ## rules for late contributions and for error feedback kept over an absence; about 15 minutes
	@$(BIN)/python benchmarks/late.py --out docs/benchmarks/late.json

bench-churn: $(STAMPS)/data $(STAMPS)/bench ## 200 simulated rounds with three of ten peers away in each, three seeds, two tasks; about an hour of one core
	@$(BIN)/python benchmarks/churn.py --out docs/benchmarks/churn.json

.PHONY: bench-attacks bench-attacks-lm
bench-attacks: $(STAMPS)/data $(STAMPS)/bench ## Byzantine peers on MNIST: every attack, our gate and three other rules; about 40 minutes of one core
	@$(BIN)/python benchmarks/attacks.py --out docs/benchmarks/attacks.json --resume

bench-attacks-lm: $(STAMPS)/data $(STAMPS)/bench ## Byzantine peers on Shakespeare: perplexity against clean; about 15 minutes of one core
	@$(BIN)/python benchmarks/attacks.py --task shakespeare --out docs/benchmarks/attacks_lm.json --resume

.PHONY: bench-scale
bench-scale: $(STAMPS)/bench ## bytes per peer and decision latency from 64 to 1,000 simulated peers; about 30 minutes of two cores
	@$(BIN)/python benchmarks/scale.py --out docs/benchmarks/scale.json

.PHONY: bench-exchange bench-bytes bench-utilisation
bench-exchange: setup ## one exchange of 10 million parameters among 8 processes, beside hivemind's averager
	@$(BIN)/python benchmarks/exchange.py --out docs/benchmarks/exchange.json

bench-bytes: setup ## every byte of a round of 8 peers, counted per packet (root: network namespaces)
	@$(BIN)/python benchmarks/bytes.py --out docs/benchmarks/bytes.json

bench-utilisation: setup ## time in local steps at 50 Mb/s and 100 ms, beside hivemind's averager (root)
	@$(BIN)/python benchmarks/utilisation.py --out docs/benchmarks/utilisation.json

.PHONY: bench-quality bench-flower bench-p2pfl bench-table
bench-quality: $(STAMPS)/data $(STAMPS)/bench ## loss at equal samples beside dense DiLoCo and one process; about 80 minutes of one core
	@$(BIN)/python benchmarks/quality.py --out docs/benchmarks/quality.json

bench-flower: $(STAMPS)/data $(STAMPS)/bench $(STAMPS)/flower ## MNIST to 98 % beside Flower's FedAvg: samples, bytes, seconds
	@$(BIN)/python benchmarks/flower.py --flower build/venvs/flower/bin/python --out docs/benchmarks/flower.json

bench-p2pfl: $(STAMPS)/data $(STAMPS)/bench $(STAMPS)/p2pfl ## the same beside p2pfl's nodes over gRPC
	@$(BIN)/python benchmarks/with_p2pfl.py --p2pfl build/venvs/p2pfl/bin/python --out docs/benchmarks/p2pfl.json

bench-table: $(STAMPS)/python ## the table in docs/benchmarks/README.md, from the JSON files
	@$(BIN)/python benchmarks/table.py

# Each pins libraries that ours pins otherwise: environments of their own.
$(STAMPS)/flower $(STAMPS)/p2pfl: $(STAMPS)/%: benchmarks/%.txt | $(STAMPS)/tools
	@echo "== $*, in build/venvs/$*"
	@test -x build/venvs/$*/bin/python || $(PYTHON) -m venv build/venvs/$*
	@build/venvs/$*/bin/python -m pip install --quiet -r benchmarks/$*.txt
	@mkdir -p $(STAMPS) && touch $@

.PHONY: clean
clean: ## remove everything that was built; keeps downloaded data and the virtual environment
	@rm -rf build/stamps build/demo build/demo-short build/test contracts/out contracts/cache \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find p2pflock tests -name __pycache__ -type d -prune -exec rm -rf {} +
