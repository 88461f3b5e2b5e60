# Entry points for people and for .ci/run. `make help` lists them; every target prepares what it needs first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
JOBS ?= 2
# The environment's cmake, ninja, ruff and safepoint come before whatever else the machine has.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The compiler output of one folder serves all build folders of this checkout.
export CCACHE_DIR ?= $(CURDIR)/.ccache
export CCACHE_MAXSIZE ?= 3G

SETUP_STAMP := $(VENV)/.setup-stamp
WHEEL_STAMP := $(VENV)/.wheel-stamp
WHEEL_SOURCES := $(shell find src bindings python cmake -type f -not -name '*_test.cc' -not -name '*.pyc' 2>/dev/null) \
  CMakeLists.txt pyproject.toml

.PHONY: help setup build demo test test-cpp test-python test-asan test-tsan bench bench-quick bench-durable bench-peers sim soak chaos boundaries faults fuzz lint format stubs clean distclean demo-durable

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

setup: $(SETUP_STAMP)  ## System packages and .venv (only what is missing)

$(SETUP_STAMP): requirements/*.txt tools/setup.sh tools/debian-packages.txt
	tools/setup.sh
	touch $@

build: $(WHEEL_STAMP)  ## Build the wheel (extension, daemon) and install it into .venv

# Older than the last change of a source, or of the environment: the wheel is built again, incrementally in build/wheel.
$(WHEEL_STAMP): $(SETUP_STAMP) $(WHEEL_SOURCES)
	$(PY) -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@

demo: build  ## Train, kill, resume: what safepoint does, on this machine
	$(PY) examples/demo/run.py

demo-durable: build  ## The same with a store that goes away and comes back, and the loss of all memory (S3=1: an S3 gateway)
	$(PY) examples/demo/durable.py $(if $(S3),--s3 --out build/demo-durable-s3)

test: setup  ## Everything .ci/run runs: wheel, lint, C++ tests, sanitizers, Python and process tests
	@tests/gateway/ceph_gateway.sh check || tests/gateway/ceph_gateway.sh install || echo "tests against a real S3 gateway will be skipped"
	$(PY) tools/run_tests.py --jobs $(JOBS)

test-cpp: setup  ## C++ unit tests, optimised
	$(PY) tools/run_tests.py --jobs $(JOBS) cpp

test-asan: setup  ## C++ unit tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PY) tools/run_tests.py --jobs $(JOBS) asan

test-tsan: setup  ## C++ unit tests under ThreadSanitizer
	$(PY) tools/run_tests.py --jobs $(JOBS) tsan

test-python: build  ## pytest: tests/python and tests/process
	$(PY) tools/run_tests.py --jobs $(JOBS) python process

bench: build  ## Measure everything, 15 minutes; tables and picture in build/bench (README=1: also in README.md and docs)
	$(PY) -m bench $(if $(README),--readme)

bench-quick: build  ## The same at a tenth of the size, 2 minutes: does it work, no figures
	$(PY) -m bench --quick --out build/bench-quick

bench-durable: build  ## Measure the durable tier, 6 minutes: the disk of build/bench, a server on loopback; tables go into docs/operating
	cmake --preset bench > /dev/null
	cmake --build build/bench --target s3_bench s3_sink -j $(JOBS)
	$(PY) -m bench.durable --write

bench-peers: setup  ## Install optional peers of the benchmark into build/peers (PEERS="name ...")
	bench/peers/setup.sh $(PEERS)

SIM_SEEDS ?= 100000
sim: setup  ## Long simulation of the core (SIM_SEEDS=N histories)
	cmake --preset release > /dev/null
	cmake --build build/release --target safepoint_sim -j $(JOBS)
	build/release/src/sim/safepoint_sim --seeds $(SIM_SEEDS)

FUZZ_SECONDS ?= 3600
fuzz: setup  ## Fuzz every decoder under sanitizers (FUZZ_SECONDS=N for each target)
	$(PY) tools/fuzz.py --seconds $(FUZZ_SECONDS) --jobs $(JOBS)

soak: build  ## Long SIGKILL campaign on real processes (SOAK_ROUNDS=N)
	$(PY) tests/process/kill_rounds.py --rounds $(or $(SOAK_ROUNDS),10000)

chaos: build  ## Kill exports at every file event, beside torch DCP's; writes docs/chaos.md (40 minutes)
	$(PY) examples/chaos/campaign.py --write-docs docs/chaos.md

boundaries: build  ## SIGKILL before and after every protocol event; rewrites the tables in docs/reliability.md
	$(PY) tests/boundaries/campaign.py --write --plant

faults: setup  ## Fail the N-th call, all from then on, for every N (docs/internals/faults.md says how long)
	JOBS=$(JOBS) $(PY) tests/faults/fail_nth.py --json build/faults.json

lint: build  ## ruff, mypy --strict, the checked-in type stub
	$(PY) tools/run_tests.py lint

format: setup  ## Rewrite Python files in the house format
	ruff check --fix .
	ruff format .

stubs: build  ## Regenerate python/safepoint/_core.pyi from the built extension
	$(PY) tools/run_tests.py --write-stub

clean:  ## Remove build products; .venv and the compiler cache stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(WHEEL_STAMP)
	find python tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Also remove .venv and the compiler cache
	rm -rf $(VENV) .ccache
