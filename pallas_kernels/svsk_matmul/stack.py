"""Weights of one shape as one with a leading axis on every leaf, whatever ranks and groups each has."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.svsk_matmul.layout import ceil_div, pack_int6, tile_spans, unpack_int6
from pallas_kernels.svsk_matmul.reference import stored_tiles
from pallas_kernels.svsk_matmul.types import Sidecar, SVSKWeight

RANK_UNIT = 8
"""Ranks of a stack are rounded up to a multiple, so that few programs serve many stacks."""

Span = tuple[int, int]
Form = tuple[int, tuple[int, int] | None, int]
"""Group, tile of the sidecar (None without one) and the rank of each of its tiles."""


def common_form(weights: Sequence[SVSKWeight]) -> Form:
    """The form in which all of these can be stored exactly: the smallest group; the tile that all have, or
    one tile for the whole matrix where they differ; the largest rank, rounded up to a multiple of 8. Looks at
    no values.

    Raises:
        ValueError: weights of different shapes, codebooks or kinds of scales.
    """
    kinds = {(weight.shape, weight.codebook, weight.scale_kind) for weight in weights}
    if len(kinds) != 1:
        raise ValueError(f"stack: expected weights of one shape, codebook and kind of scales, got {kinds}")
    sidecars = [weight.sidecar for weight in weights if weight.sidecar is not None]
    group = min(weight.group for weight in weights)
    if not sidecars:
        return group, None, 0
    tiles = {sidecar.tile for sidecar in sidecars}
    if len(tiles) == 1:
        tile, rank = tiles.pop(), max(max(map(max, sidecar.ranks)) for sidecar in sidecars)
    else:
        tile, rank = (0, 0), max(sum(map(sum, sidecar.ranks)) for sidecar in sidecars)
    return group, tile, RANK_UNIT * ceil_div(rank, RANK_UNIT)


def stack(weights: Sequence[SVSKWeight]) -> SVSKWeight:
    """The weights, exactly, in their `common_form`: leaves [len(weights), ...]. Made on the host, of
    concrete arrays."""
    group, tile, rank = common_form(weights)
    return jax.tree.map(
        lambda *leaves: jnp.asarray(np.stack(leaves)),
        *(_in_form(weight, group, tile, rank) for weight in weights),
    )


def _in_form(weight: SVSKWeight, group: int, tile: tuple[int, int] | None, rank: int) -> SVSKWeight:
    if weight.group != group:
        weight = dataclasses.replace(weight, scales=_finer_scales(weight, group), group=group)
    weight = jax.tree.map(np.asarray, weight)
    if tile is None:
        return weight
    return dataclasses.replace(weight, sidecar=_retiled(weight.sidecar, weight.shape, tile, rank))


def _finer_scales(weight: SVSKWeight, group: int) -> jax.Array:
    """Scales of smaller groups: each repeated."""
    k = weight.shape[1]
    times, count = weight.group // group, ceil_div(k, group)
    if weight.super_scales is None:
        return jnp.repeat(weight.scales, times, axis=-1)[..., :count]
    small = unpack_int6(weight.scales, ceil_div(k, weight.group))
    return pack_int6(jnp.repeat(small, times, axis=-1)[..., :count])


def _retiled(sidecar: Sidecar | None, shape: tuple[int, int], tile: tuple[int, int], rank: int) -> Sidecar:
    """The sidecar in tiles of which each has `rank` ranks, those that it lacks being zero."""
    row_spans, column_spans = tile_spans(shape[0], tile[0]), tile_spans(shape[1], tile[1])
    us, vs, scales = [], [], []
    for rows in row_spans:
        tiles = [_tile(sidecar, rows, columns, rank) for columns in column_spans]
        us.append(np.concatenate([u for u, _, _ in tiles], axis=1).reshape(-1))
        vs += [v.reshape(-1) for _, v, _ in tiles]
        scales += [scale for _, _, scale in tiles]
    return Sidecar(
        u=np.concatenate(us),
        v=np.concatenate(vs),
        scale=np.concatenate(scales),
        shape=shape,
        tile=tile,
        ranks=((rank,) * len(column_spans),) * len(row_spans),
    )


def _tile(
    sidecar: Sidecar | None, rows: Span, columns: Span, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, V and scales of one tile, from the stored ones that lie within it."""
    u = np.zeros((rows[1] - rows[0], rank), np.int8)
    v = np.zeros((rank, columns[1] - columns[0]), np.int8)
    scale = np.zeros(rank, np.float16)
    at = 0
    for own_rows, own_columns, own_u, own_v, own_scale in _parts(sidecar):
        if _within(own_rows, rows) and _within(own_columns, columns):
            ranks = slice(at, at + len(own_scale))
            u[own_rows[0] - rows[0] : own_rows[1] - rows[0], ranks] = own_u
            v[ranks, own_columns[0] - columns[0] : own_columns[1] - columns[0]] = own_v
            scale[ranks] = own_scale
            at += len(own_scale)
    return u, v, scale


def _parts(
    sidecar: Sidecar | None,
) -> Iterator[tuple[Span, Span, np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, columns, U, V, scales) of each stored tile."""
    if sidecar is None:
        return
    for rows, (u, scale, vs) in zip(sidecar.row_spans, stored_tiles(sidecar), strict=True):
        at = 0
        for columns, v in zip(sidecar.column_spans, vs, strict=True):
            ranks = slice(at, at + len(v))
            yield rows, columns, u[:, ranks], v, scale[ranks]
            at += len(v)


def _within(inner: Span, outer: Span) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
