# Environment, build, main job, tests and benchmarks. A second call of any target reinstalls and rebuilds nothing.
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/digits
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CSRC := $(wildcard csrc/*.cpp csrc/*.hpp)

.PHONY: help run test lint bench sanitize gpu clean

help:
	@echo "make run     environment, build, the digits job and its report (last line printed: the report's path)"
	@echo "make test    the test suite"
	@echo "make lint    ruff, mypy --strict, clang-format"
	@echo "make bench   CPU benchmarks, results in bench/results; PEERS=1 installs JAX, KeOps and others first"
	@echo "make sanitize  the kernels in C++ alone: guard pages, ASan and UBSan, TSan for the thread pool"
	@echo "make gpu     proof and benchmark on a GPU with the machine's own Python (GPU_PYTHON), no network, ten minutes"
	@echo "make clean   remove the environment, the build and every cache; runs/ is kept"

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowfast needs Python >= 3.11: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# The package itself, editable, with what the main job needs. It compiles the extension too, hence both stamps.
$(VENV)/.base: constraints.txt pyproject.toml setup.py | $(PY)
	$(PIP) setuptools wheel pybind11
	$(PIP) --no-build-isolation --editable '.[report,data]'
	@touch $@ $(VENV)/.core

$(VENV)/.core: $(CSRC) setup.py | $(VENV)/.base
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# Only requirements, so that the extension is not compiled a second time.
$(VENV)/.dev: $(VENV)/.base
	$(PIP) $$($(PY) -c "import tomllib; \
	extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	print(*extras['dev'], *extras['gpu'], *extras['cluster'])")
	@touch $@

run: $(VENV)/.base $(VENV)/.core
	@$(VENV)/bin/flowfast digits --out $(RUN_DIR)

test: $(VENV)/.dev $(VENV)/.core
	$(PY) -m pytest

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)

# Peers are optional: PEERS=1 installs them. torchode needs torchtyping, whose only version that goes with this torch asks
# for an older typeguard than tyro does; what torchode uses of it works with either.
$(VENV)/.bench: $(VENV)/.dev
	$(PIP) $$($(PY) -c "import tomllib; \
	print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'])")
	$(PIP) --no-deps torchode==1.0.1 torchtyping==0.1.5
	@touch $@

bench: $(VENV)/.dev $(VENV)/.core $(if $(PEERS),$(VENV)/.bench)
	$(PY) -m bench

# tests/native linked with the kernels, once per sanitizer; no Python. "planted" must be caught.
NATIVE_FLAGS := -std=c++17 -O1 -g -pthread -fno-omit-frame-pointer -fno-sanitize-recover=all \
	-fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-attributes -Wno-psabi
SANITIZE_address := -fsanitize=address,undefined
SANITIZE_thread := -fsanitize=thread
ISAS := $(if $(filter x86_64,$(shell uname -m)),avx512 avx2) generic
ISA_avx512 := -march=x86-64-v4 -mprefer-vector-width=512
ISA_avx2 := -march=x86-64-v3

build/native/%/kernels: $(CSRC) tests/native/kernels.cpp Makefile
	@mkdir -p $(@D)
	$(foreach isa,$(ISAS),$(CXX) $(NATIVE_FLAGS) $(SANITIZE_$*) $(ISA_$(isa)) -DFLOWFAST_ISA=$(isa) \
		-c csrc/isa.cpp -o $(@D)/$(isa).o &&) \
	$(CXX) $(NATIVE_FLAGS) $(SANITIZE_$*) -o $@ $(ISAS:%=$(@D)/%.o) tests/native/kernels.cpp \
		$(filter-out %/bindings.cpp %/isa.cpp,$(wildcard csrc/*.cpp))

sanitize: build/native/address/kernels build/native/thread/kernels
	build/native/address/kernels
	build/native/thread/kernels threads
	! build/native/address/kernels planted 2>build/native/planted.log
	grep -q AddressSanitizer build/native/planted.log

# The machine's own Python, as it is: it needs torch, triton, pytest and pybind11. Results go to $OUT where that is set.
# GPU_DEVICE=cpu rehearses every step without a GPU, kernels interpreted, sizes tiny; its results go to a temporary folder.
GPU_PYTHON ?= python3
GPU_DEVICE ?= cuda
gpu:
	$(GPU_PYTHON) -m bench.gpu --device $(GPU_DEVICE) --out "$${OUT:-bench/results}"

clean:
	rm -rf $(VENV) build dist *.egg-info flowfast/_core*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
