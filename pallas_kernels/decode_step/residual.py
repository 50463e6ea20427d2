"""The Triton kernel that adds a product to the residual stream and prepares the next product's x."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.decode_step.launch import launch
from pallas_kernels.decode_step.product import (
    PLANES,
    WIDTH,
    Product,
    biased,
    finished,
    plane_columns,
    starts,
)
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE
from pallas_kernels.svsk_matmul.triton_operands import Refs, abstract
from pallas_kernels.svsk_matmul.triton_prepare import Prepared, abstract_prepared, store_superblock

NAME = "svsk_residual"
WARPS = 8


class Residual(NamedTuple):
    """The residual stream of m tokens between two layers."""

    x: jax.Array
    """f32 [m, d]."""
    squares: jax.Array
    """f32 [m, b]: the sum of x² over each 256 columns."""
    scaled: Prepared
    """x · scale of the RMSNorm that follows. The norm's other factor, a number for each token, multiplies
    what is made of it: W (x · scale) / rms = W norm(x)."""


def _work(ref: Refs, superblock: jax.Array, row: jax.Array, *, product: Product | None) -> None:
    tokens, columns = ref["x"].shape
    # Rows that only fill up the next product's batch are zero.
    item = jnp.minimum(row, tokens - 1)
    column = plane_columns(superblock)
    inside = column < columns
    x = plgpu.load(ref["x"].at[item, column], mask=inside, other=0).astype(jnp.float32)
    if product is not None:
        y = finished(ref, product, item, starts(superblock * WIDTH, PLANES, PLANE), PLANE)
        x = jnp.where(inside, x + biased(ref, y, column, inside), 0.0)
    scale = plgpu.load(ref["scale"].at[column], mask=inside, other=0).astype(jnp.float32)
    scaled = jnp.where(row < tokens, x * scale, 0.0)
    store_superblock(ref["values"], ref["unit"], row, superblock, scaled)

    @pl.when(row < tokens)
    def _():
        plgpu.store(ref["out"].at[item, column], x, mask=inside)
        plgpu.store(ref["squares"].at[item, superblock], jnp.sum(x * x))


@partial(jax.jit, static_argnames=("rows", "interpret"))
def finish_residual(
    x: Float[Array, "m d"],
    product: Product | None,
    scale: Float[Array, "d"],
    *,
    rows: int | None = None,
    interpret: bool = False,
) -> Residual:
    """The residual stream x + y, with what a product of its RMSNorm reads.

    Args:
        x: f32, or embeddings of any float dtype.
        product: y, or None for zero.
        scale: of the RMSNorm.
        rows: of `Residual.scaled`; default m. More are filled with zeros.
        interpret: run in interpret mode.
    """
    m, d = x.shape
    superblocks = ceil_div(d, WIDTH)
    operands = {"x": x, "scale": scale, **({} if product is None else product.operands)}
    rows = m if rows is None else rows
    shapes = {
        "out": jax.ShapeDtypeStruct((m, d), jnp.float32),
        "squares": jax.ShapeDtypeStruct((m, superblocks), jnp.float32),
        **abstract_prepared(rows, superblocks)._asdict(),
    }
    out, squares, values, unit = launch(
        partial(_work, product=None if product is None else abstract(product)),
        NAME,
        operands,
        shapes,
        programs=superblocks,
        rows=rows,
        warps=WARPS,
        interpret=interpret,
    )
    return Residual(x=out, squares=squares, scaled=Prepared(values, unit))
