"""The rows of a linear over several devices, in whole tiles: neither feedback nor sidecar looks past one."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from svsk_jax.quant.metric import nats

Devices = Sequence[Any]
"""Devices that share the rows of a linear; none: all on the default one."""


class InputMetric(NamedTuple):
    """H of a linear's input, and what error feedback needs of it (`metric.inverse_factor`)."""

    H: Float[Array, "k k"]
    order: Int[Array, "k"]
    factor: Float[Array, "k k"]


class OutputMetric(NamedTuple):
    """Blocks of G of a linear's output, and what feedback across rows, if the recipe has it, needs of
    them."""

    G: Float[Array, "t m m"]
    order: Int[Array, "t m"] | None = None
    factor: Float[Array, "t m m"] | None = None
    """The last tile's rows that don't exist come last in its order, with an identity for a factor."""


class RowPart(NamedTuple):
    """Some rows of a linear and their metrics, on one device."""

    start: int
    W: Float[Array, "n k"]
    inputs: InputMetric
    outputs: OutputMetric


def row_parts(
    W: Float[Array, "n k"],
    inputs: InputMetric,
    outputs: OutputMetric,
    tiles: Sequence[int],
    devices: Devices = (),
) -> list[RowPart]:
    """W in runs of rows that cut no block of the output metric and no sidecar tile, one run for a device, as
    equal as that allows; fewer where there are fewer blocks.

    Args:
        W: weights [N, K].
        inputs: metric of the input; copied to each device.
        outputs: metric of the output.
        tiles: rows of the sidecar tiles that are not to be cut.
        devices: where to put the runs.
    """
    n, height = W.shape[0], outputs.G.shape[1]
    unit = math.lcm(height, *(min(rows, n) for rows in tiles))
    units = -(-n // unit)
    count = min(len(devices), units)
    if count < 2:
        return [RowPart(0, W, inputs, outputs)]
    parts = []
    for turn in range(count):
        start, stop = (min(units * at // count * unit, n) for at in (turn, turn + 1))
        within = slice(start // height, -(-stop // height))
        values = (W[start:stop], inputs, jax.tree.map(lambda each, within=within: each[within], outputs))
        parts.append(RowPart(start, *jax.device_put(values, devices[turn])))
    return parts


def gathered(values: Sequence[Any]) -> Sequence[Any]:
    """Trees of arrays that lie on the devices of several parts, all on that of the first."""
    if len(values) == 1:
        return values
    place = next(iter(jax.tree.leaves(values[0])[0].devices()))
    return [jax.device_put(value, place) for value in values]


def tile_nats(
    E: Float[Array, "n k"], H: Float[Array, "k k"], G: Float[Array, "t m m"]
) -> list[Float[Array, ""]]:
    """`metric.nats` of each row tile. Tile by tile, and not as one product, whose rounding would hang on how
    many tiles a device has."""
    height = G.shape[1]
    return [
        _nats_of_tile(E, H, G, i, min(height, len(E) - start))
        for i, start in enumerate(range(0, len(E), height))
    ]


@partial(jax.jit, static_argnames="rows")
def _nats_of_tile(E: jax.Array, H: jax.Array, G: jax.Array, i: int | jax.Array, rows: int) -> jax.Array:
    own, felt = row_tile(E, G, i, rows)
    return nats(own, H, felt[None])


@partial(jax.jit, static_argnames="rows")
def row_tile(
    E: Float[Array, "n k"], G: Float[Array, "t m m"], i: int | Int[Array, ""], rows: int
) -> tuple[Float[Array, "{rows} k"], Float[Array, "{rows} {rows}"]]:
    """Row tile i of E, and its block of G.

    Args:
        E: [N, K], in tiles of as many rows as a block of G has.
        G: the diagonal blocks, the last one padded.
        i: which tile.
        rows: that it has: fewer than a block where it is a ragged last one.
    """
    own = jax.lax.dynamic_slice_in_dim(E, i * G.shape[1], rows)
    return own, jax.lax.dynamic_index_in_dim(G[:, :rows, :rows], i, keepdims=False)


def total_nats(parts: Sequence[RowPart], errors: Sequence[Array]) -> float:
    """½ tr(G E H Eᵀ) of a linear, from the error of each part."""
    tiles = [tile_nats(E, part.inputs.H, part.outputs.G) for part, E in zip(parts, errors, strict=True)]
    return sum(float(value) for value in jax.device_get(jax.tree.leaves(tiles)))
