"""y = x Ŵᵀ by the Triton kernels."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul import triton_decode, triton_epilogue, triton_rows
from pallas_kernels.svsk_matmul.layout import expand_groups, pad_axis
from pallas_kernels.svsk_matmul.triton_layout import PLANE, ROW_UNIT, STEP, SUPERBLOCK, TritonWeight, padded
from pallas_kernels.svsk_matmul.tuning import FUSED_LIMIT, Blocks, heuristic

DTYPES = (jnp.bfloat16, jnp.float16)


def matmul(
    x: Float[Array, "*b k"],
    weight: TritonWeight,
    *,
    layer: jax.Array | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*b n"]:
    """y = x Ŵᵀ with f32 accumulation, in x's dtype; N counts the rows of all of the weight's parts.

    Each row of x is divided by a power of two so that it fits f16, levels times int6 scales are rounded to
    f16 (M > 16) or levels alone (M ≤ 16), and V x, group sums and scales are f32. From 384 rows on the weight
    is restored first.

    Args:
        x: bf16 or f16.
        weight: laid out, or with `layer` a stack of them, of which no copy is made.
        layer: index into the stack.
        blocks: configuration; default the heuristic's.
        interpret: run the kernels in interpret mode, on any device.

    Raises:
        NotImplementedError: x of another dtype.
        ValueError: blocks that do not divide the problem.
    """
    if x.dtype not in DTYPES:
        raise NotImplementedError(f"svsk_matmul: the Triton kernels take x in bf16 or f16, got {x.dtype}")
    *lead, k = x.shape
    m = 1
    for size in lead:
        m *= size
    if m == 0:
        return jnp.zeros((*lead, weight.shape[0]), x.dtype)
    flat = x.reshape(m, k)
    if m >= FUSED_LIMIT and blocks is None:
        one = weight if layer is None else jax.tree.map(lambda leaf: leaf[layer], weight)
        dense = restore(one).astype(x.dtype)
        y = jnp.matmul(flat, dense.T, preferred_element_type=jnp.float32).astype(x.dtype)
        return y.reshape(*lead, -1)
    chosen = heuristic(weight, m) if blocks is None else blocks
    small, unit = _to_f16(flat)
    small = pad_axis(pad_axis(small, 1, SUPERBLOCK), 0, chosen.batch)
    unit = jnp.pad(unit, (0, len(small) - m))
    chosen.check(weight, len(small))
    kernel = triton_decode if chosen.batch == 1 else triton_rows
    products = kernel.partial_products(small, weight, chosen, layer=layer, interpret=interpret)
    y = triton_epilogue.finish(products, unit, weight, x.dtype, layer=layer, interpret=interpret)[:m]
    return without_padding(y, weight.rows).reshape(*lead, -1)


def without_padding(y: Float[Array, "*b padded"], rows: tuple[int, ...]) -> Float[Array, "*b n"]:
    """The columns of y that belong to a row of the weights."""
    if all(padded(n) == n for n in rows):
        return y
    parts, start = [], 0
    for n in rows:
        parts.append(y[..., start : start + n])
        start += padded(n)
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _to_f16(x: Float[Array, "m k"]) -> tuple[Float[Array, "m k"], Float[Array, "m"]]:
    """x divided by a power of two for each row, f16, and these, f32; f16 stays as it is."""
    if x.dtype == jnp.float16:
        return x, jnp.ones(x.shape[0], jnp.float32)
    wide = x.astype(jnp.float32)
    largest = lax.bitcast_convert_type(jnp.max(jnp.abs(wide), axis=1), jnp.int32)
    # The largest element becomes 256 to 512.
    exponent = jnp.maximum((largest & 0x7F800000) - (8 << 23), 1 << 23)
    unit = lax.bitcast_convert_type(exponent, jnp.float32)
    return (wide / unit[:, None]).astype(jnp.float16), unit


def restore(weight: TritonWeight) -> Float[Array, "n k"]:
    """Ŵ of all parts, f32, computed by XLA from the laid-out form in the reference's order of operations."""
    n, blocks, half = weight.padded_rows, weight.superblocks, weight.scales.shape[-1] // 2
    words = lax.bitcast_convert_type(weight.words, jnp.uint16).reshape(n, blocks, 1, PLANE)
    shifts = jnp.asarray([0, 4, 8, 12], jnp.uint16)[:, None]
    codes = ((words >> shifts) & 15).astype(jnp.float32).reshape(n, blocks * SUPERBLOCK)
    # [b, n, j // 2, q, j % 2] → [n, b, j, q]
    scales = weight.scales.reshape(blocks, n, 2, half // 2, 2).transpose(1, 0, 2, 4, 3).astype(jnp.float32)
    if weight.super_scales is not None:
        scales = scales * weight.super_scales.T.astype(jnp.float32)[:, :, None, None, None]
    scales = expand_groups(scales.reshape(n, -1), weight.group, blocks * SUPERBLOCK)
    dense = scales * _levels(codes, weight)
    if weight.v is not None:
        dense = dense + _restore_sidecar(weight)
    return without_padding(dense.T, weight.rows).T[:, : weight.columns]


def _levels(codes: Float[Array, "n k"], weight: TritonWeight) -> Float[Array, "n k"]:
    if not weight.companded:
        return codes - 8.0
    rho, shift, factor, _ = jnp.repeat(weight.constants, ROW_UNIT, axis=0).T[:, :, None]
    a, delta = STEP * STEP / rho, -shift * factor
    t = codes - 7.5
    return t + a * t * t * t - delta


def _restore_sidecar(weight: TritonWeight) -> Float[Array, "n k"]:
    halves = lax.bitcast_convert_type(weight.v, jnp.uint16).reshape(-1, weight.superblocks, 2, 1, PLANE)
    byte = (halves >> jnp.asarray([0, 8], jnp.uint16)[:, None]) & 255
    v = byte.astype(jnp.float32).reshape(len(halves), -1) - 128.0
    return jnp.matmul(_dense_u(weight), v, precision=lax.Precision.HIGHEST)


def _dense_u(weight: TritonWeight) -> Float[Array, "n r"]:
    """U diag(scale) over all rows of V, f32."""
    first, count, begin = (jnp.repeat(column, ROW_UNIT) for column in weight.ranges.T)
    row = jnp.arange(weight.padded_rows) % ROW_UNIT
    column = jnp.arange(weight.v.shape[0]) - first[:, None]
    alive = (column >= 0) & (column < count[:, None])
    index = jnp.where(alive, (begin + row * count)[:, None] + column, 0)
    return jnp.where(alive, weight.u[index].astype(jnp.float32), 0.0) * weight.v_scale
