"""A kernel that only reads: how fast a device's memory lets any kernel go over so many bytes."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.svsk_matmul.search import LAUNCHES, Work, copies_of

CHUNKS = (2048, 4096, 8192)
"""Words of 32 bits that a program reads; the fastest counts."""


def _kernel(data_ref, out_ref):
    out_ref[...] = jnp.sum(data_ref[...].reshape(-1, 8), axis=0)


def read(data: jax.Array, *, chunk: int) -> jax.Array:
    """Sums of an int32 vector, eight for each chunk of it."""
    programs = data.shape[0] // chunk
    return pl.pallas_call(
        _kernel,
        grid=(programs,),
        in_specs=[pl.BlockSpec((chunk,), lambda i: (i,))],
        out_specs=pl.BlockSpec((None, 8), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((programs, 8), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="read_floor",
    )(data)


def floor_works(nbytes: int) -> dict[str, Work]:
    """For each chunk what reads `nbytes`, rounded up to whole chunks, from another place at each launch."""
    words = -(-nbytes // (4 * max(CHUNKS))) * max(CHUNKS)
    count = max(LAUNCHES, copies_of(4 * words))
    operands = [(jnp.arange(words, dtype=jnp.int32) + index,) for index in range(count)]
    return {f"floor {chunk}": (partial(read, chunk=chunk), operands) for chunk in CHUNKS}
