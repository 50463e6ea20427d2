"""The Triton kernel after a product: sums the parts of a split K, adds the sidecars' U (V x), and rounds."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import ROW_UNIT, TritonWeight
from pallas_kernels.svsk_matmul.triton_operands import named, stack_index, weight_operands

NAME = "svsk_epilogue"
RANKS = 16
"""Of the sidecar, taken at a time."""
BATCH = 16
"""Rows of x that a program finishes, where there are several."""


def _one_row(*refs, names: tuple[str, ...], parts: int, rows: int):
    ref = named(names, refs)
    at = stack_index(ref)
    block = pl.program_id(0)
    row = pl.ds(block * ROW_UNIT, ROW_UNIT)
    y = jnp.float32(0)
    for part in range(parts):
        y += plgpu.load(ref["products"].at[jnp.int32(part), slice(None), row])
    if "u" in ref:
        count, first = (plgpu.load(ref["ranges"].at[(*at, block, jnp.int32(i))]) for i in (1, 2))
        item = lax.broadcasted_iota(jnp.int32, (1, RANKS), 0)
        rank = lax.broadcasted_iota(jnp.int32, (1, RANKS), 1)

        def some(i, y):
            here = i * RANKS
            u = plgpu.load(ref["u"].at[(*at, row, pl.ds(here, RANKS))]).astype(jnp.float32)
            place, alive = first + here + rank, here + rank < count
            t = jnp.float32(0)
            for part in range(parts):
                index = (jnp.int32(part), item, rows + place)
                t += plgpu.load(ref["products"].at[index], mask=alive, other=0.0)
            return y + jnp.sum(t[:, None, :] * u[None, :, :], axis=2)

        y = lax.fori_loop(0, lax.div(count + (RANKS - 1), jnp.int32(RANKS)), some, y)
    plgpu.store(ref["out"].at[:, row], y.astype(ref["out"].dtype))


def _several_rows(*refs, names: tuple[str, ...], parts: int, rows: int):
    ref = named(names, refs)
    at = stack_index(ref)
    block, m = pl.program_id(0), ref["out"].shape[0]
    item = pl.program_id(1) * BATCH + lax.broadcasted_iota(jnp.int32, (BATCH, 1), 0)

    def summed(column, mask):
        """Of the parts, at columns of every item."""
        total = jnp.float32(0)
        shape = (BATCH, column.shape[1])
        at_item, at_column = jnp.broadcast_to(item, shape), jnp.broadcast_to(column, shape)
        for part in range(parts):
            index = (jnp.int32(part), at_item, at_column)
            total += plgpu.load(ref["products"].at[index], mask=mask & (at_item < m), other=0.0)
        return total

    row = block * ROW_UNIT + lax.broadcasted_iota(jnp.int32, (1, ROW_UNIT), 1)
    y = summed(row, True)
    if "u" in ref:
        count, first = (plgpu.load(ref["ranges"].at[(*at, block, jnp.int32(i))]) for i in (1, 2))
        own = pl.ds(block * ROW_UNIT, ROW_UNIT)
        rank = lax.broadcasted_iota(jnp.int32, (1, RANKS), 1)

        def some(i, y):
            here = i * RANKS
            u = plgpu.load(ref["u"].at[(*at, own, pl.ds(here, RANKS))]).astype(jnp.float32)
            t = summed(rows + first + here + rank, here + rank < count)
            return y + plgpu.dot(t, u.T, precision=lax.Precision.HIGHEST)

        y = lax.fori_loop(0, lax.div(count + (RANKS - 1), jnp.int32(RANKS)), some, y)
    index = (jnp.broadcast_to(item, y.shape), jnp.broadcast_to(row, y.shape))
    plgpu.store(ref["out"].at[index], y.astype(ref["out"].dtype), mask=index[0] < m)


def finish(
    products: Float[Array, "parts m columns"],
    weight: TritonWeight,
    dtype: DTypeLike,
    *,
    layer: jax.Array | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """y = Σ parts + U (diag(scale) V x) in `dtype`, for the weight's padded rows.

    Args:
        products: what a kernel's `partial_products` returned.
        weight: laid out, or a stack of them with `layer`.
        dtype: of the result.
        layer: index into the stack, int32.
        interpret: run in interpret mode.
    """
    parts, m, _ = products.shape
    batch = 1 if m == 1 else BATCH
    fields = ("u", "ranges")
    operands = {"products": products}
    operands |= weight_operands(weight, fields, None if weight.v is None else layer)
    body = partial(
        _one_row if m == 1 else _several_rows, names=tuple(operands), parts=parts, rows=weight.padded_rows
    )
    return pl.pallas_call(
        body,
        grid=(weight.padded_rows // ROW_UNIT, ceil_div(m, batch)),
        out_shape=jax.ShapeDtypeStruct((m, weight.padded_rows), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4 if batch > 1 else 2, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(*operands.values())
