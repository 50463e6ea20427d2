# `make demo` and `make test` need python3 (3.11 or newer), make, gcc and a package registry; each makes .venv by itself.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# The registry's default torch is a CUDA build of several GB; tests need only the CPU one.
TORCH ?= torch==2.13.0

.PHONY: help demo test lint wheel clean

help:
	@echo "make demo   quantize SmolLM2-135M, measure it, ask it something"
	@echo "make test   run the tests"
	@echo "make lint   ruff and pyright"
	@echo "make wheel  build the wheel and try it outside the tree"
	@echo "make clean  remove the environments and caches"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "svsk-jax needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --editable '.[dev]'
	$(RUN)/python -m pip install --quiet '$(TORCH)' || echo "WITHOUT TORCH: parity tests against transformers will be skipped"
	touch $@

demo: $(VENV)/.installed
	$(RUN)/svsk demo

test: $(VENV)/.dev
	$(RUN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright --pythonpath $(RUN)/python

wheel: $(VENV)/.dev
	rm -rf dist build/wheel
	$(RUN)/python -m build --wheel --outdir dist . > /dev/null
	$(PYTHON) -m venv --system-site-packages build/wheel
	build/wheel/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd build && PYTHONPATH="$$($(abspath $(RUN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		wheel/bin/python ../tests/smoke.py

clean:
	rm -rf $(VENV) .venv-* build dist .pytest_cache .ruff_cache .hypothesis
