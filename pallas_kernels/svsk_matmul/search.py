"""Search for block configurations on a GPU, by the time of real launches."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device_time import Chain, call_times, chain
from pallas_kernels.svsk_matmul import triton
from pallas_kernels.svsk_matmul.synthetic import random_weight
from pallas_kernels.svsk_matmul.triton_layout import TritonWeight, lay_out
from pallas_kernels.svsk_matmul.tuning import Blocks, candidates, shape_key

BATCHES = (1, 8, 16, 32, 64)
WORKING_SET = 256 << 20
"""Bytes of weights that launches go through in turn: more than any GPU's cache."""
MOST_COPIES = 64
"""Of one weight; weights below 1 MB therefore stay in the cache of an H100."""
LAUNCHES = 12
"""Launches of a chain, at least."""
RANK = 16
HEAD_ROWS = 1 << 16
"""More than any linear of a layer has."""
COMPILERS = 12
"""Threads that compile."""


def copies(weight: TritonWeight) -> list[TritonWeight]:
    """So many copies of a weight that going through them empties the cache."""
    return [weight] + [jax.tree.map(jnp.copy, weight) for _ in range(copies_of(weight.nbytes) - 1)]


def copies_of(nbytes: int) -> int:
    """How many copies of so many bytes a chain goes through."""
    return min(MOST_COPIES, 1 + WORKING_SET // nbytes)


Work = tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]
"""A function and the operands of each of its launches."""


def compile_chains(works: Sequence[Work]) -> list[Chain]:
    """A chain of each, several compiled at a time."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        return list(pool.map(lambda work: chain(*work), works))


def operands_of(weights: Sequence[Any], m: int, k: int) -> list[tuple[jax.Array, Any]]:
    """Operands of a chain that takes every weight: other rows of x for each launch, so that no launch shares
    what prepares them."""
    keys = jax.random.split(jax.random.key(m), max(LAUNCHES, len(weights)))
    xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys]
    return [(x, weights[index % len(weights)]) for index, x in enumerate(xs)]


def blocks_times(weights: Sequence[TritonWeight], m: int, choices: Sequence[Blocks]) -> list[float]:
    """Microseconds on the device of all kernels of a product, for each of the choices."""
    operands = operands_of(weights, m, weights[0].shape[1])
    works = [(partial(triton.matmul, blocks=blocks), operands) for blocks in choices]
    timed = call_times(compile_chains(works))
    return [sum(each.values()) for each in timed]


def search(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int] = BATCHES,
    on_shape: Callable[[tuple[int, int], int, Blocks, float], None] | None = None,
    *,
    seconds: float = float("inf"),
) -> dict[str, dict[str, dict[str, int]]]:
    """The fastest blocks for each shape and batch, as a table holds them; of companded weights in groups of
    16 with a sidecar of rank 16, or without one where so many rows say that it is a head.

    Args:
        shapes: [N, K] of weights.
        batches: rows of x, of those that `tuning.batch_of` returns.
        on_shape: called with each shape, batch, its best blocks and their microseconds.
        seconds: after so many nothing more is begun.

    Raises:
        RuntimeError: there is no GPU.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    deadline = time.monotonic() + seconds
    for shape in shapes:
        if time.monotonic() > deadline:
            break
        rank = 0 if shape[0] >= HEAD_ROWS else RANK
        weights = copies(lay_out(random_weight(jax.random.key(1), *shape, rank=rank)))
        best: dict[str, dict[str, int]] = {}
        for batch in batches:
            if best and time.monotonic() > deadline:
                break
            choices = candidates(weights[0], batch)
            times = blocks_times(weights, batch, choices)
            fastest = min(range(len(choices)), key=times.__getitem__)
            blocks = choices[fastest]
            best[str(batch)] = {
                name: value for name, value in dataclasses.asdict(blocks).items() if name != "batch"
            }
            if on_shape is not None:
                on_shape(shape, batch, blocks, times[fastest])
        found[shape_key(weights[0])] = best
    return found
