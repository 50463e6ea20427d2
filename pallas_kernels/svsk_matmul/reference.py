"""The XLA implementation: the definition of the answer, and what runs where no kernel does."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.svsk_matmul.layout import expand_groups, levels, pad_axis, unpack_codes, unpack_int6
from pallas_kernels.svsk_matmul.types import (
    INT8_GROUP,
    SIDECAR_UNIT,
    Int8Weight,
    Leaf,
    PackedWeight,
    Sidecar,
    SVSKWeight,
    row_leaves,
)

Factors = Sequence[Sequence[tuple[Float[Array, "_ _"], Float[Array, "_ _"]]]]
"""U [rows, rank] and V [rank, columns] of each tile, by row tile, then column tile."""


def group_scales(weight: SVSKWeight) -> Float[Array, "n g"]:
    """Scale of each group, f32 [N, ⌈K / g⌉]: the stored f16, or super-scale times int6."""
    if weight.super_scales is None:
        return weight.scales.astype(jnp.float32)
    groups = -(-weight.shape[1] // weight.group)
    small = unpack_int6(weight.scales, groups).astype(jnp.float32)
    return small * expand_groups(weight.super_scales.astype(jnp.float32), 256 // weight.group, groups)


def dequantize_base(weight: SVSKWeight) -> Float[Array, "n k"]:
    """scale · level(code) in f32, without the sidecar."""
    codes = unpack_codes(weight.codes, weight.shape[1])
    return expand_groups(group_scales(weight), weight.group, weight.shape[1]) * levels(
        codes, weight.coefficients
    )


def stored_tiles(sidecar: Sidecar) -> Iterator[tuple[Leaf, Leaf, list[Leaf]]]:
    """For each row tile, as stored: U int8 [rows, Σ ranks], the scales f16 [Σ ranks], and V int8
    [rank, columns] of each column tile."""
    u_at = v_at = s_at = 0
    for (row_start, row_stop), ranks in zip(sidecar.row_spans, sidecar.ranks, strict=True):
        height, total = row_stop - row_start, sum(ranks)
        vs = []
        for (start, stop), rank in zip(sidecar.column_spans, ranks, strict=True):
            size = rank * (stop - start)
            vs.append(sidecar.v[v_at : v_at + size].reshape(rank, stop - start))
            v_at += size
        u = sidecar.u[u_at : u_at + height * total].reshape(height, total)
        yield u, sidecar.scale[s_at : s_at + total], vs
        u_at, s_at = u_at + height * total, s_at + total


def sidecar_factors(sidecar: Sidecar) -> Factors:
    """U diag(scale / 2¹⁴) and V of each tile, f32."""
    rows = []
    for stored, scale, vs in stored_tiles(sidecar):
        u, column = stored.astype(jnp.float32) * (scale.astype(jnp.float32) * SIDECAR_UNIT), 0
        tiles = []
        for v in vs:
            tiles.append((u[:, column : column + len(v)], v.astype(jnp.float32)))
            column += len(v)
        rows.append(tiles)
    return rows


def dequantize_sidecar(sidecar: Sidecar) -> Float[Array, "n k"]:
    """The correction S as a dense f32 [N, K] matrix."""
    if len({rank for row in sidecar.ranks for rank in row}) == 1:
        return _equal_rank_sidecar(sidecar)
    return multiply_factors(sidecar_factors(sidecar))


def multiply_factors(factors: Factors) -> Float[Array, "n k"]:
    """The dense matrix of tiles U V, f32."""
    rows = [jnp.concatenate([_product(u, v) for u, v in row], axis=1) for row in factors]
    return jnp.concatenate(rows, axis=0)


def _product(u: Float[Array, "*b m r"], v: Float[Array, "*b r c"]) -> Float[Array, "*b m c"]:
    return jnp.matmul(u, v, precision=jax.lax.Precision.HIGHEST)


def _equal_rank_sidecar(sidecar: Sidecar) -> Float[Array, "n k"]:
    """All row tiles at once; only the column tiles, of which there are few, are unrolled."""
    n, k = sidecar.shape
    row_tiles, column_tiles = len(sidecar.row_spans), len(sidecar.column_spans)
    rank = sidecar.ranks[0][0]
    if rank == 0:
        return jnp.zeros((n, k), jnp.float32)
    height = sidecar.row_spans[0][1]
    u = pad_axis(sidecar.u.reshape(n, column_tiles * rank), 0, height).astype(jnp.float32)
    scale = (sidecar.scale.astype(jnp.float32) * SIDECAR_UNIT).reshape(row_tiles, 1, column_tiles * rank)
    u = u.reshape(row_tiles, height, column_tiles * rank) * scale
    v = sidecar.v.astype(jnp.float32).reshape(row_tiles, rank * k)
    tiles = []
    for j, (start, stop) in enumerate(sidecar.column_spans):
        block = v[:, rank * start : rank * stop].reshape(row_tiles, rank, stop - start)
        tiles.append(_product(u[:, :, j * rank : (j + 1) * rank], block))
    return jnp.concatenate(tiles, axis=2).reshape(row_tiles * height, k)[:n]


def dequantize(weight: PackedWeight, dtype: DTypeLike = jnp.float32) -> Float[Array, "n k"]:
    """The dense restore Ŵ [N, K], computed in f32 and rounded once to `dtype`."""
    if isinstance(weight, Int8Weight):
        scales = expand_groups(weight.scales.astype(jnp.float32), INT8_GROUP, weight.shape[1])
        return (weight.values.astype(jnp.float32) * scales).astype(dtype)
    dense = dequantize_base(weight)
    if weight.sidecar is not None:
        dense = dense + dequantize_sidecar(weight.sidecar)
    return dense.astype(dtype)


def take_rows(weight: PackedWeight, rows: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b k"]:
    """Rows of Ŵ by index (an embedding look-up), in `dtype`; of a weight without a sidecar."""
    flat = rows.reshape(-1)
    taken = {name: leaf[flat] for name, leaf in row_leaves(weight).items()}
    found = dataclasses.replace(weight, shape=(len(flat), weight.shape[1]), **taken)
    return dequantize(found, dtype).reshape(*rows.shape, -1)


def matmul(x: Float[Array, "*b k"], weight: PackedWeight) -> Float[Array, "*b n"]:
    """y = x Ŵᵀ with Ŵ rounded to x's dtype and f32 accumulation, returned in x's dtype."""
    dense = dequantize(weight, x.dtype)
    return jnp.matmul(x, dense.T, preferred_element_type=jnp.float32).astype(x.dtype)
