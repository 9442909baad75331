# Everything lives in .venv; the first target that needs it sets it up, later ones do not.

PYTHON ?= python3
ARGS ?=
RESULTS ?=
# Of the tests: 1 measures it, 0 does not. Unset, it is measured by Python 3.12 or later, which does
# so at little cost; 3.11 traces every call, which makes trainings three times as long.
COVERAGE ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.installed
KERNELS := $(wildcard build_backend/*.py csrc/*/*.py csrc/*/*.h $(addprefix csrc/*/*/*.,cpp cu cuh h))
# What compiles the CUDA kernels, where there is a GPU to run them or RESFAST_CUDA=1 asks for them,
# and CUDA_HOME names no other. CUTLASS's own requirements are for its Python side.
NVCC := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cutlass
CUDA := $(if $(filter 0,$(RESFAST_CUDA)),,$(filter 1,$(RESFAST_CUDA))$(shell command -v nvidia-smi))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help train test faults bench bench-report gpu-report doctor lint docs wheel clean

help: ## Show this list
	@echo 'make TARGET [ARGS="options"] [PYTHON=python3.11]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(INSTALLED) ## Train a network; ARGS="--epochs 5" and others, ARGS=--help lists them
	$(BIN)/python -m resfast.train $(ARGS)

test: $(INSTALLED) ## Run the tests, two at a time; ARGS="-x tests/test_package.py" chooses some
	coverage='$(COVERAGE)'; status=0; \
	[ -n "$$coverage" ] || coverage=$$($(BIN)/python -c 'import sys; print(int(hasattr(sys, "monitoring")))'); \
	[ "$$coverage" = 0 ] && options= || options='--cov --cov-report='; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $$options $(ARGS) \
	  || status=$$?; \
	[ -z "$$options" ] || { percent=$$($(BIN)/python -m coverage report --format=total) \
	  && echo "Coverage of resfast: $$percent %"; }; exit $$status

faults: $(INSTALLED) ## Kill commands at 1,000 moments and leave others without space
	RESFAST_FAULTS=1000 $(BIN)/python -m pytest tests/faults $(ARGS)

bench: $(INSTALLED) ## Time inference, the training step, augmentation and loaders against others
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

bench-report: $(INSTALLED) ## The same as tables and plots; RESULTS="a.json b.json" takes these instead
ifeq ($(RESULTS),)
	@mkdir -p build && rm -f build/benchmarks.json build/peers.json
	status=0; \
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=build/benchmarks.json $(ARGS) \
	  || status=$$?; \
	$(BIN)/python -m benchmarks.peers --json build/peers.json || status=$$?; \
	$(BIN)/python -m benchmarks.bench_report $$(ls build/benchmarks.json build/peers.json) && exit $$status
else
	$(BIN)/python -m benchmarks.bench_report $(RESULTS) $(ARGS)
endif

gpu-report: $(INSTALLED) ## Build, test, time and train here, and write it down; ARGS="--data folder:…"
	$(BIN)/python -m benchmarks.gpu_report $(ARGS)

doctor: $(INSTALLED) ## Say what is there, what is missing and what to do; ARGS="--data folder:…"
	$(BIN)/python -m resfast.doctor $(ARGS)

lint: $(BIN)/ruff $(BIN)/mypy ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(BIN)/mkdocs ## Build the documentation as a site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

wheel: $(INSTALLED) ## Build a source distribution and a wheel for every Python and torch, in dist
	$(PIP) install -c constraints.txt auditwheel abi3audit wheel
	rm -rf dist && mkdir dist
	cd dist && PYTHONPATH=../build_backend ../$(BIN)/python -c \
	  'import os; os.chdir(".."); import resfast_build; print(resfast_build.build_sdist("dist"))'
	RESFAST_EXTENSION=1 $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	$(BIN)/python build_backend/audit.py dist/*.whl

clean: ## Remove build products and caches; .venv, data and runs stay
	rm -rf build dist *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f resfast/_C.*.so resfast/_CUDA.so resfast/_CUDA.json $(INSTALLED)
	find resfast tests benchmarks build_backend -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, so that the kernels are built against it and not against another copy of it.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(KERNELS) $(BIN)/python
	$(PIP) install -c constraints.txt torch setuptools
	$(if $(CUDA),$(if $(CUDA_HOME),,$(PIP) install -c constraints.txt --no-deps $(NVCC)))
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@ls resfast/_C.*.so >/dev/null 2>&1 || echo >&2 \
	  'resfast is installed without its C++ kernels, and slower: $(BIN)/python -m pip install -v --no-build-isolation -e . says why'
	@$(if $(CUDA),ls resfast/_CUDA.so,true) >/dev/null 2>&1 || echo >&2 \
	  'resfast is installed without its CUDA kernels, and slower: $(BIN)/python -m pip install -v --no-build-isolation -e . says why'
	@touch $@

# Linting needs these two alone, not the gigabytes of torch: see [tool.mypy] in pyproject.toml.
$(BIN)/ruff $(BIN)/mypy: constraints.txt $(BIN)/python
	$(PIP) install -c constraints.txt $(@F)
	@touch $@

# So does the documentation, whose docstrings are read from the source.
$(BIN)/mkdocs: constraints.txt $(BIN)/python
	$(PIP) install -c constraints.txt 'mkdocs<2' mkdocs-material 'mkdocstrings[python]'
	@touch $@

$(BIN)/python:
	@command -v '$(PYTHON)' >/dev/null || { echo >&2 \
	  'resfast needs Python 3.11 or later, but there is no "$(PYTHON)": name one with make PYTHON=…'; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	  "resfast needs Python 3.11 or later, but $(PYTHON) is $$('$(PYTHON)' --version 2>&1): name another with make PYTHON=…"; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	  '$(PYTHON) cannot make virtual environments: install its venv module (on Debian: apt install python3-venv)'; exit 1; }
	'$(PYTHON)' -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
