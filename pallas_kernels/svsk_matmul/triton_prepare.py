"""The Triton kernel before a product: x as f16, each 256 columns of a row divided by a power of two so that
they fit, and a single row spread over the eight columns of a tensor-core product."""

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
SPREAD = 8
"""Columns that a single row of x is spread over: the width of a tensor-core product."""
WARPS = 2
PLANES = SUPERBLOCK // PLANE


class Prepared(NamedTuple):
    """x as the kernels of a product read it, K padded to B superblocks of 256 columns with zeros."""

    values: Leaf
    """f16 [m, 256 B], x / unit; or of a single row of x [8, 256 B], each row with the columns of some scale
    groups and zeros elsewhere, in the order that the groups' scales have in `TritonWeight`."""
    unit: Leaf
    """f32 [m, B], powers of two that take the largest element of a superblock to 256 to 512."""


def abstract_prepared(rows: int, superblocks: int, *, spread: bool) -> Prepared:
    """Shapes of a `Prepared` of some rows of x."""
    height = SPREAD if spread else rows
    return Prepared(
        jax.ShapeDtypeStruct((height, superblocks * SUPERBLOCK), jnp.float16),
        jax.ShapeDtypeStruct((rows, superblocks), jnp.float32),
    )


def store_superblock(
    values_ref: Any,
    unit_ref: Any,
    row: jax.Array,
    superblock: jax.Array,
    x: jax.Array,
    spread_group: int | None,
) -> None:
    """Within a kernel: write the columns of a superblock, x f32 [4, 64], into the arrays of a `Prepared`."""
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(x)), jnp.int32)
    exponent = jnp.maximum((bits & 0x7F800000) - (8 << 23), 1 << 23)
    unit = lax.bitcast_convert_type(exponent, jnp.float32)
    small = (x * (1 / unit)).astype(jnp.float16)
    plane = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    column = superblock * SUPERBLOCK + plane * PLANE + lane
    if spread_group is None:
        plgpu.store(values_ref.at[row, column], small)
    else:
        place = 2 * (lane // spread_group) + plane % 2 + (0 if spread_group == 16 else (plane // 2) * 4)
        target = lax.broadcasted_iota(jnp.int32, (SPREAD, *x.shape), 0)
        value = jnp.where(target == place[None], small[None], jnp.float16(0))
        plgpu.store(values_ref.at[target, jnp.broadcast_to(column[None], target.shape)], value)
    plgpu.store(unit_ref.at[row, superblock], unit)


def _kernel(x_ref, values_ref, unit_ref, *, rows: int, columns: int, group: int | None):
    row, superblock = pl.program_id(0), pl.program_id(1)
    shape = (PLANES, PLANE)
    column = superblock * SUPERBLOCK + lax.broadcasted_iota(jnp.int32, shape, 0) * PLANE
    column += lax.broadcasted_iota(jnp.int32, shape, 1)
    x = plgpu.load(x_ref.at[row, column], mask=(column < columns) & (row < rows), other=0)
    store_superblock(values_ref, unit_ref, row, superblock, x.astype(jnp.float32), group)


def prepare(
    x: Float[Array, "m k"], *, batch: int, spread_group: int | None = None, interpret: bool = False
) -> Prepared:
    """x for a product, m padded to a multiple of `batch` with zeros.

    Args:
        x: bf16 or f16.
        batch: rows of x that a program of the product takes.
        spread_group: None, or for a single row of x the size of the scale groups: it is spread.
        interpret: run in interpret mode.
    """
    m, k = x.shape
    rows, superblocks = batch * ceil_div(m, batch), ceil_div(k, SUPERBLOCK)
    values, unit = pl.pallas_call(
        partial(_kernel, rows=m, columns=k, group=spread_group),
        grid=(rows, superblocks),
        out_shape=list(abstract_prepared(rows, superblocks, spread=spread_group is not None)),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(x)
    return Prepared(values, unit)
