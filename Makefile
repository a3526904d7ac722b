# make demo   sets up everything, trains simclr and clip on handwritten digits, shows what they learned
# make test   sets up everything, runs the tests
# make gpu    on a machine with a CUDA device: its tests and benchmarks, with nothing installed
# make docs   sets up everything, builds the documents with the API into site/
# They need Python 3.10 or newer, make, and (for the fast CPU kernels) a C++17 compiler and Python's
# headers. Which build of the pinned torch comes is your pip configuration.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RUNS   ?= runs
BIN    := $(VENV)/bin
# As many processes as processors, to four: tests are mostly small, and PyTorch has threads of its own.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: demo test test-all gpu lint typecheck bench docs clean

demo: $(VENV)/installed
	rm -rf $(RUNS)/demo-simclr $(RUNS)/demo-clip
	$(BIN)/fastcl train --method simclr --data digits --out $(RUNS)/demo-simclr
	$(BIN)/fastcl train --method clip --data digits --out $(RUNS)/demo-clip

test: $(VENV)/installed
	$(PYTEST) -m "not slow and not gpu and not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" tests/kernels/triton

test-all: $(VENV)/installed
	$(PYTEST) -m "not gpu and not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter" tests/kernels/triton

# On a machine with a CUDA device, in the environment that PYTHON is (PyTorch, Triton, pytest,
# hypothesis, pybind11, cmake, typer, rich, psutil): installs nothing, needs no network.
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -m gpu tests/gpu
	$(PYTHON) -m benchmarks --device cuda --preset gpu

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/installed
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info fastcl/_C*.so

# torch comes first and alone, so that no other requirement chooses its version; not quietly, as it is
# large.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)"
	touch $@

SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q -e ".[train,test,bench,dev]"
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install -q -e ".[docs]"
	touch $@
