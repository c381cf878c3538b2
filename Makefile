# hashml: `make demo` shows it at work, `make test` proves it. Everything installs into .venv*.

PYTHON ?= $(shell tools/find_python.sh)
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu
# XLA prints its platform warnings to stderr otherwise.
export TF_CPP_MIN_LOG_LEVEL ?= 2
WORKERS ?= 2
# Under a newer Python: all but tiny runs of experiments, a third of the time, which `make test` does.
NEWER ?= --ignore tests/experiments --ignore tests/test_notebooks.py

.DEFAULT_GOAL := help
.PHONY: help demo test lint types imports unit test-newer aot bench peers results report notebooks clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.demo ## ROBE against a full table on the standard library's source: table, figure, page (some minutes)
	$(BIN)/python -m experiments run sharing.robe_text --out runs

test: $(VENV)/.test lint types imports unit ## lint, types, import contracts, test-suite

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/basedpyright --warnings

imports: $(VENV)/.test
	$(BIN)/lint-imports

unit: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -q --durations=10

test-newer: ## the library's tests, programs optimised in full, under a newer Python with the newest jax, where there is one
	@newer=$$(tools/find_python.sh --newer); \
	if [ -z "$$newer" ]; then echo "test-newer: no newer Python here, nothing to do"; exit 0; fi; \
	echo "test-newer: $$newer"; \
	[ -e .venv-newer/.test -a .venv-newer/.test -nt pyproject.toml ] || { \
		"$$newer" -m venv --clear .venv-newer && \
		.venv-newer/bin/python -m pip install --quiet --upgrade pip && \
		.venv-newer/bin/python -m pip install --quiet -e ".[experiments,test,reference,notebooks]" && \
		touch .venv-newer/.test; } && \
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 .venv-newer/bin/python -m pytest -n $(WORKERS) --dist loadscope -q $(NEWER)

aot: .venv-aot/.ready ## compile every kernel for an H200 and a TPU v5e, here, without either
	PYTHONPATH=kernels .venv-aot/bin/python -m aot --check
	.venv-aot/bin/python -m experiments.sharing.pss_pod
	.venv-aot/bin/python -m experiments.kvcache.serving_pod --layers 2
	.venv-aot/bin/python -m experiments.attention.race_pod

bench: $(VENV)/.demo ## time the kernels' ops on this machine's device
	PYTHONPATH=kernels $(BIN)/python -m bench

peers: $(VENV)/.demo ## install what the speed experiments compare with (PyTorch for CPUs, zstd, ZipNN)
	$(BIN)/python -m pip install --quiet -e ".[peers]"

report: $(VENV)/.demo ## RESULTS.md and results.html from the committed rows
	$(BIN)/python -m experiments report

notebooks: $(VENV)/.test ## run the notebooks and render them
	$(BIN)/python tools/render_notebooks.py

clean: ## remove environments and runs
	rm -rf .venv .venv-newer .venv-aot runs

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "hashml needs Python >= 3.11; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "installing hashml and its experiments into $(VENV)"
	$(BIN)/python -m pip install --quiet -e ".[experiments]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	@echo "installing hashml, its experiments and its test tools into $(VENV)"
	$(BIN)/python -m pip install --quiet -e ".[experiments,test,reference,notebooks]"
	@touch $@ $(VENV)/.demo

.venv-aot/.ready: pyproject.toml
	@echo "installing the compilers for H200 and TPU into .venv-aot (about 1.2 GB)"
	$(PYTHON) -m venv --clear .venv-aot
	.venv-aot/bin/python -m pip install --quiet --upgrade pip
	.venv-aot/bin/python -m pip install --quiet -e ".[aot]"
	@touch $@
