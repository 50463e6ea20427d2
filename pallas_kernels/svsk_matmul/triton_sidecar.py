"""Sidecars of several weights gathered into what the Triton kernels read."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.types import SIDECAR_UNIT, Leaf, Sidecar

V_UNIT = 64
"""Rows of V are padded to a multiple of this, and those of U to a multiple of `U_UNIT` for each block of
rows, so that the layers of a model differ in few shapes and their kernels are compiled once."""
U_UNIT = 2


def gather_sidecars(
    sidecars: Sequence[Sidecar | None], rows: Sequence[int], columns: int, row_unit: int
) -> tuple[Leaf, Leaf, Leaf, Leaf] | None:
    """V int8 [R, columns], its scales / 2¹⁴ f32 [R], Uᵀ int8 and `ranges` int32 as `TritonWeight` describes
    them, or None if no sidecar has a rank. Concrete factors are gathered on the host: every layer has ranks
    of its own, and a compiled gather would serve one layer.

    Args:
        sidecars: of each weight.
        rows: of each weight.
        columns: of V, padding included.
        row_unit: rows of a block; each weight is padded to whole ones.
    """
    present = [each for each in sidecars if each is not None and sum(map(sum, each.ranks))]
    if not present:
        return None
    sizes = np.cumsum([0, *(each.v.shape[0] for each in present)])
    u_sizes = np.cumsum([0, *(each.u.shape[0] for each in present)])
    v_index, u_index, ranges = [], [], []
    v_rows = u_rows = at = 0
    for sidecar, n in zip(sidecars, rows, strict=True):
        part = np.zeros((ceil_div(n, row_unit), 4), np.int32)
        ranges.append(part)
        if sidecar is None or not sum(map(sum, sidecar.ranks)):
            continue
        first, v_places = _v_places(sidecar, columns)
        v_index.append(np.where(v_places >= 0, v_places + sizes[at], sizes[-1]))
        for block, (low, high, places) in enumerate(_u_places(sidecar, first, row_unit)):
            u_index.append(np.where(places >= 0, places + u_sizes[at], u_sizes[-1]).T)
            part[block, :3] = v_rows + low, high - low, u_rows
            u_rows += high - low
        v_rows += first[-1]
        at += 1
    ranged = np.concatenate(ranges)
    ranged[:, 3] = v_rows
    v_padded = V_UNIT * ceil_div(v_rows, V_UNIT)
    u_unit = U_UNIT * len(ranged)
    u_padded = u_unit * ceil_div(u_rows, u_unit)
    v_flat = np.pad(np.concatenate(v_index), ((0, v_padded - v_rows), (0, 0)), constant_values=sizes[-1])
    u_flat = np.pad(np.concatenate(u_index), ((0, u_padded - u_rows), (0, 0)), constant_values=u_sizes[-1])
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(present))
    xp = jnp if traced else np

    def gather(leaves: list[Leaf], index: np.ndarray) -> Leaf:
        zero = np.zeros(1, np.int8)
        return jnp.asarray(xp.concatenate([*(xp.asarray(leaf) for leaf in leaves), zero])[index])

    scale = xp.concatenate([xp.asarray(each.scale) for each in present]).astype(np.float32)
    scale = jnp.asarray(xp.pad(scale, (0, v_padded - v_rows))) * SIDECAR_UNIT
    v, u = gather([each.v for each in present], v_flat), gather([each.u for each in present], u_flat)
    return v, scale, u, jnp.asarray(ranged)


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
