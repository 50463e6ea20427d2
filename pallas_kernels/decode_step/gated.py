"""The Triton kernel between the gate and up product and the down product."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_step.product import (
    PLANES,
    WIDTH,
    Product,
    abstract,
    biased,
    finished,
    inverse_rms,
    plane_columns,
    starts,
)
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE, padded
from pallas_kernels.svsk_matmul.triton_prepare import Prepared, abstract_prepared, store_superblock

NAME = "svsk_gated"
WARPS = 8


def _kernel(*refs, names: tuple[str, ...], product: Product, columns: int, eps: float, group: int | None):
    ref = dict(zip(names, refs, strict=True))
    superblock, item = pl.program_id(0), pl.program_id(1)
    width = product.weight.rows[0]
    column = plane_columns(superblock)
    inside = column < width
    norm = inverse_rms(ref["squares"], item, columns, eps)
    # Beyond the gate's padded rows lie the first of up; what is read of them is masked below.
    first = starts(superblock * WIDTH, PLANES, PLANE)
    gate = finished(ref, product, item, first, PLANE) * norm
    up = finished(ref, product, item, first + padded(width), PLANE) * norm
    gate, up = biased(ref, gate, column, inside), biased(ref, up, width + column, inside)
    hidden = jnp.where(inside, gate * up / (1 + jnp.exp(-gate)), 0.0)
    store_superblock(ref["values"], ref["unit"], item, superblock, hidden, group)


@partial(jax.jit, static_argnames=("columns", "eps", "group", "interpret"))
def finish_gated(
    product: Product,
    squares: jax.Array,
    *,
    columns: int,
    eps: float,
    group: int | None,
    interpret: bool = False,
) -> Prepared:
    """silu(gate) ⊙ up, as the next product reads it.

    Args:
        product: of gate and up, one above the other, with `Residual.scaled`.
        squares: `Residual.squares`.
        columns: d, of the residual stream.
        eps: of the RMSNorm.
        group: that a single row is spread for, or None.
        interpret: run in interpret mode.
    """
    m = squares.shape[0]
    superblocks = ceil_div(product.weight.rows[0], WIDTH)
    operands = {"squares": squares, **product.operands}
    shapes = abstract_prepared(m, superblocks, spread=group is not None)._asdict()
    values, unit = pl.pallas_call(
        partial(
            _kernel,
            names=(*operands, *shapes),
            product=abstract(product),
            columns=columns,
            eps=eps,
            group=group,
        ),
        grid=(superblocks, m),
        out_shape=list(shapes.values()),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(*operands.values())
    return Prepared(values, unit)
