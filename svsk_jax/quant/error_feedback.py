"""Error feedback: round column by column, and row block by row block, letting what is still to be rounded
make up for what has been."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from svsk_jax.quant.codebook import decode, round_to_level

COLUMN_BLOCK = 64
HIGHEST = jax.lax.Precision.HIGHEST


def _pad_square(U: jax.Array, size: int) -> jax.Array:
    """U with an identity appended on the diagonal, up to size × size."""
    n = U.shape[-1]
    padded = jnp.zeros((*U.shape[:-2], size, size), U.dtype).at[..., :n, :n].set(U)
    return padded + jnp.diag((jnp.arange(size) >= n).astype(U.dtype))


def _round_columns(
    W: Float[Array, "k r"], scales: Float[Array, "k r"], U: Float[Array, "k k"], coefficients: jax.Array
) -> UInt8[Array, "k r"]:
    """Codes of Wᵀ, rounded from the first row of W (a column of the matrix) to the last; K a multiple of the
    block."""
    k, rows = W.shape

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


@partial(jax.jit, static_argnames="row_block")
def feedback(
    W: Float[Array, "n k"],
    scales: Float[Array, "n k"],
    coefficients: Float[Array, "2"],
    columns: tuple[Int[Array, "k"], Float[Array, "k k"]],
    rows: tuple[Int[Array, "t m"], Float[Array, "t m m"]] | None = None,
    row_block: int = 32,
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
        rows: likewise for each tile of m rows, from the diagonal blocks of G; N ≤ t·m, tiles
            in order and the last one filled up with rows that don't exist. None for G = I.
        row_block: rows rounded together.

    Returns:
        Codes 0..15, uint8 [N, K].

    Source: Frantar et al., "GPTQ" (2022); for rows, the two-sided rounding of Tseng et al.,
    "Model-Preserving Adaptive Rounding" (2025).
    """
    n, k = W.shape
    order, U = columns
    padded = -(-k // COLUMN_BLOCK) * COLUMN_BLOCK
    U = _pad_square(U, padded)

    def by_column(x: jax.Array) -> jax.Array:
        """[r, k] in stored order → [padded, r] in rounding order."""
        return jnp.pad(x[:, order].T, ((0, padded - k), (0, 0)))

    def to_stored(codes: jax.Array) -> jax.Array:
        return jnp.zeros((codes.shape[1], k), jnp.uint8).at[:, order].set(codes[:k].T)

    if rows is None:
        return to_stored(_round_columns(by_column(W), by_column(scales), U, coefficients))
    row_order, row_factor = rows
    tiles, height = row_order.shape
    size = -(-height // row_block) * row_block
    row_factor = _pad_square(row_factor, size)
    # Row r of the result, for each tile and place in its order; places past N hold a zero row.
    place = row_order + height * jnp.arange(tiles)[:, None]
    place = jnp.pad(place, ((0, 0), (0, size - height)), constant_values=n)

    def tiled(x: jax.Array) -> jax.Array:
        """[n, k] → [padded, tiles, size]."""
        rows_of = jnp.pad(by_column(x), ((0, 0), (0, 1)))
        return rows_of[:, jnp.minimum(place, n)]

    def round_rows(W, start):
        w = jax.lax.dynamic_slice_in_dim(W, start, row_block, axis=2)
        s = jax.lax.dynamic_slice_in_dim(S, start, row_block, axis=2)
        flat = (padded, tiles * row_block)
        codes = _round_columns(w.reshape(flat), s.reshape(flat), U, coefficients).reshape(w.shape)
        error = w - s * decode(codes, coefficients)
        right = jax.lax.dynamic_slice_in_dim(row_factor, start, row_block, axis=1)
        later = jnp.where(jnp.arange(size) >= start + row_block, right, 0.0)
        inverse = jax.lax.dynamic_index_in_dim(inverses, start // row_block, keepdims=False)
        scaled = jnp.einsum("tbc,ktb->tck", inverse, error, precision=HIGHEST)
        return W - jnp.einsum("tbm,tbk->ktm", later, scaled, precision=HIGHEST), codes

    inverses = _block_inverses(row_factor, row_block)
    S = tiled(scales)
    _, codes = jax.lax.scan(round_rows, tiled(W), jnp.arange(0, size, row_block))
    # [blocks, padded, tiles, row_block] → [padded, tiles, size]
    codes = codes.transpose(1, 2, 0, 3).reshape(padded, tiles * size)
    by_row = jnp.zeros((padded, n + 1), jnp.uint8).at[:, jnp.minimum(place, n).reshape(-1)].set(codes)
    return to_stored(by_row[:, :n])
