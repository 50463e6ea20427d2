"""Sidecars of several weights gathered into what the Triton kernels read."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.types import SIDECAR_UNIT, Leaf, Sidecar

V_UNIT, U_UNIT = 64, 16
"""Rows of V are padded to a multiple of the first, ranks of U to a multiple of the second, so that the layers
of a model differ in few shapes and their kernels are compiled once."""
LARGEST_BLOCK = 128
"""Rows that a program takes at most of a weight with a sidecar, and of its V, over whose end it may run."""


class Gathered(NamedTuple):
    """What `TritonWeight` describes by these names, but V as int8 [R, columns]; by default of no sidecar."""

    v: Leaf = None
    v_scale: Leaf = None
    places: Leaf = None
    u: Leaf = None
    ranges: Leaf = None
    tile_units: int = 0


def gather_sidecars(
    sidecars: Sequence[Sidecar | None], rows: Sequence[int], columns: int, row_unit: int
) -> Gathered:
    """The sidecars, if one has a rank. Concrete factors are gathered on the host: every layer has ranks of
    its own, and a compiled gather would serve one layer.

    Args:
        sidecars: of each weight.
        rows: of each weight.
        columns: of V, padding included.
        row_unit: rows of a block; each weight is padded to whole ones.
    """
    present = [each for each in sidecars if each is not None and sum(map(sum, each.ranks))]
    if not present:
        return Gathered()
    sizes = np.cumsum([0, *(each.v.shape[0] for each in present)])
    u_sizes = np.cumsum([0, *(each.u.shape[0] for each in present)])
    v_index, u_index, ranges = [], [], []
    v_rows = at = 0
    for sidecar, n in zip(sidecars, rows, strict=True):
        blocks = ceil_div(n, row_unit)
        part = np.zeros((blocks, 3), np.int32)
        ranges.append(part)
        if sidecar is None or not sum(map(sum, sidecar.ranks)):
            u_index += [np.zeros((row_unit, 0), np.int64)] * blocks
            continue
        first, v_places = _v_places(sidecar, columns)
        v_index.append(np.where(v_places >= 0, v_places + sizes[at], sizes[-1]))
        for block, (low, high, places) in enumerate(_u_places(sidecar, first, row_unit)):
            u_index.append(np.where(places >= 0, places + u_sizes[at], u_sizes[-1]))
            part[block, :2] = v_rows + low, high - low
        v_rows += first[-1]
        at += 1
    ranged = np.concatenate(ranges)
    v_padded = V_UNIT * ceil_div(v_rows, V_UNIT)
    v_flat = np.pad(np.concatenate(v_index), ((0, v_padded - v_rows), (0, 0)), constant_values=sizes[-1])
    stride = U_UNIT * ceil_div(int(ranged[:, 1].max()), U_UNIT)
    u_flat = np.full((len(ranged), row_unit, stride), u_sizes[-1])
    for block, index in zip(u_flat, u_index, strict=True):
        block[:, : index.shape[1]] = index
    tile_units = _tile_units(sidecars, rows, row_unit)
    in_blocks = LARGEST_BLOCK * ceil_div(v_padded, LARGEST_BLOCK)
    places = _places(ranged, in_blocks, stride, tile_units)
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(present))
    xp = jnp if traced else np

    def gather(leaves: list[Leaf], index: np.ndarray) -> Leaf:
        zero = np.zeros(1, np.int8)
        return jnp.asarray(xp.concatenate([*(xp.asarray(leaf) for leaf in leaves), zero])[index])

    scale = xp.concatenate([xp.asarray(each.scale) for each in present]).astype(np.float32)
    scale = jnp.asarray(xp.pad(scale, (0, in_blocks - v_rows))) * SIDECAR_UNIT
    return Gathered(
        v=gather([each.v for each in present], v_flat),
        v_scale=scale,
        places=jnp.asarray(places),
        u=gather([each.u for each in present], u_flat.reshape(-1, stride)),
        ranges=jnp.asarray(ranged),
        tile_units=tile_units,
    )


def _tile_units(sidecars: Sequence[Sidecar | None], rows: Sequence[int], row_unit: int) -> int:
    """A number of blocks of `row_unit` rows such that each tile begins at a multiple of it and has no more,
    or 0 if there is none."""
    tiles, first = [], 0
    for sidecar, n in zip(sidecars, rows, strict=True):
        for start, stop in () if sidecar is None else sidecar.row_spans:
            if start % row_unit:
                return 0
            tiles.append((first + start // row_unit, ceil_div(stop - start, row_unit)))
        first += ceil_div(n, row_unit)
    most = max(size for _, size in tiles)
    return 0 if any(start % most for start, _ in tiles) else most


def _places(ranges: np.ndarray, v_rows: int, stride: int, tile_units: int) -> np.ndarray:
    """`TritonWeight.places`; into `ranges` goes the first place of each block."""
    blocks = np.arange(len(ranges))
    ranges[:, 2] = blocks // tile_units * stride if tile_units else ranges[:, 0]
    of_tiles = ceil_div(len(blocks), tile_units) * stride if tile_units else 0
    found = of_tiles + np.arange(v_rows + 1, dtype=np.int32)
    found[-1] = max(ranges[:, 0] + ranges[:, 1])
    for first, count, place in ranges:
        found[first : first + count] = place + np.arange(count)
    return found


def in_pairs(sidecars: Sequence[Sidecar | None], rows: Sequence[int], row_unit: int) -> bool:
    """Whether blocks 2 i and 2 i + 1 of `row_unit` rows need the same rows of V, for all i: no tile ends, and
    no weight, between them."""
    pair = 2 * row_unit
    whole = all(ceil_div(n, row_unit) % 2 == 0 for n in rows)
    spans = (span for sidecar in sidecars if sidecar is not None for span in sidecar.row_spans)
    return whole and all(start % pair == 0 for start, _ in spans)


def _v_places(sidecar: Sidecar, columns: int) -> tuple[list[int], np.ndarray]:
    """First row of V of each row tile, and where in the stored V each element of V lies, or -1."""
    first = list(np.cumsum([0, *map(sum, sidecar.ranks)]).tolist())
    places = np.full((first[-1], columns), -1, np.int64)
    at = row = 0
    for ranks in sidecar.ranks:
        for (left, right), rank in zip(sidecar.column_spans, ranks, strict=True):
            size = rank * (right - left)
            places[row : row + rank, left:right] = np.arange(at, at + size).reshape(rank, right - left)
            at, row = at + size, row + rank
    return first, places


def _u_places(sidecar: Sidecar, first: list[int], row_unit: int) -> list[tuple[int, int, np.ndarray]]:
    """For each block of rows the rows of V that it needs, from and to, and where in the stored U each element
    of its matrix lies, or -1."""
    spans, totals = sidecar.row_spans, [sum(ranks) for ranks in sidecar.ranks]
    starts = np.cumsum([0, *((b - a) * r for (a, b), r in zip(spans, totals, strict=True))])
    blocks = []
    for start in range(0, sidecar.shape[0], row_unit):
        stop = min(start + row_unit, sidecar.shape[0])
        needed = [i for i, (top, bottom) in enumerate(spans) if top < stop and bottom > start]
        low, high = first[needed[0]], first[needed[-1] + 1]
        places = np.full((row_unit, high - low), -1, np.int64)
        for i in needed:
            top, bottom = max(start, spans[i][0]), min(stop, spans[i][1])
            inside = starts[i] + (np.arange(top, bottom)[:, None] - spans[i][0]) * totals[i]
            target = places[top - start : bottom - start, first[i] - low : first[i + 1] - low]
            target[...] = inside + np.arange(totals[i])
        blocks.append((low, high, places))
    return blocks
