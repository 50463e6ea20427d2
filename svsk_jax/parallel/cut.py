"""A matrix cut into equal parts of its rows or columns, each a matrix of the same kind."""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP
from pallas_kernels.svsk_matmul.reference import stored_tiles
from pallas_kernels.svsk_matmul.types import (
    INT8_GROUP,
    Int8Weight,
    PackedWeight,
    Sidecar,
    SVSKWeight,
    row_leaves,
)

Matrix = TypeVar("Matrix", bound=Any)
SMALLEST_TILE = 64
"""Rows of a sidecar's tile below which a cut through tiles repeats too much of V."""


def why_not_cut(weight: Any, parts: int, axis: int) -> str | None:
    """Why `cut` can't make so many parts, or None if it can."""
    size, what = weight.shape[axis], ("rows", "columns")[axis]
    if size % parts:
        return f"{size} {what} do not divide by {parts}"
    if axis == 1 and (size // parts) % (unit := _column_unit(weight)):
        return f"{size // parts} of {size} columns are not whole groups of {unit}"
    if axis == 0 and isinstance(weight, SVSKWeight) and weight.sidecar is not None:
        rows, tile = size // parts, weight.sidecar.row_spans[0][1]
        if (common := math.gcd(rows, tile)) < min(rows, SMALLEST_TILE):
            return f"{rows} rows and the sidecar's tiles of {tile} have only blocks of {common} in common"
    return None


def cut(weight: Matrix, parts: int, axis: int) -> list[Matrix]:
    """Equal parts of a matrix [N, K] along `axis`, in order: one above the other (0) or side by side (1),
    their dense restores are that of the whole.

    A part of an SVSKWeight's rows has the sidecar tiles of its rows; where a tile is cut, each piece keeps
    all of V. A part of its columns has U and scales of the whole sidecar and its own columns of V, zero where
    they lie outside a column tile, so that U diag(scale) applies to the sum of the parts' V x as well as to
    each. Ranks of parts may differ (`alike`).

    Args:
        weight: dense, SVSKWeight or Int8Weight, on the host or a device.
        parts: how many.
        axis: 0 for rows (or the only axis), 1 for columns.

    Raises:
        ValueError: it does not divide, or not along its groups.
    """
    reason = why_not_cut(weight, parts, axis)
    if reason is not None:
        raise ValueError(reason)
    if parts == 1:
        return [weight]

    def shares(leaf: Any) -> list[Any]:
        size = leaf.shape[axis] // parts
        return [leaf[(slice(None),) * axis + (slice(i * size, (i + 1) * size),)] for i in range(parts)]

    if not isinstance(weight, PackedWeight):
        return shares(weight)
    shape = tuple(size // parts if i == axis else size for i, size in enumerate(weight.shape))
    cuts: dict[str, list[Any]] = {name: shares(leaf) for name, leaf in row_leaves(weight).items()}
    if isinstance(weight, SVSKWeight) and weight.sidecar is not None:
        cuts["sidecar"] = (_rows_of if axis == 0 else _columns_of)(weight.sidecar, parts)
    made: list[Any] = [
        dataclasses.replace(weight, shape=shape, **{name: each[i] for name, each in cuts.items()})
        for i in range(parts)
    ]
    return made


def alike(parts: list[Matrix]) -> list[Matrix]:
    """The parts of one matrix, their sidecars' ranks brought to the largest of each tile with zeros."""
    first = parts[0]
    if not isinstance(first, SVSKWeight) or first.sidecar is None:
        return parts
    of_each = [part.sidecar.ranks for part in parts]
    ranks = tuple(
        tuple(max(tiles) for tiles in zip(*rows, strict=True)) for rows in zip(*of_each, strict=True)
    )
    return [
        part
        if part.sidecar.ranks == ranks
        else dataclasses.replace(part, sidecar=_with_ranks(part.sidecar, ranks))
        for part in parts
    ]


def _column_unit(weight: Any) -> int:
    if isinstance(weight, SVSKWeight):
        return weight.group if weight.super_scales is None else SUPER_GROUP
    return INT8_GROUP if isinstance(weight, Int8Weight) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RowTile:
    """Of a sidecar: U int8 [rows, Σ ranks], scales f16 [Σ ranks], V int8 [rank, columns] of each column
    tile."""

    u: Any
    scale: Any
    vs: list[Any]


def _row_tiles(sidecar: Sidecar) -> list[_RowTile]:
    return [_RowTile(u=u, scale=scale, vs=vs) for u, scale, vs in stored_tiles(sidecar)]


def _sidecar(tiles: list[_RowTile], shape: tuple[int, int], tile: tuple[int, int]) -> Sidecar:
    xp = _numpy_of(tiles[0].u)
    return Sidecar(
        u=xp.concatenate([each.u.reshape(-1) for each in tiles]),
        v=xp.concatenate([v.reshape(-1) for each in tiles for v in each.vs]),
        scale=xp.concatenate([each.scale for each in tiles]),
        shape=shape,
        tile=tile,
        ranks=tuple(tuple(len(v) for v in each.vs) for each in tiles),
    )


def _rows_of(sidecar: Sidecar, parts: int) -> list[Sidecar]:
    (n, k), tile = sidecar.shape, sidecar.row_spans[0][1]
    rows = n // parts
    unit = math.gcd(rows, tile)
    whole = _row_tiles(sidecar)
    pieces = [
        dataclasses.replace(whole[top // tile], u=whole[top // tile].u[top % tile : top % tile + unit])
        for top in range(0, n, unit)
    ]
    each = rows // unit
    return [
        _sidecar(pieces[i * each : (i + 1) * each], (rows, k), (unit, sidecar.tile[1])) for i in range(parts)
    ]


def _columns_of(sidecar: Sidecar, parts: int) -> list[Sidecar]:
    n, k = sidecar.shape
    width = k // parts
    shards: list[list[_RowTile]] = [[] for _ in range(parts)]
    for tile in _row_tiles(sidecar):
        xp = _numpy_of(tile.u)
        v = xp.concatenate(
            [
                xp.pad(v, ((0, 0), (left, k - right)))
                for v, (left, right) in zip(tile.vs, sidecar.column_spans, strict=True)
            ]
        )
        for i, shard in enumerate(shards):
            shard.append(dataclasses.replace(tile, vs=[v[:, i * width : (i + 1) * width]]))
    return [_sidecar(shard, (n, width), (sidecar.tile[0], 0)) for shard in shards]


def _with_ranks(sidecar: Sidecar, ranks: tuple[tuple[int, ...], ...]) -> Sidecar:
    tiles = []
    for tile, wanted in zip(_row_tiles(sidecar), ranks, strict=True):
        xp = _numpy_of(tile.u)
        us, scales, vs, at = [], [], [], 0
        for v, rank in zip(tile.vs, wanted, strict=True):
            here, more = slice(at, at + len(v)), (0, rank - len(v))
            us.append(xp.pad(tile.u[:, here], ((0, 0), more)))
            scales.append(xp.pad(tile.scale[here], more))
            vs.append(xp.pad(v, (more, (0, 0))))
            at += len(v)
        tiles.append(_RowTile(u=xp.concatenate(us, axis=1), scale=xp.concatenate(scales), vs=vs))
    return _sidecar(tiles, sidecar.shape, sidecar.tile)


def _numpy_of(leaf: Any) -> Any:
    return jnp if isinstance(leaf, jax.Array) else np
