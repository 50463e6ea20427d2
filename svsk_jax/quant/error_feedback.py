"""Error feedback: round column by column, and row block by row block, letting what is still to be rounded
make up for what has been."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.error_feedback import why_no_kernel
from svsk_jax.quant import beam_search
from svsk_jax.quant.codebook import decode, round_to_level
from svsk_jax.quant.metric import HIGHEST, band_blocks, bands, inverse_order

COLUMN_BLOCK = 64
ROW_BLOCK = 32
"""Rows that are rounded together, where there is feedback across rows."""


def pad_square(U: Float[Array, "*b n n"], size: int) -> jax.Array:
    """U with an identity appended on the diagonal, up to size × size."""
    n = U.shape[-1]
    if n == size:
        return U
    padded = jnp.zeros((*U.shape[:-2], size, size), U.dtype).at[..., :n, :n].set(U)
    return padded + jnp.diag((jnp.arange(size) >= n).astype(U.dtype))


def _round_columns(
    W: Float[Array, "k r"],
    scales: Float[Array, "k r"],
    U: Float[Array, "k k"],
    coefficients: jax.Array,
    beam_width: int,
) -> UInt8[Array, "k r"]:
    """Codes of Wᵀ, rounded from the first row of W (a column of the matrix) to the last; K a multiple of the
    block."""
    k, rows = W.shape
    if beam_width > 1 or why_no_kernel(beam_width) is None:
        return beam_search.round_columns(W, scales, U, coefficients, beam_width)

    def round_block(W, start):
        w = jax.lax.dynamic_slice(W, (start, 0), (COLUMN_BLOCK, rows))
        s = jax.lax.dynamic_slice(scales, (start, 0), (COLUMN_BLOCK, rows))
        right = jax.lax.dynamic_slice(U, (start, 0), (COLUMN_BLOCK, k))
        square = jax.lax.dynamic_slice(right, (0, start), (COLUMN_BLOCK, COLUMN_BLOCK))

        def round_column(w, j):
            codes = round_to_level(w[j], s[j], coefficients)
            error = (w[j] - s[j] * decode(codes, coefficients)) / square[j, j]
            later = jnp.where(jnp.arange(COLUMN_BLOCK) > j, square[j], 0.0)
            return w - later[:, None] * error[None], (codes.astype(jnp.uint8), error)

        _, (codes, errors) = jax.lax.scan(round_column, w, jnp.arange(COLUMN_BLOCK))
        later = jnp.where(jnp.arange(k) >= start + COLUMN_BLOCK, right, 0.0)
        return W - jnp.matmul(later.T, errors, precision=HIGHEST), codes

    _, codes = jax.lax.scan(round_block, W, jnp.arange(0, k, COLUMN_BLOCK))
    return codes.reshape(k, rows)


def _block_inverses(U: Float[Array, "t m m"], size: int) -> Float[Array, "b t size size"]:
    """Inverses of the diagonal blocks of upper U. One at a time: on CPU, XLA's batched solvers can wait for
    one another for ever."""
    tiles, height = U.shape[:2]
    diagonal = U.reshape(tiles, height // size, size, height // size, size)
    blocks = jnp.diagonal(diagonal, axis1=1, axis2=3).transpose(3, 0, 1, 2)
    invert = partial(jax.scipy.linalg.solve_triangular, b=jnp.eye(size, dtype=U.dtype))
    return jax.lax.map(invert, blocks.reshape(-1, size, size)).reshape(blocks.shape)


def _round_tiles(
    W: Float[Array, "k t m"],
    scales: Float[Array, "k t m"],
    U: Float[Array, "k k"],
    coefficients: jax.Array,
    order: Int[Array, "t m"],
    factor: Float[Array, "t m m"],
    row_block: int,
    beam_width: int,
) -> UInt8[Array, "k t m"]:
    """Codes of Wᵀ in tiles of m rows, each rounded block by block of rows in its order; K in rounding
    order."""
    k, tiles, height = W.shape
    size = -(-height // row_block) * row_block
    factor = pad_square(factor, size)
    inverses = _block_inverses(factor, row_block)

    def in_order(x: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(x, order[None], axis=2)
        return jnp.pad(picked, ((0, 0), (0, 0), (0, size - height)))

    def round_rows(W, start):
        w = jax.lax.dynamic_slice_in_dim(W, start, row_block, axis=2)
        s = jax.lax.dynamic_slice_in_dim(ordered_scales, start, row_block, axis=2)
        flat = (k, tiles * row_block)
        codes = _round_columns(w.reshape(flat), s.reshape(flat), U, coefficients, beam_width)
        codes = codes.reshape(w.shape)
        error = w - s * decode(codes, coefficients)
        right = jax.lax.dynamic_slice_in_dim(factor, start, row_block, axis=1)
        later = jnp.where(jnp.arange(size) >= start + row_block, right, 0.0)
        inverse = jax.lax.dynamic_index_in_dim(inverses, start // row_block, keepdims=False)
        scaled = jnp.einsum("tbc,ktb->tck", inverse, error, precision=HIGHEST)
        return W - jnp.einsum("tbm,tbk->ktm", later, scaled, precision=HIGHEST), codes

    ordered_scales = in_order(scales)
    _, codes = jax.lax.scan(round_rows, in_order(W), jnp.arange(0, size, row_block))
    # [blocks, k, tiles, row_block] → [k, tiles, m]
    codes = codes.transpose(1, 2, 0, 3).reshape(k, tiles, size)[..., :height]
    return jnp.take_along_axis(codes, jax.vmap(inverse_order)(order)[None], axis=2)


def _by_column(x: Float[Array, "n k"], order: Int[Array, "k"], padded: int) -> Float[Array, "padded n"]:
    """Rows of weights as columns in rounding order."""
    return jnp.pad(x[:, order].T, ((0, padded - x.shape[1]), (0, 0)))


def _by_row(codes: UInt8[Array, "padded n"], order: Int[Array, "k"]) -> UInt8[Array, "n k"]:
    """`_by_column` undone."""
    k = len(order)
    return jnp.zeros((codes.shape[1], k), jnp.uint8).at[:, order].set(codes[:k].T)


@partial(jax.jit, static_argnames=("row_block", "beam_width"))
def _round_band(
    W: Float[Array, "n k"],
    scales: Float[Array, "n k"],
    coefficients: jax.Array,
    columns: tuple[jax.Array, jax.Array],
    rows: tuple[jax.Array, jax.Array] | None,
    row_block: int,
    beam_width: int,
) -> UInt8[Array, "n k"]:
    """`feedback` for tiles of one height, none of them padded."""
    order, U = columns
    padded = -(-len(order) // COLUMN_BLOCK) * COLUMN_BLOCK
    U = pad_square(U, padded)
    w, s = (_by_column(x, order, padded) for x in (W, scales))
    if rows is None:
        return _by_row(_round_columns(w, s, U, coefficients, beam_width), order)
    tiled = (padded, *rows[0].shape)
    codes = _round_tiles(w.reshape(tiled), s.reshape(tiled), U, coefficients, *rows, row_block, beam_width)
    return _by_row(codes.reshape(padded, -1), order)


def feedback(
    W: Float[Array, "n k"],
    scales: Float[Array, "n k"],
    coefficients: Float[Array, "2"],
    columns: tuple[Int[Array, "k"], Float[Array, "k k"]],
    rows: tuple[Int[Array, "t m"], Float[Array, "t m m"]] | None = None,
    row_block: int = ROW_BLOCK,
    beam_width: int = 1,
) -> UInt8[Array, "n k"]:
    """Codes that keep tr(G E H Eᵀ) small, E = W - scale · level(code), with scales fixed.

    Columns are rounded in the given order. After each, the error e is spread over the columns still to come
    so that the output changes least: w_j ← w_j - e U_ij / U_ii, with H⁻¹ = Uᵀ U in that order. `rows` does
    the same across outputs: after a block of rows is rounded, the rows of its tile still to come take up
    G_rr⁻¹ G_rb E_b of its error, which is the minimiser for any H. Within a row block, rows do not see each
    other. All in f32.

    Args:
        W: weights [N, K].
        scales: scale of each weight, [N, K].
        coefficients: (a, δ) of the codebook.
        columns: order of the columns and the upper factor U of H⁻¹ in that order (`metric.inverse_factor`).
        rows: likewise for each tile of m rows, from the diagonal blocks of G, as in
            `joint.OutputMetric`; N ≤ t·m, tiles in order. None for G = I.
        row_block: rows rounded together.
        beam_width: roundings of each row that are followed over its columns (`beam_search`).

    Returns:
        Codes 0..15, uint8 [N, K].

    Source: Frantar et al., "GPTQ" (2022); for rows, the two-sided rounding of Tseng et al.,
    "Model-Preserving Adaptive Rounding" (2025).
    """
    if rows is None:
        return _round_band(W, scales, coefficients, columns, None, row_block, beam_width)
    order, factor = rows
    parts = []
    # A compiled function for each height of tiles, not for each matrix.
    for band in bands(W.shape[0], order.shape[1]):
        first, tiles, size = band
        inside = slice(first, first + tiles * size)
        within = (order[first // order.shape[1] :, :size][:tiles], band_blocks(factor, band))
        block = min(row_block, size)
        parts.append(_round_band(W[inside], scales[inside], coefficients, columns, within, block, beam_width))
    return jnp.concatenate(parts)
