# make demo   set up .venv and run Kelix on a picture and on a prompt
# make test   set up .venv and run the tests
# make bench  the benchmarks        make lint  ruff, clang-format, mypy
# make native rebuild the libraries in place (KELIX_CUDA=0 without nvcc, =1 with it or fail)
# make gpu    on a machine with an NVIDIA GPU: GPU tests, compute-sanitizer, benchmarks
# make clean  what builds made; out/ stays

PYTHON ?= python3
# The newest torch this release was tested with; any torch >= 2.10 that .venv already has is kept.
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py
OUT ?= out

.PHONY: demo test bench lint format native gpu clean

demo: $(VENV)/.built
	$(RUN) -m kelix_rt.demo --out $(OUT)

test: $(VENV)/.built
	$(RUN) -m pytest tests

bench: $(VENV)/.built
	$(RUN) -m pytest benchmarks --benchmark-only

lint: $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -type f)
	$(RUN) -m mypy

format: $(VENV)/.lint
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc -type f)

gpu:
	bash tests/gpu/run.sh $(OUT)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -c "import torch" 2>/dev/null || $(VENV)/bin/pip install -q "$(TORCH)"
	touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(VENV)/bin/pip install -q -e ".[test]"
	touch $@

# pip builds the libraries when it installs; later changes of the sources only rebuild what changed.
$(VENV)/.built: $(NATIVE) $(VENV)/.installed
	$(MAKE) -s native

native: $(VENV)/.installed
	$(VENV)/bin/pip install -q "cmake>=3.24" "ninja>=1.11" "pybind11>=2.13" "setuptools>=77"
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) setup.py -q native
	touch $(VENV)/.built

$(VENV)/.lint: $(VENV)/.installed
	$(VENV)/bin/pip install -q -e ".[lint]"
	touch $@

# What builds made. out/ stays: pictures, logs and training runs lie there.
clean:
	rm -rf build kelix_rt/*.so $(VENV)/.built
