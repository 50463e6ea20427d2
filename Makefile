# `make demo` and `make test` need python3 (3.11 or newer), make, gcc and a package registry; each makes .venv by itself.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# The registry's default torch is a CUDA build of several GB; tests need only the CPU one.
TORCH ?= torch==2.13.0

# A file's tests stay in one process, which makes their fixtures and compiles their functions once. Files start
# in their own order: by default those of few tests come last, which here are among the slowest.
PYTEST_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

# The kernels' compiler for GPUs that are not here, apart from everything else. It wants two of these variables; the
# third undoes what the other tests compile with.
# Nearly all its tests are one file, share nothing and so are dealt out one by one.
GATE := .venv-gate
GATE_WHEELS := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
GATE_RUN = JAX_DISABLE_MOST_OPTIMIZATIONS=0 JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH="$$($(RUN)/python -c \
	'import sysconfig; print(sysconfig.get_path("purelib"))')" $(GATE)/bin/python

# A part of the tests again on a newer Python and jax: quantizing on one device, kernels, decode step, a mesh,
# stored models, statistics, generation, two commands, and a small model through the default recipe's method and
# through polish. make test-newer-whole is everything.
NEWER_PYTHON ?= python3.12
NEWER_JAX := 0.11.2
NEWER := .venv-3.12
NEWER_TESTS := tests/quant --ignore=tests/quant/test_row_parts.py \
	$(addprefix tests/model/,test_fused_step.py::test_sequences_of_different_lengths test_experts.py test_golden.py) \
	$(addprefix tests/pallas_kernels/,test_layout.py test_round_columns.py test_transposed.py test_triton_int8.py) \
	$(addprefix tests/pallas_kernels/test_triton.py::test_,several_weights_in_one_launch a_layer_of_a_stack \
		vmap_and_leading_axes shard_map_over_rows_of_x many_rows_restore_a_layer_of_a_stack) \
	$(addprefix tests/parallel/test_decoder.py::test_,dense the_fused_step packed_parts_hold_what_the_whole_does) \
	tests/storage/test_checkpoint.py tests/runtime/test_generate.py tests/test_xla_flags.py \
	tests/calibration/test_statistics.py tests/calibration/test_expert_statistics.py \
	tests/calibration/test_text.py::test_the_model_writes_the_same_text_for_the_same_seed \
	tests/pipeline/test_pipeline.py::test_the_budget_is_kept_and_mostly_spent \
	tests/pipeline/test_polish.py::test_steps_that_do_harm_are_not_kept \
	$(addprefix tests/cli/test_cli.py::test_,quantize_inspect_and_evaluate_agree_on_bits convert_is_lossless)

.PHONY: help demo test test-newer test-newer-whole fuzz faults lint gate wheel clean

help:
	@echo "make demo   quantize SmolLM2-135M, measure it, ask it something"
	@echo "make test   run the tests"
	@echo "make test-newer        a part of the tests on Python 3.12 with jax $(NEWER_JAX)"
	@echo "make test-newer-whole  all tests there"
	@echo "make fuzz   read damaged files, 1,000 of each kind; SVSK_FUZZ=N for N"
	@echo "make faults kill quantization and calibration 50 times each at random moments, resume, compare the bytes"
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

$(NEWER)/.installed: pyproject.toml
	$(NEWER_PYTHON) -m venv $(NEWER)
	$(NEWER)/bin/python -m pip install --quiet --upgrade pip
	$(NEWER)/bin/python -m pip install --quiet --editable '.[dev]' 'jax==$(NEWER_JAX)' 'jaxlib==$(NEWER_JAX)'
	touch $@

test-newer: $(NEWER)/.installed
	$(NEWER)/bin/python -m pytest $(PYTEST_WORKERS) $(NEWER_TESTS)

test-newer-whole: $(NEWER)/.installed
	$(NEWER)/bin/python -m pytest $(PYTEST_WORKERS)

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
