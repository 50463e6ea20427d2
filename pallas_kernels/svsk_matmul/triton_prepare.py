"""The Triton kernel before a product: x as f16, each 256 columns of a row divided by a power of two so that
they fit."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE, SUPERBLOCK
from pallas_kernels.svsk_matmul.types import Leaf

NAME = "svsk_prepare"
WARPS = 2
PLANES = SUPERBLOCK // PLANE
RUN = 16
"""Columns of x that a product for several rows takes at a time, those of a group."""


class Prepared(NamedTuple):
    """x as the kernels of a product read it, K padded to B superblocks of 256 columns with zeros."""

    values: Leaf
    """f16 [256 B / run, m, run], x / unit by runs of columns, as many as the kernel takes at a time: so what
    it takes of several rows lies together, and costs the cache as many look-ups as it has lines."""
    unit: Leaf
    """f32 [m, B], powers of two that take the largest element of a superblock to 256 to 512."""


def abstract_prepared(rows: int, superblocks: int, run: int = RUN) -> Prepared:
    """Shapes of a `Prepared` of some rows of x."""
    return Prepared(
        jax.ShapeDtypeStruct((superblocks * SUPERBLOCK // run, rows, run), jnp.float16),
        jax.ShapeDtypeStruct((rows, superblocks), jnp.float32),
    )


def store_superblock(
    values_ref: Any, unit_ref: Any, row: jax.Array, superblock: jax.Array, x: jax.Array
) -> None:
    """Within a kernel: write the columns of a superblock, x f32 [4, 64], into the arrays of a `Prepared`."""
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(x)), jnp.int32)
    exponent = jnp.maximum((bits & 0x7F800000) - (8 << 23), 1 << 23)
    unit = lax.bitcast_convert_type(exponent, jnp.float32)
    small = (x * (1 / unit)).astype(jnp.float16)
    plane = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    column = superblock * SUPERBLOCK + plane * PLANE + lane
    run = jnp.int32(values_ref.shape[2])
    plgpu.store(values_ref.at[lax.div(column, run), row, lax.rem(column, run)], small)
    plgpu.store(unit_ref.at[row, superblock], unit)


def load_columns(
    values: Any, rows: tuple[jax.Array, int], superblock: jax.Array, column: int, width: int
) -> jax.Array:
    """Within a kernel: columns of a superblock of a `Prepared`'s values, f16 [width, rows]: whole runs, of so
    many rows from the first on."""
    (first, count), run = rows, values.shape[2]
    row, lane = (lax.broadcasted_iota(jnp.int32, (count, width), axis) for axis in range(2))
    index = superblock * (SUPERBLOCK // run) + column // run + lax.div(lane, jnp.int32(run))
    return plgpu.load(values.at[index, first + row, lax.rem(lane, jnp.int32(run))]).T


def _kernel(x_ref, values_ref, unit_ref, *, rows: int, columns: int):
    row, superblock = pl.program_id(0), pl.program_id(1)
    shape = (PLANES, PLANE)
    column = superblock * SUPERBLOCK + lax.broadcasted_iota(jnp.int32, shape, 0) * PLANE
    column += lax.broadcasted_iota(jnp.int32, shape, 1)
    x = plgpu.load(x_ref.at[row, column], mask=(column < columns) & (row < rows), other=0)
    store_superblock(values_ref, unit_ref, row, superblock, x.astype(jnp.float32))


def prepare(x: Float[Array, "m k"], *, batch: int, run: int = RUN, interpret: bool = False) -> Prepared:
    """x for a product, m padded to a multiple of `batch` with zeros.

    Args:
        x: bf16 or f16.
        batch: rows of x that a program of the product takes.
        run: columns that it takes at a time.
        interpret: run in interpret mode.
    """
    m, k = x.shape
    rows, superblocks = batch * ceil_div(m, batch), ceil_div(k, SUPERBLOCK)
    values, unit = pl.pallas_call(
        partial(_kernel, rows=m, columns=k),
        grid=(rows, superblocks),
        out_shape=list(abstract_prepared(rows, superblocks, run)),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(x)
    return Prepared(values, unit)
