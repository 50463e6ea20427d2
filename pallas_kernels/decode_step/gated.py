"""The Triton kernel between the gate and up product and the down product."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_step.launch import launch
from pallas_kernels.decode_step.product import (
    PLANES,
    WIDTH,
    Product,
    biased,
    finishing,
    inverse_rms,
    load_squares,
    plane_columns,
    starts,
)
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE, SUPERBLOCK, padded
from pallas_kernels.svsk_matmul.triton_operands import Refs, abstract
from pallas_kernels.svsk_matmul.triton_prepare import RUN, Prepared, abstract_prepared, store_superblock

NAME = "svsk_gated"
WARPS = 8
"""Of a program: a column has a thread."""


def _work(
    ref: Refs,
    superblock: jax.Array,
    item: jax.Array,
    *,
    product: Product,
    columns: int,
    eps: float,
) -> None:
    width = product.weight.rows[0]
    column = plane_columns(superblock)
    inside = column < width
    # Beyond the gate's padded rows lie the first of up: what is read of them is masked below.
    rows = [starts(first + superblock * WIDTH, PLANES, PLANE) for first in (0, padded(width))]
    finish = finishing(ref, product, item, rows, PLANE, threads=32 * WARPS)
    rows_of_each = product.parts.shape[1] // ref["squares"].shape[0]
    squares = load_squares(ref, lax.div(item, jnp.int32(rows_of_each)))
    norm = inverse_rms(squares, columns, eps)
    gate, up = (y * norm for y in finish())
    gate, up = biased(ref, gate, column, inside), biased(ref, up, width + column, inside)
    hidden = jnp.where(inside, gate * up / (1 + jnp.exp(-gate)), 0.0)
    store_superblock(ref["values"], ref["unit"], item, superblock, hidden)


@partial(jax.jit, static_argnames=("columns", "eps", "interpret"))
def finish_gated(
    product: Product,
    squares: jax.Array,
    *,
    columns: int,
    eps: float,
    interpret: bool = False,
) -> Prepared:
    """silu(gate) ⊙ up, as the next product reads it.

    Args:
        product: of gate and up, one above the other, with `Residual.scaled`; where its rows have matrices of
            their own, the result is in runs of 256 columns, for another such product.
        squares: `Residual.squares` of m tokens; the product has m rows, or c m, c for each token one after
            another.
        columns: d, of the residual stream.
        eps: of the RMSNorm.
        interpret: run in interpret mode.
    """
    rows = product.parts.shape[1]
    superblocks = ceil_div(product.weight.rows[0], WIDTH)
    operands = {"squares": squares, **product.operands}
    run = RUN if product.chosen is None else SUPERBLOCK
    shapes = abstract_prepared(rows, superblocks, run)._asdict()
    values, unit = launch(
        partial(_work, product=abstract(product), columns=columns, eps=eps),
        NAME,
        operands,
        shapes,
        programs=superblocks,
        rows=rows,
        warps=WARPS,
        interpret=interpret,
    )
    return Prepared(values, unit)
