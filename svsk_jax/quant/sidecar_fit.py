"""The sidecar fitted to what the output, or the whole model, feels: exact minimisers per tile, aware of
int8."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.svsk_matmul.layout import tile_spans
from pallas_kernels.svsk_matmul.types import SIDECAR_UNIT, Sidecar
from svsk_jax.quant.metric import HIGHEST, damped_cholesky
from svsk_jax.quant.sidecar import low_rank

FACTOR_DAMPING = 1e-4
"""Share of the mean diagonal added to H and G before they are factored for a fit."""
SWEEPS = 2
"""Gauss-Seidel sweeps over the column tiles, where there are several."""


class TileFactors(NamedTuple):
    """int8 factors of every tile, zero past a tile's rank. Rows past the matrix are zero.

    u [t, m, j, r] and scale [t, j, r] over t row tiles of m rows, j column tiles and r ranks; v is a tuple
    over column tiles of [t, r, columns]. S = U diag(scale · SIDECAR_UNIT) V.
    """

    u: Int8[Array, "t m j r"]
    v: tuple[Int8[Array, "t r c"], ...]
    scale: Float[Array, "t j r"]


def _rows_to_int8(V: Float[Array, "r c"]) -> tuple[Int8[Array, "r c"], Float[Array, "r"]]:
    step = jnp.max(jnp.abs(V), axis=-1) / 127
    values = jnp.round(V / jnp.where(step == 0, 1.0, step)[:, None])
    return values.astype(jnp.int8), step


def _fit_tile(
    E: Float[Array, "m c"],
    H: Float[Array, "c c"],
    L: Float[Array, "c c"],
    R: Float[Array, "m m"],
    rank: Int[Array, ""],
    width: int,
) -> tuple[Int8[Array, "m r"], Int8[Array, "r c"], Float[Array, "r"], Float[Array, "m c"]]:
    """(U, V, scale, S) of the rank-`rank` minimiser of tr(G (E-S) H (E-S)ᵀ), G = R Rᵀ and H = L Lᵀ."""
    weighted = jnp.matmul(R.T, jnp.matmul(E, L, precision=HIGHEST), precision=HIGHEST)
    _, V = low_rank(weighted, width)
    keep = (jnp.arange(width) < rank)[:, None]
    V = jax.scipy.linalg.solve_triangular(L, V.T, lower=True, trans=1).T
    v, v_step = _rows_to_int8(jnp.where(keep, V, 0.0))
    # Least squares for U against the V that will be stored, in units of its int8 values.
    stored = v.astype(jnp.float32)
    right = jnp.matmul(stored, H, precision=HIGHEST)
    normal = jnp.matmul(right, stored.T, precision=HIGHEST)
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(normal), jnp.finfo(jnp.float32).tiny))
    alive = (v_step > 0) & keep[:, 0]
    normal = normal / (size[:, None] * size[None])
    normal = jnp.where(alive[:, None] & alive[None], normal, 0.0) + jnp.diag(jnp.where(alive, 1e-6, 1.0))
    cross = jnp.matmul(E, right.T, precision=HIGHEST) / size
    factor = jax.scipy.linalg.cho_factor(normal, lower=True)
    U = jnp.where(alive, jax.scipy.linalg.cho_solve(factor, cross.T).T / size, 0.0)
    u, u_step = _rows_to_int8(U.T)
    scale = jnp.clip(u_step / SIDECAR_UNIT, 0, 65504).astype(jnp.float16)
    steps = scale.astype(jnp.float32) * SIDECAR_UNIT
    # Rounding once more to the step as f16 holds it.
    u = jnp.clip(jnp.round(U.T / jnp.where(steps == 0, 1.0, steps)[:, None]), -127, 127).astype(jnp.int8).T
    S = jnp.matmul(u.astype(jnp.float32) * steps, stored, precision=HIGHEST)
    return u, v, scale, S


@functools.partial(jax.jit, static_argnames=("columns", "width", "coupled"))
def fit_tiles(
    E: Float[Array, "n k"],
    H: Float[Array, "k k"],
    G: Float[Array, "t m m"],
    ranks: Int[Array, "t j"],
    columns: int,
    width: int,
    coupled: bool = True,
) -> tuple[TileFactors, Float[Array, "n k"]]:
    """The low-rank S that minimises tr(G (E - S) H (E - S)ᵀ), tile by tile, as its int8 factors store it.

    Per tile, with G = R Rᵀ and H = L Lᵀ: V = SVD_r(Rᵀ E L)'s right factor times L⁻¹, rounded to int8; U by
    least squares in H for that V, which is its optimum whatever G is; rounded. Where tiles cut K, the
    target of column tile J is E_J + Σ_{I≠J} (E_I - S_I) H_IJ H_JJ⁻¹, so that it makes up for the other
    tiles too, swept until S_J has been refitted `SWEEPS` times.

    Args:
        E: residual of the base, f32 [N, K].
        H: second moment of the input.
        G: output sensitivity in t diagonal blocks of m rows, the last one padded; identities for a fit in H
            alone.
        ranks: rank of each tile, at most `width`.
        columns: columns of a tile, 0 for all of K.
        width: ranks that the arrays hold (static, so that a few compiled functions serve all ranks).
        coupled: whether column tiles make up for one another.

    Returns:
        The factors, and S [N, K] as they restore it.
    """
    n, k = E.shape
    tiles, height = G.shape[0], G.shape[1]
    spans = tile_spans(k, columns)
    padded = jnp.pad(E, ((0, tiles * height - n), (0, 0))).reshape(tiles, height, k)
    R = jax.lax.map(lambda block: damped_cholesky(block, FACTOR_DAMPING), G)
    blocks = [H[a:b, a:b] for a, b in spans]
    factors = [damped_cholesky(block, FACTOR_DAMPING) for block in blocks]
    S = jnp.zeros_like(padded)
    parts: list[Any] = [None] * len(spans)
    for _ in range(SWEEPS if coupled and len(spans) > 1 else 1):
        for j, (a, b) in enumerate(spans):
            target = padded[:, :, a:b]
            if coupled and len(spans) > 1:
                rest = jnp.matmul((padded - S.at[:, :, a:b].set(0.0)), H[:, a:b], precision=HIGHEST)
                solved = jax.scipy.linalg.cho_solve((factors[j], True), rest.reshape(-1, b - a).T)
                target = solved.T.reshape(tiles, height, b - a)

            def fit(tile, H=blocks[j], L=factors[j]):
                return _fit_tile(tile[0], H, L, tile[1], tile[2], width)

            # lax.map, not vmap: on CPU, XLA's batched solvers can wait for one another for ever.
            *parts[j], restored = jax.lax.map(fit, (target, R, ranks[:, j]))
            S = S.at[:, :, a:b].set(restored)
    u, v, scale = zip(*parts, strict=True)
    stored = TileFactors(u=jnp.stack(u, axis=2), v=tuple(v), scale=jnp.stack(scale, axis=1))
    return stored, S.reshape(tiles * height, k)[:n]


@functools.partial(jax.jit, static_argnames=("columns", "width"))
def rank_gains(
    E: Float[Array, "n k"], H: Float[Array, "k k"], G: Float[Array, "t m m"], columns: int, width: int
) -> Float[Array, "t j w"]:
    """½ σ² of the leading singular values of Rᵀ E L in each tile, falling: the nats that each rank is
    predicted to gain."""
    n, k = E.shape
    tiles, height = G.shape[0], G.shape[1]
    padded = jnp.pad(E, ((0, tiles * height - n), (0, 0))).reshape(tiles, height, k)
    R = jax.lax.map(lambda block: damped_cholesky(block, FACTOR_DAMPING), G)
    gains = []
    for a, b in tile_spans(k, columns):
        L = damped_cholesky(H[a:b, a:b], FACTOR_DAMPING)
        weighted = jnp.matmul(R.mT, jnp.matmul(padded[:, :, a:b], L, precision=HIGHEST), precision=HIGHEST)
        gains.append(jax.lax.map(lambda A: 0.5 * jnp.sum(low_rank(A, width)[1] ** 2, axis=-1), weighted))
    return jnp.stack(gains, axis=1)


def to_sidecar(
    factors: TileFactors, shape: tuple[int, int], tile: tuple[int, int], ranks: tuple[tuple[int, ...], ...]
) -> Sidecar:
    """Cut every tile's factors to its rank and lay them out as stored."""
    u, scale = np.asarray(factors.u), np.asarray(factors.scale)
    v = [np.asarray(part) for part in factors.v]
    us, vs, scales = [], [], []
    for i, ((start, stop), row) in enumerate(zip(tile_spans(shape[0], tile[0]), ranks, strict=True)):
        cut = [u[i, : stop - start, j, :rank] for j, rank in enumerate(row)]
        us.append(np.concatenate(cut, axis=1).reshape(-1))
        vs += [v[j][i, :rank].reshape(-1) for j, rank in enumerate(row)]
        scales += [scale[i, j, :rank] for j, rank in enumerate(row)]
    return Sidecar(
        u=jnp.asarray(np.concatenate(us)),
        v=jnp.asarray(np.concatenate(vs)),
        scale=jnp.asarray(np.concatenate(scales)),
        shape=shape,
        tile=tile,
        ranks=ranks,
    )
