# Every target sets up what it needs on first use; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch by its exact version, in the same command as everything else: a looser request fetches a CUDA build of
# several GB where a CPU build would do.
TORCH := $(shell grep -E '^(torch|torchvision)==' constraints.txt)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
INSTALL_APART := $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target
PYTEST_ARGS ?= -n 2 --dist worksteal
# What runs beside the GPU: kernels that were compiled under another Python or Triton are not found there.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= torch==2.11.0
CACHE ?= gpu-cache

.PHONY: help demo test lint gpu gpu-second gpu-rehearsal gpu-cache clean

help:
	@echo "make demo   classify six photos with real weights, then again through the kernels; writes demo.png"
	@echo "make test   all tests: kernels on the GPU, or interpreted where there is none (PYTEST_ARGS=... to choose)"
	@echo "make lint   ruff and mypy"
	@echo "make gpu    what needs a GPU, with this machine's own python3 and torch (PYTHON=... to choose): 330 s"
	@echo "            make gpu-second: tuning, torch.compile, inference, memcheck: 360 s (GPU_ARGS=... for both)"
	@echo "make gpu-cache      compile all that both launch, without a GPU, into CACHE, for GPU_PYTHON and GPU_TORCH"
	@echo "make gpu-rehearsal  both, and every fault that they must survive, on a GPU that is not there"
	@echo "make clean  remove the environments and build results"

demo: $(VENV)/.demo-stamp
	$(BIN)/fastmbconv demo

# One thread per worker: the interpreter is single-threaded, and two workers fill two cores.
test: $(VENV)/.test-stamp .deps/triton36/.stamp .deps/triton39/.stamp
	FASTMBCONV_TRITON_DEPS=.deps OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.lint-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

gpu-second:
	$(PYTHON) -m benchmarks.gpu --second $(GPU_ARGS)

gpu-cache: .venv-gpu/.stamp
	.venv-gpu/bin/python -m benchmarks.precompile --cache $(CACHE)

gpu-rehearsal: $(VENV)/.test-stamp
	$(BIN)/python -m benchmarks.rehearsal $(REHEARSAL_ARGS)

clean:
	rm -rf $(VENV) .venv-gpu .deps build dist *.egg-info demo.png

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastmbconv needs Python >= 3.11: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) can't make a virtual environment (Debian: apt install python3-venv)" >&2; exit 1; }

$(VENV)/.demo-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.test-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test]'
	@touch $@

# mypy reads torch's types, so linting wants torch too.
$(VENV)/.lint-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[lint]'
	@touch $@

.venv-gpu/.stamp:
	$(GPU_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check $(GPU_TORCH) numpy hypothesis pytest timm
	@touch $@

# Triton 3.6's interpreter fails with NumPy >= 2.4.
.deps/triton36/.stamp: | $(BIN)/python
	$(INSTALL_APART) .deps/triton36 triton==3.6.0 numpy==2.3.5
	@touch $@

.deps/triton39/.stamp: | $(BIN)/python
	$(INSTALL_APART) .deps/triton39 triton==3.9.0
	@touch $@
