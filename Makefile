# Everything here needs only make, a C++ compiler and Python >= 3.10. `make help` lists the targets.
#
# Each target makes what it needs in .venv through stamp files, so a second call is quick. Output is
# a line per step; the log of a step that fails is printed, and all are in .venv/logs.
#
#   PYTHON=python3.12       which Python makes the environment (default python3)
#   TORCH="torch==2.13.0"   which torch is installed, as pip spells it, options included
#   T="-k batch"            more arguments for pytest (make test)
#   DEMO="--preset demo"    arguments of the demo
#   BENCH="iteration"       which benchmark suites run (make bench)
#   PYTHONS=, TORCHES=      which versions make test-matrix combines

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
T ?=
DEMO ?= --preset demo --out runs/demo
BENCH ?= iteration overhead
PYTHONS ?= $(foreach v,3.10 3.11 3.12 3.13,$(shell python$(v) -c "" 2>/dev/null && echo python$(v)))
TORCHES ?= torch==2.10.0 torch==2.13.0 torch

# Threads that wait for each other sleep instead of spinning: on a machine that does other work too,
# spinning costs several times the work itself.
export OMP_WAIT_POLICY ?= passive

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input install
LOGS := $(VENV)/logs
STAMPS := $(VENV)/stamps
SOURCES := $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cuh" -o -name "*.cu")

# $(call step,name,what is said,command): one line of output, the log only if the command fails.
define step
	@mkdir -p $(LOGS); printf '%s\n' "$(2)"; \
	{ $(3); } >$(LOGS)/$(1).log 2>&1 || { status=$$?; cat $(LOGS)/$(1).log; exit $$status; }
endef

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1|/' | \
		while IFS='|' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

# ----------------------------------------------------------------------------- the environment

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "$(PYTHON) is missing or older than 3.10; name another: make PYTHON=python3.12"; \
		exit 1; }
	@echo "environment: $(VENV), $$($(PYTHON) --version)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch comes first and alone: resolved as a requirement of something else it could be another build.
$(STAMPS)/torch: $(STAMPS)/venv
	$(call step,torch,install $(TORCH),$(PIP) $(TORCH))
	@touch $@

$(STAMPS)/tools: $(STAMPS)/torch
	$(call step,tools,install build tools,$(PIP) 'setuptools>=77' wheel 'pybind11>=2.12' ninja numpy)
	@touch $@

# The package in place, without its kernels, and the optional dependencies of an extra of
# pyproject.toml. By path, always: on the public index the name otloss is another project's.
$(STAMPS)/extra-%: pyproject.toml $(STAMPS)/tools
	$(call step,extra-$*,install otloss (editable) and what [$*] needs,\
		OTLOSS_BUILD_NATIVE=0 $(PIP) --no-build-isolation -e '.[$*]')
	@touch $@

# setup.py knows by content what has changed and compiles no more.
.PHONY: build
build: $(STAMPS)/tools  ## compile the kernels in place
	@$(PY) setup.py -q build_ext --inplace

# --------------------------------------------------------------------------------------- targets

PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n 2

.PHONY: test test-all
test: build $(STAMPS)/extra-test $(STAMPS)/extra-examples  ## build, then the tests that matter most
	@$(PYTEST) -m "not slow" $(T)

test-all: build $(STAMPS)/extra-test $(STAMPS)/extra-examples  ## all tests, CUDA kernels emulated
	@$(PYTEST) $(T)

.PHONY: test-matrix
test-matrix:  ## the tests that matter most in clean environments: PYTHONS times TORCHES
	@$(PYTHON) tests/matrix.py --python $(PYTHONS) --torch $(TORCHES)

# What finds reads and writes out of bounds, undefined behaviour and races: docs/testing.md. The
# extension under AddressSanitizer is a build of its own; ThreadSanitizer does not bear torch, so the
# kernels run without it. Clang, a cross compiler and valgrind are used where there are any. A limit
# of time ends a step that hangs.
SANITIZED := build/sanitize
ASAN := -O1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
UNDER_ASAN = timeout 60m env PYTHONPATH=$$PWD/$(SANITIZED)/lib OMP_NUM_THREADS=2 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
NATIVE := timeout 30m $(PY) tests/native/run.py

.PHONY: sanitize
sanitize: $(STAMPS)/extra-test  ## sanitizers: the extension, wrong arguments, the kernels alone
	@CXX="g++ $(ASAN)" CXXFLAGS="$(ASAN)" OTLOSS_BUILD_CUDA=0 $(PY) setup.py -q build \
		--build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@$(UNDER_ASAN) $(VENV)/bin/pytest -m "not slow" tests/test_kernels.py tests/test_results.py \
		tests/test_batching.py tests/test_interruption.py tests/test_grid.py tests/test_multiscale.py
	@$(UNDER_ASAN) $(PY) tests/fuzz_ops.py --calls 2000
	@$(NATIVE) g++ -fsanitize=thread
	@if command -v clang++ >/dev/null; then $(NATIVE) clang++ && \
		$(NATIVE) clang++ -fsanitize=memory --threads 1; fi
	@if { command -v qemu-aarch64 && command -v aarch64-linux-gnu-g++; } >/dev/null; then \
		$(NATIVE) aarch64-linux-gnu-g++ -static --runner qemu-aarch64 --largest 40; fi
	@if command -v valgrind >/dev/null; then \
		$(NATIVE) g++ --runner "valgrind -q --error-exitcode=9" --largest 40 --threads 1; fi

.PHONY: demo
demo: build $(STAMPS)/extra-examples  ## train a small image generator: samples, curves, metrics
	@$(PY) examples/train_sinkhorn.py $(DEMO)

.PHONY: lint lint-python lint-types lint-cpp format
lint: lint-python lint-types lint-cpp  ## ruff, mypy --strict, clang-format: what CI and pre-commit run

lint-python: $(STAMPS)/extra-lint
	@echo "ruff"
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .

lint-types: $(STAMPS)/extra-lint
	@echo "mypy"
	@$(PY) -m mypy --no-error-summary

lint-cpp: $(STAMPS)/extra-lint
	@echo "clang-format"
	@$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

format: $(STAMPS)/extra-lint  ## rewrite the sources in the project's format
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format --quiet .
	@$(VENV)/bin/clang-format -i $(SOURCES)

.PHONY: docs
docs: build $(STAMPS)/extra-docs  ## build and check docs/_build/index.html; a warning is an error
	$(call step,docs,docs,$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build)
	@$(PY) docs/check.py docs/_build
	@echo "docs/_build/index.html"

.PHONY: bench
bench: build $(STAMPS)/extra-bench  ## run benchmarks against other libraries (BENCH=suites)
	@$(PY) -m benchmarks.run $(BENCH)

.PHONY: gpu-prepare
gpu-prepare: build  ## compile and fetch what gpu-check needs (GPU_PYTHON=3.12: of the GPU machine)
	@$(PY) -m benchmarks.gpu_check prepare $(addprefix --python ,$(GPU_PYTHON))

# The log has the table; REPORT=--write puts it into benchmarks/results.
.PHONY: cuda-report
cuda-report: $(STAMPS)/tools  ## read the machine code of the CUDA kernels (needs nvcc, no GPU)
	@command -v nvcc >/dev/null || { echo "no report: nvcc was not found"; exit 0; }; \
	command -v nvdisasm >/dev/null || $(PIP) -q nvidia-cuda-nvdisasm
	$(call step,cuda-report,no more local memory in hot loops than is known,! command -v nvcc || $(PY) -m benchmarks.cuda_report $(REPORT))

# With the GPU machine's own Python and torch: nothing is installed there.
.PHONY: gpu-check
gpu-check:  ## on a GPU machine: check and time the CUDA kernels, in 7 minutes (docs/gpu.md)
	@$(PYTHON) -m benchmarks.gpu_check checks
	@$(PYTHON) -m benchmarks.gpu_check bench

.PHONY: clean
clean:  ## remove everything built, but not .venv and runs/
	@rm -rf build dist docs/_build docs/gallery docs/sg_execution_times.rst *.egg-info otloss/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find otloss tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
