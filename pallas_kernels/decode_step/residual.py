"""The Triton kernel that adds a product to the residual stream and prepares the next product's x."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.decode_step.exchange import LARGEST, Boxes, over_devices
from pallas_kernels.decode_step.launch import launch
from pallas_kernels.decode_step.product import (
    PLANES,
    WIDTH,
    Product,
    biased,
    finishing,
    plane_columns,
    starts,
)
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE
from pallas_kernels.svsk_matmul.triton_operands import Refs, abstract
from pallas_kernels.svsk_matmul.triton_prepare import RUN, Prepared, abstract_prepared, store_superblock

NAME = "svsk_residual"
WARPS = 8
"""Of a program: a column has a thread, and a number that goes to other devices too."""


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
    finish, total = None, None
    if product is not None:
        rows = [starts(superblock * WIDTH, PLANES, PLANE)]
        finish = finishing(ref, product, item, rows, PLANE, threads=32 * WARPS)
    if "turn" in ref:
        total = over_devices(ref, item * (ref["squares"].shape[1] * WIDTH) + column)
    x = plgpu.load(ref["x"].at[item, column], mask=inside, other=0).astype(jnp.float32)
    scale = plgpu.load(ref["scale"].at[column], mask=inside, other=0).astype(jnp.float32)
    if finish is not None:
        [y] = finish()
        y = y if total is None else total(y)
        x = jnp.where(inside, x + biased(ref, y, column, inside), 0.0)
    elif total is not None:
        x = total(x)
    scaled = jnp.where(row < tokens, x * scale, 0.0)
    store_superblock(ref["values"], ref["unit"], row, superblock, scaled)

    @pl.when(row < tokens)
    def _():
        plgpu.store(ref["out"].at[item, column], x, mask=inside)
        plgpu.store(ref["squares"].at[item, superblock], jnp.sum(x * x))


def why_no_exchange(m: int, d: int) -> str | None:
    """Why kernels can't add up m rows of d columns over devices, or None if they can."""
    numbers = m * ceil_div(d, WIDTH) * WIDTH
    return None if numbers <= LARGEST else f"{numbers} numbers are more than {LARGEST}"


@partial(jax.jit, static_argnames=("rows", "run", "interpret"))
def finish_residual(
    x: Float[Array, "m d"],
    product: Product | None,
    scale: Float[Array, "d"],
    *,
    rows: int | None = None,
    run: int = RUN,
    boxes: Boxes | None = None,
    interpret: bool = False,
) -> tuple[Residual, Boxes | None]:
    """The residual stream x + y, with what a product of its RMSNorm reads, and the boxes for the next sum of
    any program.

    Args:
        x: f32, or embeddings of any float dtype.
        product: y, or None for zero.
        scale: of the RMSNorm.
        rows: of `Residual.scaled`; default m. More are filled with zeros.
        run: columns of it that lie together, as the kernel of the next product takes them.
        boxes: of this device, which holds one of the parts that make up y, or x where y is None; None: it
            holds all of it.
        interpret: run in interpret mode, which knows no assembly: without boxes.

    Raises:
        ValueError: with boxes, more numbers than `exchange.LARGEST`.
    """
    m, d = x.shape
    superblocks = ceil_div(d, WIDTH)
    if boxes is not None and (reason := why_no_exchange(m, d)) is not None:
        raise ValueError(f"residual stream: {reason}; add up with jax.lax.psum")
    operands = {"x": x, "scale": scale, **({} if product is None else product.operands)}
    operands |= {} if boxes is None else boxes.operands
    rows = m if rows is None else rows
    shapes = {
        "out": jax.ShapeDtypeStruct((m, d), jnp.float32),
        "squares": jax.ShapeDtypeStruct((m, superblocks), jnp.float32),
        **abstract_prepared(rows, superblocks, run)._asdict(),
        **({"next": jax.ShapeDtypeStruct((1,), jnp.int32)} if boxes is not None else {}),
    }
    out, squares, values, unit, *turn = launch(
        partial(_work, product=None if product is None else abstract(product)),
        NAME,
        operands,
        shapes,
        programs=superblocks,
        rows=rows,
        warps=WARPS,
        interpret=interpret,
    )
    stream = Residual(x=out, squares=squares, scaled=Prepared(values, unit))
    return stream, None if boxes is None else boxes.after(turn[0])
