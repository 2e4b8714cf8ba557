# `make demo` and `make test` are all that a fresh Debian or Ubuntu machine needs. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# Where to build, and how many jobs.
BUILD ?= build
export JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Several sources compiled at once: half the time from scratch, longer after a change. UNITY=OFF for who edits.
export UNITY ?= ON
# Arguments handed on: make bench ARGS=--benchmark_filter=Layer, make fuzz FUZZ_SECONDS=600.
ARGS ?=
PYTHON_MODULE := -DOCTOMOE_BUILD_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python
FUZZ_SECONDS ?= 120

.PHONY: help setup build demo test asan tsan packs fuzz lint format bench install clean distclean

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## Debian packages and .venv, if missing
	@scripts/setup.sh

build: setup ## library, command, Python module and tests into build/
	@scripts/build.sh $(BUILD) $(PYTHON_MODULE)

demo: setup ## quantise and run the bundled model in every scheme; results in out/
	@TARGETS="octomoe_cli octomoe_python" scripts/build.sh $(BUILD) $(PYTHON_MODULE)
	@scripts/demo.sh $(BUILD)

test: build ## every test: C++, Python, the installed package, README's examples
	@scripts/test.sh $(BUILD)

asan: ## C++ tests and the fuzzers' corpora under AddressSanitizer and UndefinedBehaviorSanitizer
	@scripts/setup.sh --dev
	@scripts/sanitize.sh address,undefined $(ARGS)

tsan: setup ## thread pool and CPU engine tests under ThreadSanitizer
	@scripts/sanitize.sh thread -L '^(base|cpu)$$' $(ARGS)

packs: build ## compile the GPU kernels for every architecture and check them; needs no GPU
	@scripts/packs.sh $(BUILD)

fuzz: ## fuzz every parser, FUZZ_SECONDS each (120)
	@scripts/setup.sh --dev
	@scripts/fuzz.sh $(FUZZ_SECONDS)

lint: ## clang-format, clang-tidy and ruff; changes nothing
	@scripts/setup.sh --dev
	@scripts/lint.sh

format: setup ## let clang-format and ruff rewrite the sources
	@scripts/format.sh

bench: setup ## build and run the micro-benchmarks
	@scripts/bench.sh $(ARGS)

install: setup ## install into PREFIX (/usr/local)
	@scripts/build.sh $(BUILD) $(PYTHON_MODULE)
	cmake --install $(BUILD) --prefix $(or $(PREFIX),/usr/local)

clean: ## remove what was built and what the demo wrote
	rm -rf build build-asan build-tsan build-bench build-lint out

distclean: clean ## and .venv too
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
