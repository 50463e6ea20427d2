"""Search for block configurations on a GPU, by the time of real launches."""

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device_time import call_times
from pallas_kernels.svsk_matmul import triton
from pallas_kernels.svsk_matmul.synthetic import random_weight
from pallas_kernels.svsk_matmul.triton_layout import TritonWeight, lay_out
from pallas_kernels.svsk_matmul.tuning import Blocks, candidates, shape_key

BATCHES = (1, 8, 16, 32, 64)
WORKING_SET = 256 << 20
"""Bytes of weights that launches go through in turn: more than any GPU's cache."""
LAUNCHES = 24
COMPILERS = 12
"""Threads that compile."""


def copies(weight: TritonWeight) -> list[TritonWeight]:
    """So many copies of a weight that going through them empties the cache, at most one for each launch."""
    count = min(LAUNCHES, 1 + WORKING_SET // weight.nbytes)
    return [weight] + [jax.tree.map(jnp.copy, weight) for _ in range(count - 1)]


def compile_all(functions: Sequence[Callable[..., Any]], *arguments: Any) -> list[jax.stages.Compiled]:
    """Compile functions of the same arguments, several at a time."""
    lowered = [jax.jit(function).lower(*arguments) for function in functions]
    with ThreadPoolExecutor(COMPILERS) as pool:
        return list(pool.map(lambda each: each.compile(), lowered))


def blocks_times(weights: Sequence[TritonWeight], m: int, choices: Sequence[Blocks]) -> list[float]:
    """Median microseconds on the device of all kernels of a product, for each of the choices."""
    x = jax.random.normal(jax.random.key(0), (m, weights[0].shape[1]), jnp.bfloat16)

    def call(blocks: Blocks) -> Callable[..., jax.Array]:
        return lambda x, weight: triton.matmul(x, weight, blocks=blocks)

    compiled = compile_all([call(blocks) for blocks in choices], x, weights[0])
    timed = call_times(
        [partial(_on_one_of, function, x, weights) for function in compiled], launches=LAUNCHES
    )
    return [statistics.median(sum(time for _, time in launch) for launch in each) for each in timed]


def _on_one_of(function: Any, x: jax.Array, weights: Sequence[TritonWeight], index: int) -> jax.Array:
    return function(x, weights[index % len(weights)])


def search(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int] = BATCHES,
    on_shape: Callable[[tuple[int, int], int, Blocks, float], None] | None = None,
) -> dict[str, dict[str, dict[str, int]]]:
    """The fastest blocks for each shape and batch, as a table holds them; of companded weights in groups of
    16 with a sidecar of rank 16.

    Args:
        shapes: [N, K] of weights.
        batches: rows of x, of those that `tuning.batch_of` returns.
        on_shape: called with each shape, batch, its best blocks and their microseconds.

    Raises:
        RuntimeError: there is no GPU.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for shape in shapes:
        weights = copies(lay_out(random_weight(jax.random.key(1), *shape)))
        best = found.setdefault(shape_key(weights[0]), {})
        for batch in batches:
            choices = candidates(weights[0], batch)
            times = blocks_times(weights, batch, choices)
            fastest = min(range(len(choices)), key=times.__getitem__)
            blocks = choices[fastest]
            best[str(batch)] = {
                "rows": blocks.rows,
                "superblocks": blocks.superblocks,
                "warps": blocks.warps,
                "stages": blocks.stages,
            }
            if on_shape is not None:
                on_shape(shape, batch, blocks, times[fastest])
    return found
