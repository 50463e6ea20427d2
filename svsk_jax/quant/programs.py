"""The programs that a linear's options and its rounding run, by their arguments' shapes: so that they can be
compiled before there is anything to run them on. Small ones too: there are dozens, and one after another,
each when it is first called, they take seconds.

A call later finds what was compiled here, as long as it has the same shapes and types; a test keeps it so.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.svsk_matmul.layout import tile_spans
from svsk_jax.quant import error_feedback, joint, metric, row_parts, sidecar_fit
from svsk_jax.quant.error import error_share
from svsk_jax.quant.half_moment import half_size, mirrored
from svsk_jax.quant.metric import bands
from svsk_jax.quant.types import (
    MAX_RANK,
    SENSITIVITY_TILE,
    QuantConfig,
    TileShape,
    mean_of,
)


class Program(NamedTuple):
    """A jitted function and what it will be called with."""

    function: Any
    arguments: tuple[Any, ...]

    def compile(self) -> None:
        """Compile it, if it is not."""
        self.function.lower(*self.arguments).compile()


def of_options(
    shape: tuple[int, int], config: QuantConfig, tiles: tuple[TileShape, ...]
) -> Iterator[Program]:
    """What measuring the options of a linear W [N, K] runs, with sidecars of these tiles."""
    n, k = shape
    W, H, G, height = _floats(n, k), _floats(k, k), _blocks(n), min(n, SENSITIVITY_TILE)
    yield from _of_rounding(shape, config, config.groups, {config.beam_width})
    for rows in {stop - start for start, stop in tile_spans(n, height)}:
        yield Program(row_parts._nats_of_tile, (W, H, G, 0, rows))
    for tile in tiles:
        rows = min(tile.rows, height)
        if height % rows:
            continue
        yield from _of_row_tiles(shape, rows)
        columns = {stop - start for start, stop in tile_spans(k, tile.columns)}
        width = min(MAX_RANK, rows, *columns)
        for tall in {stop - start for start, stop in tile_spans(n, rows)}:
            for wide in columns:
                block = (_floats(tall, wide), _floats(wide, wide), _floats(tall, tall))
                yield Program(sidecar_fit._tile_gains, (*block, width))


def of_quantization(shape: tuple[int, int], config: QuantConfig) -> Iterator[Program]:
    """What quantizing a linear W [N, K] runs, with a sidecar of whatever ranks."""
    n, k = shape
    beams = {1, config.beam_width} if config.joint_rounds else {config.beam_width}
    yield from _of_rounding(shape, config, config.groups, beams)
    W = _floats(n, k)
    yield Program(joint.plus, (W, W))
    yield Program(error_share, (W, W, _floats(k, k), _integers()))
    yield Program(joint._pack_codes, (jax.ShapeDtypeStruct((n, k), jnp.uint8),))
    for group in config.groups:
        yield Program(joint._pack_int6, (jax.ShapeDtypeStruct((n, -(-k // group)), jnp.int8),))
    rows = min(config.tile.rows, SENSITIVITY_TILE, n)
    yield from _of_row_tiles(shape, rows)
    restored = [_floats(stop - start, k) for start, stop in tile_spans(n, rows)]
    yield Program(sidecar_fit.one_below_another, (restored,))
    for tall in {stop - start for start, stop in tile_spans(n, rows)}:
        yield Program(sidecar_fit._factor, (_floats(tall, tall),))
        for wide in {stop - start for start, stop in tile_spans(k, config.tile.columns)}:
            square = _floats(wide, wide)
            yield Program(sidecar_fit._factor, (square,))
            for width in sidecar_fit.WIDTHS:
                block = (_floats(tall, wide), square, square, _floats(tall, tall))
                yield Program(sidecar_fit._fit_tile, (*block, 1, width))


def _of_rounding(
    shape: tuple[int, int], config: QuantConfig, groups: tuple[int, ...], beams: set[int]
) -> Iterator[Program]:
    """What `joint.quantize_base` runs, and what makes its metrics."""
    n, k = shape
    W, H, pair, columns = _floats(n, k), _floats(k, k), _floats(2), (_integers(k), _floats(k, k))
    yield Program(mirrored, (_floats(half_size(k)),))
    yield Program(mean_of, (H, _integers()))
    if config.needs_sensitivity:
        yield Program(mean_of, (_blocks(n), _integers()))
        for _, tiles, size in bands(n, min(n, SENSITIVITY_TILE)):
            G = _floats(tiles, size, size)
            yield Program(metric.shares, (G, config.sensitivity_shrinkage))
            yield Program(metric.add_diagonal, (G, _floats(tiles)))
    yield Program(joint.minus, (W, W))
    yield Program(joint._restore, (jax.ShapeDtypeStruct((n, k), jnp.uint8), W, pair))
    if config.fisher_share > 0:
        yield Program(joint._mixed, (H, H, config.fisher_share))
    yield Program(joint._input_metric, (H, config.moment_shrinkage, config.damping))
    for group in groups:
        yield Program(joint._search, (W, H, pair, group, config.importance))
    if config.feedback == "none":
        return
    for beam in beams:
        if config.feedback == "columns":
            block = error_feedback.ROW_BLOCK
            yield Program(error_feedback._round_band, (W, W, pair, columns, None, block, beam))
            continue
        for _, tiles, size in bands(n, min(n, SENSITIVITY_TILE)):
            band, factors = _floats(tiles * size, k), _floats(tiles, size, size)
            rows, block = (_integers(tiles, size), factors), min(error_feedback.ROW_BLOCK, size)
            yield Program(error_feedback._round_band, (band, band, pair, columns, rows, block, beam))
            yield Program(joint._row_factors, (factors, config.damping))


def _of_row_tiles(shape: tuple[int, int], rows: int) -> Iterator[Program]:
    """What cuts the rows of a linear W [N, K], and the blocks of its output sensitivity, into tiles."""
    n, k = shape
    G = _floats(-(-n // rows), rows, rows)
    for tall in {stop - start for start, stop in tile_spans(n, rows)}:
        yield Program(row_parts.row_tile, (_floats(n, k), G, 0, tall))


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _blocks(n: int) -> jax.ShapeDtypeStruct:
    """Of the output sensitivity of n rows."""
    height = min(n, SENSITIVITY_TILE)
    return _floats(-(-n // height), height, height)
