"""Products on a CPU: weights laid out column by column, so that XLA's loops run along N in vector registers
and no more than one superblock of 256 columns is ever dense."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP, ceil_div, pad_axis, unpack_codes, unpack_int6
from pallas_kernels.svsk_matmul.reference import stored_tiles
from pallas_kernels.svsk_matmul.types import INT8_GROUP, SIDECAR_UNIT, Int8Weight, Leaf, Sidecar, SVSKWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransposedWeight:
    """An SVSKWeight for products on a CPU, with K padded to B superblocks of 256 columns of C groups of g.

    - `codes`: uint8 [B, C, g / 2, N]: columns 2j and 2j + 1 of a group, low nibble first.
    - `scales`: [B, C, N], int8 with `super_scales` f32 [B, N], or f32 without.
    - `coefficients`: f32 [2] = (a, δ), or None for the linear codebook.
    - `u`: int8 [T, H, R], `v`: int8 [T R, K], `scale`: f32 [T, R]: U, V and scales / 2¹⁴ of T tiles of H
      rows, ranks padded to the largest; None without any sidecar.
    """

    codes: Leaf
    scales: Leaf
    super_scales: Leaf
    coefficients: Leaf
    u: Leaf
    v: Leaf
    scale: Leaf
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransposedInt8Weight:
    """An Int8Weight for products on a CPU: `values` int8 [G, 64, N], `scales` f32 [G, N]."""

    values: Leaf
    scales: Leaf
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})


def transpose(weight: SVSKWeight) -> TransposedWeight:
    """The weight, exactly, column by column. It compiles what needs it, by shape."""
    codes, scales, supers = _transpose_base(dataclasses.replace(weight, sidecar=None))
    u, v, scale = (None, None, None) if weight.sidecar is None else _tiles(weight.sidecar)
    return TransposedWeight(
        codes=codes,
        scales=scales,
        super_scales=supers,
        coefficients=None if weight.coefficients is None else weight.coefficients.astype(jnp.float32),
        u=u,
        v=v,
        scale=scale,
        shape=weight.shape,
        group=weight.group,
    )


@jax.jit
def _transpose_base(weight: SVSKWeight) -> tuple[Leaf, Leaf, Leaf]:
    n, k = weight.shape
    group, per_block = weight.group, SUPER_GROUP // weight.group
    codes = pad_axis(unpack_codes(weight.codes, k), 1, SUPER_GROUP).T.reshape(-1, per_block, group // 2, 2, n)
    count = ceil_div(k, group)
    small = weight.scales if weight.super_scales is None else unpack_int6(weight.scales, count)
    small = pad_axis(small, 1, per_block).T.reshape(-1, per_block, n)
    codes = codes[..., 0, :] | codes[..., 1, :] << 4
    if weight.super_scales is None:
        return codes, small.astype(jnp.float32), None
    return codes, small, weight.super_scales.astype(jnp.float32).T


def transpose_int8(weight: Int8Weight) -> TransposedInt8Weight:
    """The matrix, exactly, column by column."""
    values = pad_axis(weight.values, 1, INT8_GROUP).T.reshape(-1, INT8_GROUP, weight.shape[0])
    return TransposedInt8Weight(values=values, scales=weight.scales.astype(jnp.float32).T, shape=weight.shape)


def _tiles(sidecar: Sidecar) -> tuple[Leaf, Leaf, Leaf]:
    """Factors of row tiles, of equal shapes. Concrete ones are cut on the host: every layer has ranks of its
    own."""
    most, height, k = max(map(sum, sidecar.ranks)), sidecar.row_spans[0][1], sidecar.shape[1]
    if not most:
        return None, None, None
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(sidecar))
    xp = jnp if traced else np
    us, vs, scales = [], [], []
    for u, scale, tiles in stored_tiles(sidecar if traced else jax.tree.map(np.asarray, sidecar)):
        rows, rank = u.shape
        us.append(xp.pad(u, ((0, height - rows), (0, most - rank))))
        scales.append(xp.pad(scale, (0, most - rank)))
        for (left, right), v in zip(sidecar.column_spans, tiles, strict=True):
            vs.append(xp.pad(v, ((0, 0), (left, k - right))))
        vs.append(xp.zeros((most - rank, k), np.int8))
    u, v, scale = jnp.asarray(xp.stack(us)), jnp.asarray(xp.concatenate(vs)), jnp.asarray(xp.stack(scales))
    return u, v, scale.astype(jnp.float32) * SIDECAR_UNIT


def take_rows(
    weight: TransposedWeight | TransposedInt8Weight, rows: Int[Array, "*b"], dtype: DTypeLike
) -> Float[Array, "*b k"]:
    """Rows of Ŵ by index (an embedding look-up), in `dtype`; of a weight without a sidecar."""
    flat = rows.reshape(-1)
    if isinstance(weight, TransposedInt8Weight):
        found = weight.values[..., flat].astype(jnp.float32) * weight.scales[:, None, flat]
    else:
        scales = weight.scales[..., flat].astype(jnp.float32)
        if weight.super_scales is not None:
            scales *= weight.super_scales[:, None, flat]
        found = _levels(weight.codes[..., flat], weight.coefficients) * scales[:, :, None, None]
    found = found.reshape(-1, len(flat)).T[:, : weight.shape[1]]
    return found.reshape(*rows.shape, -1).astype(dtype)


def matmul(x: Float[Array, "*b k"], weight: TransposedWeight | TransposedInt8Weight) -> Float[Array, "*b n"]:
    """y = x Ŵᵀ in f32, returned in x's dtype: superblock by superblock, and for one row of x without ever
    writing a restored weight to memory."""
    *lead, k = x.shape
    m = math.prod(lead)
    if m == 0:
        return jnp.zeros((*lead, weight.shape[0]), x.dtype)
    flat = x.reshape(m, k).astype(jnp.float32)
    if isinstance(weight, TransposedInt8Weight):
        y = _int8(pad_axis(flat, 1, INT8_GROUP), weight)
    else:
        y = _base(pad_axis(flat, 1, SUPER_GROUP), weight)
        if weight.v is not None:
            t = (
                jnp.matmul(flat, weight.v.astype(jnp.float32).T).reshape(m, *weight.scale.shape)
                * weight.scale
            )
            y += jnp.einsum("mtr,thr->mth", t, weight.u.astype(jnp.float32)).reshape(m, -1)[:, : y.shape[1]]
    return y.astype(x.dtype).reshape(*lead, weight.shape[0])


def _base(x: Float[Array, "m k"], weight: TransposedWeight) -> Float[Array, "m n"]:
    m, n, group = len(x), weight.shape[0], weight.group
    level = _level(weight.coefficients)

    def superblock(y: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        codes, scales, columns, supers = block

        def one_group(y: jax.Array, inner: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            codes, scale, columns = inner
            total = jnp.zeros(n, jnp.float32)
            for j in range(group // 2):
                total += level(codes[j] & 15) * columns[2 * j] + level(codes[j] >> 4) * columns[2 * j + 1]
            return y + total * (scale.astype(jnp.float32) * supers), None

        def dense() -> jax.Array:
            by_group = (scales.astype(jnp.float32) * supers)[:, None, None, :]
            scaled = _levels(codes, weight.coefficients) * by_group
            return jnp.matmul(columns, scaled.reshape(SUPER_GROUP, n))

        if m > 1:
            return y + dense(), None
        return lax.scan(one_group, y, (codes, scales, columns.reshape(-1, group)))

    blocks = x.reshape(m, -1, SUPER_GROUP).swapaxes(0, 1)
    supers = weight.super_scales
    if supers is None:
        supers = jnp.ones((len(blocks), 1), jnp.float32)
    start = jnp.zeros((m, n) if m > 1 else n, jnp.float32)
    y, _ = lax.scan(superblock, start, (weight.codes, weight.scales, blocks, supers))
    return y.reshape(m, n)


def _int8(x: Float[Array, "m k"], weight: TransposedInt8Weight) -> Float[Array, "m n"]:
    m, n = len(x), weight.shape[0]

    def one_group(y: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        values, scales, columns = block
        if m > 1:
            return y + jnp.matmul(columns, values.astype(jnp.float32)) * scales, None
        total = jnp.zeros(n, jnp.float32)
        for j in range(INT8_GROUP):
            total += values[j].astype(jnp.float32) * columns[0, j]
        return y + total * scales, None

    blocks = x.reshape(m, -1, INT8_GROUP).swapaxes(0, 1)
    start = jnp.zeros((m, n) if m > 1 else n, jnp.float32)
    y, _ = lax.scan(one_group, start, (weight.values, weight.scales, blocks))
    return y.reshape(m, n)


def _levels(
    codes: UInt8[Array, "*lead pairs n"], coefficients: jax.Array | None
) -> Float[Array, "*lead pairs 2 n"]:
    """Of the codes of columns 2j and 2j + 1."""
    level = _level(coefficients)
    return jnp.stack([level(codes & 15), level(codes >> 4)], axis=-2)


def _level(coefficients: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
    if coefficients is None:
        return lambda code: code.astype(jnp.float32) - 8.0
    a, delta = coefficients

    def companded(code: jax.Array) -> jax.Array:
        t = code.astype(jnp.float32) - 7.5
        return t * (1.0 + a * (t * t)) - delta

    return companded
