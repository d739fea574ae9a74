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

.PHONY: help demo test lint gpu clean

help:
	@echo "make demo   classify six photos with real weights, then again through the kernels; writes demo.png"
	@echo "make test   all tests: kernels on the GPU, or interpreted where there is none (PYTEST_ARGS=... to choose)"
	@echo "make lint   ruff and mypy"
	@echo "make gpu    what needs a GPU, with this machine's own python3 and torch (PYTHON=... to choose): 9 minutes"
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
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) .deps build dist *.egg-info demo.png

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

# Triton 3.6 fails with NumPy >= 2.4.
.deps/triton36/.stamp: | $(BIN)/python
	$(INSTALL_APART) .deps/triton36 triton==3.6.0 numpy==2.3.5
	@touch $@

.deps/triton39/.stamp: | $(BIN)/python
	$(INSTALL_APART) .deps/triton39 triton==3.9.0
	@touch $@
