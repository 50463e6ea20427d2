"""Compiling what a stage will run, several programs at once: one after another, each when it is first
called, they take longer than the layers of a small model.

For the process's default device alone. Where other groups of devices take layers too, each compiles for its
own what it is the first to call.
"""

import concurrent.futures
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import jax
import jax.numpy as jnp

from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import layer_kinds, layer_linears
from svsk_jax.pipeline.checks import largest_magnitude
from svsk_jax.quant import programs
from svsk_jax.quant.types import QuantConfig

MOST_THREADS = 16


def compile_ahead(
    model: ModelConfig, config: QuantConfig | None, draft: QuantConfig | None
) -> AbstractContextManager[None]:
    """Within it is compiled for the default device what `quantize_joint` will run on a model's linears, and
    with a draft and bits to allocate what `measure_options` will; at its end it has been.

    What is done within it should leave most of the accelerator's memory free, since a search for the fastest
    product takes operands of its own. On a CPU nothing is compiled ahead: several programs at once would
    share the cores of one.

    Args:
        model: its configuration.
        config: a recipe with two-level scales; None where every layer is quantized.
        draft: the recipe as options are measured by it (`plan.drafted`); None where all are measured, or none
            will be.
    """
    return together(needed(model, config, draft) if jax.default_backend() != "cpu" else ())


def needed(
    model: ModelConfig, config: QuantConfig | None, draft: QuantConfig | None
) -> list[programs.Program]:
    """What `compile_ahead` compiles, each program once: those of the largest linears, which take longest,
    first."""
    shapes = {shape for index in layer_kinds(model) for shape in layer_linears(model, index).values()}
    found = {}
    for shape in sorted(shapes, key=lambda shape: shape[0] * shape[1], reverse=True):
        wanted = []
        if config is not None:
            weight = jax.ShapeDtypeStruct(shape, jnp.float32)
            wanted = [
                *programs.of_quantization(shape, config),
                programs.Program(largest_magnitude, (weight,)),
            ]
        if draft is not None and draft.bits is not None:
            wanted += programs.of_options(shape, draft, (draft.tile,))
        for program in wanted:
            arguments, structure = jax.tree.flatten(program.arguments)
            found.setdefault((id(program.function), structure, *map(str, arguments)), program)
    return list(found.values())


@contextmanager
def together(wanted: Iterable[programs.Program]) -> Iterator[None]:
    """Compile several programs at once, beside what is done within it; at its end they are compiled. At one
    that cannot be, or an error or an interrupt within it, no further one is begun; the one that cannot be
    says so where it is called, if it is. Who calls one that is being compiled waits for it."""
    threads = concurrent.futures.ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    try:
        compiling = [threads.submit(program.compile) for program in wanted]
        yield
        concurrent.futures.wait(compiling, return_when=concurrent.futures.FIRST_EXCEPTION)
    finally:
        threads.shutdown(cancel_futures=True)
