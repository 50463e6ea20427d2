"""The Triton kernel after a product: sums the parts of a split K, adds the sidecars' U (V x), and rounds."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.triton_layout import ROW_UNIT, TritonWeight

NAME = "svsk_epilogue"
RANKS = 16
"""Sidecar rows taken at a time."""


def _kernel(*refs, parts: int, batch: int, rows: int, sidecar: bool, stacked: bool):
    names = ["products", "unit"] + (["v_scale", "u", "ranges"] if sidecar else [])
    names += ["layer"] if sidecar and stacked else []
    ref = dict(zip([*names, "out"], refs, strict=True))
    at = (plgpu.load(ref["layer"].at[jnp.int32(0)]),) if "layer" in ref else ()
    block = pl.program_id(0)

    def summed(row):
        total = jnp.float32(0)
        for part in range(parts):
            total += plgpu.load(ref["products"].at[jnp.int32(part), slice(None), row])
        return total

    y = summed(pl.ds(block * ROW_UNIT, ROW_UNIT))
    if sidecar:
        first, count, begin = (plgpu.load(ref["ranges"].at[(*at, block, jnp.int32(i))]) for i in range(3))
        row = lax.broadcasted_iota(jnp.int32, (ROW_UNIT, RANKS), 0)
        column = lax.broadcasted_iota(jnp.int32, (ROW_UNIT, RANKS), 1)
        item = lax.broadcasted_iota(jnp.int32, (batch, RANKS), 0)
        rank = lax.broadcasted_iota(jnp.int32, (batch, RANKS), 1)

        def some(i, y):
            here = i * RANKS
            u = plgpu.load(
                ref["u"].at[(*at, begin + row * count + here + column)], mask=here + column < count, other=0
            )
            v_row = first + here + rank
            alive = here + rank < count
            t = jnp.float32(0)
            for part in range(parts):
                index = (jnp.int32(part), item, rows + v_row)
                t += plgpu.load(ref["products"].at[index], mask=alive, other=0.0)
            t = t * plgpu.load(ref["v_scale"].at[(*at, v_row)], mask=alive, other=0.0)
            return y + jnp.sum(t[:, None, :] * u.astype(jnp.float32)[None, :, :], axis=2)

        y = lax.fori_loop(0, lax.div(count + (RANKS - 1), jnp.int32(RANKS)), some, y)
    ref["out"][...] = (y * plgpu.load(ref["unit"])[:, None]).astype(ref["out"].dtype)


def finish(
    products: Float[Array, "parts m rows"],
    unit: Float[Array, "m"],
    weight: TritonWeight,
    dtype: DTypeLike,
    *,
    layer: jax.Array | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """y = unit · (Σ parts + U diag(scale) (V x)) in `dtype`, for the weight's padded rows.

    Args:
        products: what a kernel's `partial_products` returned; m a power of two, or a multiple of 16.
        unit: f32, the number each row of x was divided by.
        weight: laid out, or a stack of them with `layer`.
        dtype: of the result.
        layer: index into the stack, int32.
        interpret: run in interpret mode.
    """
    parts, m, width = products.shape
    batch = min(m, 16)
    sidecar = weight.v is not None
    operands = [products, unit]
    specs = [
        pl.BlockSpec((parts, batch, width), lambda i, j: (0, j, 0)),
        pl.BlockSpec((batch,), lambda i, j: (j,)),
    ]
    if sidecar:
        operands += [weight.v_scale, weight.u, weight.ranges]
        if layer is not None:
            operands.append(jnp.reshape(layer, (1,)).astype(jnp.int32))
        specs += [
            pl.BlockSpec(each.shape, partial(lambda n, *_: (0,) * n, each.ndim)) for each in operands[2:]
        ]
    body = partial(
        _kernel,
        parts=parts,
        batch=batch,
        rows=weight.padded_rows,
        sidecar=sidecar,
        stacked=layer is not None,
    )
    return pl.pallas_call(
        body,
        grid=(weight.padded_rows // ROW_UNIT, m // batch),
        in_specs=specs,
        out_specs=pl.BlockSpec((batch, ROW_UNIT), lambda i, j: (j, i)),
        out_shape=jax.ShapeDtypeStruct((m, weight.padded_rows), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4 if batch > 1 else 2, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(*operands)
