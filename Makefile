# `make demo` and `make test` need python3 (3.11 or newer), make, gcc and a package registry; each makes .venv by itself.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# The registry's default torch is a CUDA build of several GB; tests need only the CPU one.
TORCH ?= torch==2.13.0

# A file's tests stay in one process, which makes their fixtures and compiles their functions once. Files start
# in their own order: by default those of few tests come last, which here are among the slowest.
PYTEST_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

# The kernels' compiler for GPUs that are not here, apart from everything else. It wants these two variables.
# Nearly all its tests are one file, share nothing and so are dealt out one by one.
GATE := .venv-gate
GATE_WHEELS := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
GATE_RUN = JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH="$$($(RUN)/python -c \
	'import sysconfig; print(sysconfig.get_path("purelib"))')" $(GATE)/bin/python

.PHONY: help demo test fuzz faults lint gate wheel clean

help:
	@echo "make demo   quantize SmolLM2-135M, measure it, ask it something"
	@echo "make test   run the tests"
	@echo "make fuzz   read damaged files, 1,000 of each kind; SVSK_FUZZ=N for N"
	@echo "make faults kill quantization 50 times at random moments, resume it, compare the bytes"
	@echo "make lint   ruff and pyright"
	@echo "make gate   compile the kernels for GPUs that are not here and check their machine code"
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
	$(RUN)/python -m pytest $(PYTEST_WORKERS)

fuzz: $(VENV)/.dev
	SVSK_FUZZ=$${SVSK_FUZZ:-1000} $(RUN)/python -m pytest $(PYTEST_WORKERS) tests/fuzz

faults: $(VENV)/.dev
	$(RUN)/python tests/faults/kill_and_resume.py --kills 50

lint: $(VENV)/.dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright --pythonpath $(RUN)/python

$(GATE)/.installed: $(VENV)/.dev
	$(PYTHON) -m venv $(GATE)
	version="$$($(RUN)/python -c 'import jax; print(jax.__version__)')" && $(GATE)/bin/python -m pip install \
		--quiet --no-deps "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" $(GATE_WHEELS) && touch $@ \
		|| echo "NO GATE: THE COMPILER FOR GPUS COULD NOT BE INSTALLED, NO KERNEL'S MACHINE CODE IS CHECKED"

gate: $(GATE)/.installed
	if [ -e $(GATE)/.installed ]; then $(GATE_RUN) -m pytest -n 2 --dist worksteal tests/gate; fi

wheel: $(VENV)/.dev
	rm -rf dist build/wheel
	$(RUN)/python -m build --wheel --outdir dist . > /dev/null
	$(PYTHON) -m venv --system-site-packages build/wheel
	build/wheel/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd build && PYTHONPATH="$$($(abspath $(RUN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		wheel/bin/python ../tests/smoke.py

clean:
	rm -rf $(VENV) .venv-* build dist .pytest_cache .ruff_cache .hypothesis
