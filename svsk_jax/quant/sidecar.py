"""The sidecar: a low-rank int8 correction of the residual, tile by tile."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.svsk_matmul.layout import ceil_div, pad_axis, tile_spans
from pallas_kernels.svsk_matmul.types import SIDECAR_UNIT, Sidecar

OVERSAMPLE = 16
POWER_ITERATIONS = 4


def low_rank(A: Float[Array, "m n"], rank: int) -> tuple[Float[Array, "m {rank}"], Float[Array, "{rank} n"]]:
    """Factors of the best rank-r approximation of A in the Frobenius norm, U [m, r] with orthonormal
    columns and V [r, n], f32.

    Randomised subspace iteration with a fixed seed (Halko, Martinsson & Tropp, 2011, algorithm 4.4), so the
    same A gives the same factors.
    Past the smaller side of A the factors are zero.
    """
    m, n = A.shape
    usable = min(rank, m, n)
    width = min(usable + OVERSAMPLE, m, n)
    highest = jax.lax.Precision.HIGHEST
    start = jax.random.normal(jax.random.key(0), (n, width), jnp.float32)
    basis, _ = jnp.linalg.qr(jnp.matmul(A, start, precision=highest))
    for _ in range(POWER_ITERATIONS):
        cobasis, _ = jnp.linalg.qr(jnp.matmul(A.T, basis, precision=highest))
        basis, _ = jnp.linalg.qr(jnp.matmul(A, cobasis, precision=highest))
    small = jnp.matmul(basis.T, A, precision=highest)
    _, vectors = jnp.linalg.eigh(jnp.matmul(small, small.T, precision=highest))
    leading = vectors[:, ::-1][:, :usable]
    U = jnp.matmul(basis, leading, precision=highest)
    # A singular vector's sign is free; fixed here, so that the stored bytes do not hang on a solver's choice.
    peaks = jnp.take_along_axis(U, jnp.argmax(jnp.abs(U), axis=0, keepdims=True), axis=0)
    U = U * jnp.where(peaks < 0, -1.0, 1.0)
    V = jnp.matmul(U.T, A, precision=highest)
    return jnp.pad(U, ((0, 0), (0, rank - usable))), jnp.pad(V, ((0, rank - usable), (0, 0)))


def _to_int8(x: Float[Array, "*b a c"], axis: int) -> tuple[Int8[Array, "*b a c"], Float[Array, "*b r"]]:
    """int8 values and the step that each vector along `axis` was divided by (0 for a zero vector)."""
    step = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    values = jnp.round(x / jnp.where(step == 0, 1.0, step))
    return values.astype(jnp.int8), jnp.squeeze(step, axis)


@functools.partial(jax.jit, static_argnames=("tile", "rank"))
def fit_diagonal(E: Float[Array, "n k"], h: Float[Array, "k"], tile: tuple[int, int], rank: int) -> Sidecar:
    """The sidecar that minimises Σ hₖ (E - U V)² in each tile: SVD_r(E·D)·D⁻¹ with D = √diag(h), rounded to
    int8.

    Args:
        E: residual W - Ŵ of the base, f32 [N, K].
        h: mean square of each input, E[x²], [K]; raised by 1e-6 of its mean so that D is invertible.
        tile: rows and columns of a tile (columns 0: the whole row). The last ones may be ragged.
        rank: rank in every tile, at most 128; a tile with a shorter side keeps zero columns.

    Source: SVSK's published method.
    """
    n, k = E.shape
    height, width = min(tile[0], n), min(tile[1] or k, k)
    row_tiles, column_tiles = ceil_div(n, height), ceil_div(k, width)
    D = jnp.sqrt(h + 1e-6 * jnp.mean(h) + jnp.finfo(jnp.float32).tiny)
    weighted = pad_axis(pad_axis(E * D, 0, height), 1, width)
    tiles = weighted.reshape(row_tiles, height, column_tiles, width).swapaxes(1, 2)
    # lax.map, not vmap: on CPU, XLA's batched solvers can wait for one another for ever.
    U, V = jax.lax.map(lambda A: low_rank(A, rank), tiles.reshape(-1, height, width))
    U = U.reshape(row_tiles, column_tiles, height, rank)
    V = V.reshape(row_tiles, column_tiles, rank, width)
    V = V / jnp.pad(D, (0, -k % width), constant_values=1.0).reshape(1, column_tiles, 1, width)
    U, u_step = _to_int8(U, axis=-2)
    V, v_step = _to_int8(V, axis=-1)
    scale = jnp.clip(u_step * v_step / SIDECAR_UNIT, 0, 65504).astype(jnp.float16)
    # Rows of all row tiles in order, and for each row its ranks by column tile: what `Sidecar.u` holds when
    # ranks are equal.
    u = U.transpose(0, 2, 1, 3).reshape(row_tiles * height, column_tiles * rank)[:n]
    v = jnp.concatenate(
        [
            V[:, j, :, : stop - start].reshape(row_tiles, -1)
            for j, (start, stop) in enumerate(tile_spans(k, width))
        ],
        axis=1,
    )
    return Sidecar(
        u=u.reshape(-1),
        v=v.reshape(-1),
        scale=scale.reshape(-1),
        shape=(n, k),
        tile=tile,
        ranks=((rank,) * column_tiles,) * row_tiles,
    )
