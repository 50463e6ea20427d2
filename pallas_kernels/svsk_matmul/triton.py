"""y = x Ŵᵀ by the Triton kernels."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul import (
    triton_decode,
    triton_epilogue,
    triton_int8,
    triton_prepare,
    triton_restore,
    triton_rows,
)
from pallas_kernels.svsk_matmul.layout import ceil_div, pad_axis
from pallas_kernels.svsk_matmul.triton_int8 import TritonInt8Weight
from pallas_kernels.svsk_matmul.triton_layout import SUPERBLOCK, TritonWeight, padded
from pallas_kernels.svsk_matmul.tuning import FUSED_LIMIT, Blocks, batch_of, configuration

DTYPES = (jnp.bfloat16, jnp.float16)


@partial(jax.jit, static_argnames=("blocks", "interpret"))
def matmul(
    x: Float[Array, "*b k"],
    weight: TritonWeight | TritonInt8Weight,
    *,
    layer: jax.Array | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*b n"]:
    """y = x Ŵᵀ with f32 accumulation, in x's dtype; N counts the rows of all of the weight's parts.

    Compiled apart, so that tracing a model lowers the kernels of equal layers once.

    Each 256 columns of a row of x are divided by a power of two so that they fit f16, levels times int6
    scales are rounded to f16 (M > 16) or levels alone (M ≤ 16, flat scales), and V x, group sums and scales
    are f32. From 129 rows on the weight is restored first, to x's dtype.

    Args:
        x: bf16 or f16.
        weight: laid out, or with `layer` a stack of them (not of int8), of which no copy is made.
        layer: index into the stack.
        blocks: configuration; default the one tuned for this device, else the heuristic's.
        interpret: run the kernels in interpret mode, on any device.

    Raises:
        NotImplementedError: x of another dtype.
        ValueError: blocks that do not divide the problem.
    """
    if x.dtype not in DTYPES:
        raise NotImplementedError(f"svsk_matmul: the Triton kernels take x in bf16 or f16, got {x.dtype}")
    int8 = isinstance(weight, TritonInt8Weight)
    *lead, k = x.shape
    m = math.prod(lead)
    if m == 0:
        return jnp.zeros((*lead, weight.shape[0]), x.dtype)
    flat = x.reshape(m, k)
    if m >= FUSED_LIMIT and blocks is None:
        if int8:
            dense = triton_int8.take_rows(weight, jnp.arange(weight.shape[0]), x.dtype)
        else:
            dense = triton_restore.restore(weight, x.dtype, layer=layer, interpret=interpret)
            flat = pad_axis(flat, 1, SUPERBLOCK)
        # Sums are f32 whatever the result: a wider one would be written and read once more.
        y = jnp.matmul(flat, dense.T, preferred_element_type=x.dtype)
    elif int8:
        batch = max(8, batch_of(m))
        prepared = triton_prepare.prepare(flat, batch=batch, run=triton_int8.RUN, interpret=interpret)
        y = triton_int8.matmul(prepared, weight, x.dtype, batch=batch, interpret=interpret)[:m]
    else:
        chosen = configuration(weight, m) if blocks is None else blocks
        chosen.check(weight, chosen.batch * ceil_div(m, chosen.batch))
        prepared = triton_prepare.prepare(flat, batch=chosen.batch, interpret=interpret)
        kernel = triton_decode if chosen.batch == 1 else triton_rows
        products = kernel.partial_products(prepared, weight, chosen, layer=layer, interpret=interpret)
        y = triton_epilogue.finish(products, weight, x.dtype, layer=layer, interpret=interpret)[:m]
    rows = (weight.shape[0],) if int8 else weight.rows
    return without_padding(y, rows).reshape(*lead, -1)


def without_padding(y: Float[Array, "*b padded"], rows: tuple[int, ...]) -> Float[Array, "*b n"]:
    """The columns of y that belong to a row of the weights."""
    if y.shape[-1] == sum(rows):
        return y
    parts, start = [], 0
    for n in rows:
        parts.append(y[..., start : start + n])
        start += padded(n)
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
