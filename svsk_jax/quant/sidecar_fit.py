"""The sidecar fitted to what the output, or the whole model, feels: exact minimisers per tile, aware of
int8."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.svsk_matmul.layout import tile_spans
from pallas_kernels.svsk_matmul.types import SIDECAR_UNIT, Sidecar
from svsk_jax.quant.metric import HIGHEST, damped_cholesky
from svsk_jax.quant.row_parts import row_tile
from svsk_jax.quant.sidecar import low_rank
from svsk_jax.quant.types import MAX_RANK

FACTOR_DAMPING = 1e-4
"""Share of the mean diagonal added to H and G before they are factored for a fit."""
SWEEPS = 2
"""Gauss-Seidel sweeps over the column tiles, where there are several."""


WIDTHS = (8, 32, MAX_RANK)
"""Ranks that a fit is compiled for; a tile's rank is rounded up to one of them."""


class TileFactors(NamedTuple):
    """int8 factors of a tile of m rows and c columns, in r ranks: S = U diag(scale · SIDECAR_UNIT) V."""

    u: Int8[Array | np.ndarray, "m r"]
    v: Int8[Array | np.ndarray, "r c"]
    scale: Float[Array | np.ndarray, "r"]


def cut(factors: Sequence[Sequence[TileFactors]], ranks: Sequence[Sequence[int]]) -> list[list[TileFactors]]:
    """The first ranks of each tile, in host memory: every shape would be compiled for otherwise."""
    return [
        [
            TileFactors(u[:, :rank], v[:rank], scale[:rank])
            for (u, v, scale), rank in zip(row, of_row, strict=True)
        ]
        for row, of_row in zip(jax.device_get(factors), ranks, strict=True)
    ]


def _rows_to_int8(V: Float[Array, "r c"]) -> tuple[Int8[Array, "r c"], Float[Array, "r"]]:
    step = jnp.max(jnp.abs(V), axis=-1) / 127
    values = jnp.round(V / jnp.where(step == 0, 1.0, step)[:, None])
    return values.astype(jnp.int8), step


def round_left(U: Float[Array, "m r"]) -> tuple[Int8[Array, "m r"], Float[Array, "r"]]:
    """int8 columns of U, which multiplies an int8 V, and the f16 scale of each."""
    _, step = _rows_to_int8(U.T)
    scale = jnp.clip(step / SIDECAR_UNIT, 0, 65504).astype(jnp.float16)
    # Rounded to the step as f16 holds it.
    steps = scale.astype(jnp.float32) * SIDECAR_UNIT
    return jnp.clip(jnp.round(U / jnp.where(steps == 0, 1.0, steps)), -127, 127).astype(jnp.int8), scale


@jax.jit
def round_factors(U: Float[Array, "m r"], V: Float[Array, "r c"]) -> TileFactors:
    """The stored form of S = U V, each factor rounded by itself."""
    v, step = _rows_to_int8(V)
    u, scale = round_left(U * step)
    return TileFactors(u, v, scale)


@functools.partial(jax.jit, static_argnames="width")
def _fit_tile(
    E: Float[Array, "m c"],
    H: Float[Array, "c c"],
    L: Float[Array, "c c"],
    R: Float[Array, "m m"],
    rank: int | Int[Array, ""],
    width: int,
) -> tuple[TileFactors, Float[Array, "m c"]]:
    """Factors, in `width` ranks of which those past `rank` are zero, and S of the rank-`rank` minimiser of
    tr(G (E-S) H (E-S)ᵀ), G = R Rᵀ and H = L Lᵀ."""
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
    u, scale = round_left(U)
    steps = scale.astype(jnp.float32) * SIDECAR_UNIT
    S = jnp.matmul(u.astype(jnp.float32) * steps, stored, precision=HIGHEST)
    return TileFactors(u, v, scale), S


_factor = jax.jit(functools.partial(damped_cholesky, damping=FACTOR_DAMPING))


@jax.jit
def _coupled_target(
    others: Float[Array, "m k"], H: Float[Array, "k c"], factor: Float[Array, "c c"], own: Float[Array, "m c"]
) -> Float[Array, "m c"]:
    """What column tile J is fitted to: its own residual, and Σ_{I≠J} (E_I - S_I) H_IJ H_JJ⁻¹."""
    rest = jnp.matmul(others, H, precision=HIGHEST)
    return own + jax.scipy.linalg.cho_solve((factor, True), rest.T).T


def fit_tiles(
    E: Float[Array, "n k"],
    H: Float[Array, "k k"],
    G: Float[Array, "t m m"],
    ranks: Sequence[Sequence[int]],
    columns: int,
    coupled: bool = True,
) -> tuple[list[list[TileFactors]], Float[Array, "n k"]]:
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
        ranks: rank of each tile, by row tile, then column tile.
        columns: columns of a tile, 0 for all of K.
        coupled: whether column tiles make up for one another.

    Returns:
        The factors by row tile, then column tile, as wide as they were compiled for (`cut`), and S [N, K] as
        they restore it. Nothing waits for them.
    """
    n, k = E.shape
    spans = tile_spans(k, columns)
    factors = [_factor(H[a:b, a:b]) for a, b in spans]
    stored, restored = [], []
    for i, (start, stop) in enumerate(tile_spans(n, G.shape[1])):
        rows, felt = row_tile(E, G, i, stop - start)
        row, S = _none(rows, spans), jnp.zeros_like(rows)
        if any(ranks[i]):
            R = _factor(felt)
            for _ in range(SWEEPS if coupled and len(spans) > 1 else 1):
                for j, (a, b) in enumerate(spans):
                    if not ranks[i][j]:
                        continue
                    target, block = rows[:, a:b], H[a:b, a:b]
                    if coupled and len(spans) > 1:
                        others = (rows - S).at[:, a:b].set(0.0)
                        target = _coupled_target(others, H[:, a:b], factors[j], target)
                    width = next(width for width in WIDTHS if width >= ranks[i][j])
                    row[j], part = _fit_tile(target, block, factors[j], R, ranks[i][j], width)
                    S = part if len(spans) == 1 else S.at[:, a:b].set(part)
        stored.append(row)
        restored.append(S)
    return stored, one_below_another(restored)


@jax.jit
def one_below_another(parts: Sequence[Float[Array, "_ k"]]) -> Float[Array, "n k"]:
    """Row tiles as one matrix."""
    return jnp.concatenate(parts)


def _none(rows: Float[Array, "m k"], spans: Sequence[tuple[int, int]]) -> list[TileFactors]:
    """Factors of rank 0."""
    empty = [np.zeros((0, b - a), np.int8) for a, b in spans]
    return [TileFactors(np.zeros((len(rows), 0), np.int8), v, np.zeros(0, np.float16)) for v in empty]


def rank_gains(
    E: Float[Array, "n k"], H: Float[Array, "k k"], G: Float[Array, "t m m"], columns: int, width: int
) -> list[list[Float[Array, "{width}"]]]:
    """½ σ² of the leading singular values of Rᵀ E L, falling, by row tile, then column tile: the nats that
    each rank is predicted to gain, G = R Rᵀ and H = L Lᵀ. Found as eigenvalues of Rᵀ E H Eᵀ R."""
    gains = []
    for i, (start, stop) in enumerate(tile_spans(E.shape[0], G.shape[1])):
        rows, felt = row_tile(E, G, i, stop - start)
        spans = tile_spans(E.shape[1], columns)
        gains.append([_tile_gains(rows[:, a:b], H[a:b, a:b], felt, width) for a, b in spans])
    return gains


@functools.partial(jax.jit, static_argnames="width")
def _tile_gains(
    E: Float[Array, "m c"], H: Float[Array, "c c"], G: Float[Array, "m m"], width: int
) -> Float[Array, "{width}"]:
    R = damped_cholesky(G, FACTOR_DAMPING)
    damped = H + FACTOR_DAMPING * jnp.mean(jnp.diagonal(H)) * jnp.eye(len(H))
    right = jnp.matmul(R.T, E, precision=HIGHEST)
    gram = jnp.matmul(jnp.matmul(right, damped, precision=HIGHEST), right.T, precision=HIGHEST)
    leading = 0.5 * jnp.maximum(jnp.linalg.eigvalsh(gram)[::-1][:width], 0.0)
    return jnp.pad(leading, (0, width - len(leading)))


def to_sidecar(
    factors: Sequence[Sequence[TileFactors]], shape: tuple[int, int], tile: tuple[int, int]
) -> Sidecar:
    """Lay the factors of every tile out as stored."""
    in_order = [each for row in factors for each in row]

    def joined(parts: Sequence[Array | np.ndarray]) -> Array:
        # Not `jnp.asarray`, which compiles a program for each length: nearly every linear has its own.
        return jax.device_put(np.concatenate([np.asarray(part).reshape(-1) for part in parts]))

    return Sidecar(
        u=joined([np.concatenate([each.u for each in row], axis=1) for row in factors]),
        v=joined([each.v for each in in_order]),
        scale=joined([each.scale for each in in_order]),
        shape=shape,
        tile=tile,
        ranks=tuple(tuple(len(each.scale) for each in row) for row in factors),
    )
