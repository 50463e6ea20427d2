"""The Triton kernel before a product: x as f16, each row divided by a power of two so that it fits, and a
single row spread over the eight columns of a tensor-core product."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE, SUPERBLOCK

NAME = "svsk_prepare"
SPREAD = 8
"""Columns that a single row of x is spread over: the width of a tensor-core product."""
CHUNK = 16384
"""Elements that a program looks at a time, at most."""
SPAN = 4096
"""Elements that a program writes, where x is not spread."""
WARPS = 8


def _kernel(x_ref, out_ref, unit_ref, *, rows: int, columns: int, span: int, group: int | None):
    row, part = pl.program_id(0), pl.program_id(1)

    def load(column):
        inside = (column < columns) & (row < rows)
        return plgpu.load(x_ref.at[row, column], mask=inside, other=0)

    if x_ref.dtype == jnp.float16:
        unit = jnp.float32(1)
    else:
        chunk = min(CHUNK, 1 << (columns - 1).bit_length())

        def largest(i, most):
            x = load(i * chunk + lax.broadcasted_iota(jnp.int32, (chunk,), 0))
            return jnp.maximum(most, jnp.abs(x.astype(jnp.float32)))

        most = lax.fori_loop(0, ceil_div(columns, chunk), largest, jnp.zeros((chunk,), jnp.float32))
        bits = lax.bitcast_convert_type(jnp.max(most), jnp.int32)
        # The largest element becomes 256 to 512.
        exponent = jnp.maximum((bits & 0x7F800000) - (8 << 23), 1 << 23)
        unit = lax.bitcast_convert_type(exponent, jnp.float32)
    column = part * span + lax.broadcasted_iota(jnp.int32, (span,), 0)
    x = (load(column).astype(jnp.float32) * (1 / unit)).astype(jnp.float16)
    if group is None:
        plgpu.store(out_ref.at[row, column], x, mask=column < out_ref.shape[1])
    else:
        # The column of each scale group in the order of the scales in `TritonWeight`.
        plane, q = (column % SUPERBLOCK) // PLANE, (column % PLANE) // group
        place = 2 * q + plane % 2 + (0 if group == 16 else (plane // 2) * 4)
        target = lax.broadcasted_iota(jnp.int32, (SPREAD, span), 0)
        value = jnp.where(target == place[None, :], x[None, :], jnp.float16(0))
        plgpu.store(out_ref.at[target, jnp.broadcast_to(column[None, :], target.shape)], value)
    plgpu.store(unit_ref.at[row], unit)


def prepare(
    x: Float[Array, "m k"], *, batch: int, spread_group: int | None = None, interpret: bool = False
) -> tuple[Float[Array, "height columns"], Float[Array, "rows"]]:
    """x / unit in f16, and unit, f32: for each row a power of two that takes its largest element to 256 to
    512, or 1 where x is f16. K is padded to whole superblocks, m to a multiple of `batch`.

    Args:
        x: bf16 or f16.
        batch: rows of x that a program of the product takes.
        spread_group: None, or for a single row of x the size of the scale groups: the result has eight rows,
            each with the columns of some groups and zeros elsewhere, in the order that the groups' scales
            have in `TritonWeight`.
        interpret: run in interpret mode.
    """
    m, k = x.shape
    padded = SUPERBLOCK * ceil_div(k, SUPERBLOCK)
    rows = batch * ceil_div(m, batch)
    span = SUPERBLOCK if spread_group is not None else SPAN
    height = rows if spread_group is None else SPREAD
    small, unit = pl.pallas_call(
        partial(_kernel, rows=m, columns=k, span=span, group=spread_group),
        grid=(rows, ceil_div(padded, span)),
        out_shape=[
            jax.ShapeDtypeStruct((height, padded), jnp.float16),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(x)
    return small, unit
