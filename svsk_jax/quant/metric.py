"""What an error costs: the second moment of a linear's input, and the sensitivity of the model to its
output."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST
MAX_DAMPING_STEPS = 8


def mix_moments(
    plain: Float[Array, "k k"], weighted: Float[Array, "k k"], share: float | jax.Array
) -> Float[Array, "k k"]:
    """(1 - share) E[x xᵀ] + share E[w x xᵀ], the second scaled to the trace of the first."""
    trace, other = jnp.trace(plain), jnp.trace(weighted)
    return (1 - share) * plain + share * weighted * (trace / jnp.where(other > 0, other, 1.0))


def shrink_to_diagonal(H: Float[Array, "*b k k"], amount: float | jax.Array) -> Float[Array, "*b k k"]:
    """(1 - amount) H + amount diag(H)."""
    eye = jnp.eye(H.shape[-1], dtype=H.dtype)
    return H * (1 - amount * (1 - eye))


def shrink_to_identity(G: Float[Array, "*b n n"], amount: float) -> Float[Array, "*b n n"]:
    """(1 - amount) G + amount m I, m the mean of its diagonal. As two programs: within one, whether products
    are rounded before they are added is XLA's choice."""
    return add_diagonal(*shares(G, amount))


@partial(jax.jit, static_argnames="amount")
def shares(G: Float[Array, "*b n n"], amount: float) -> tuple[Float[Array, "*b n n"], Float[Array, "*b"]]:
    """(1 - amount) G, and amount times the mean of its diagonal."""
    return (1 - amount) * G, amount * jnp.mean(jnp.diagonal(G, axis1=-2, axis2=-1), axis=-1)


@jax.jit
def add_diagonal(G: Float[Array, "*b n n"], level: Float[Array, "*b"]) -> Float[Array, "*b n n"]:
    """G + level I."""
    return G + level[..., None, None] * jnp.eye(G.shape[-1], dtype=G.dtype)


def damped_cholesky(
    H: Float[Array, "k k"], damping: float | jax.Array, order: Int[Array, "k"] | None = None
) -> Float[Array, "k k"]:
    """Lower L with L Lᵀ = H + d m I, m = mean(diag H); f32.

    d is `damping`, ten times as much after each failed factorisation. A dead channel (zero row and column) is
    left with d m on the diagonal. If H is zero or not finite throughout, L = I.

    With `order`, of H with its coordinates in that order. Beside H and L it takes one more [K, K].
    """
    diagonal = jnp.diagonal(H)
    mean = jnp.mean(diagonal if order is None else diagonal[order])
    usable = (mean > 0) & jnp.isfinite(mean)
    eye = jnp.eye(H.shape[-1], dtype=H.dtype)

    def factor(step: jax.Array) -> jax.Array:
        # Ordered again at each try: it is rarely a second one, and an ordered copy would stay till the end.
        ordered = H if order is None else H[order[:, None], order[None]]
        return jnp.linalg.cholesky(jnp.where(usable, ordered + damping * 10.0**step * mean * eye, eye))

    def failed(state):
        step, L = state
        return (step < MAX_DAMPING_STEPS) & ~jnp.all(jnp.isfinite(L))

    # The first try is one of the loop's, so that the factorisation is there, and compiled, once.
    untried = (jnp.float32(-1), jnp.full(H.shape, jnp.nan, H.dtype))
    _, L = jax.lax.while_loop(failed, lambda state: (state[0] + 1, factor(state[0] + 1)), untried)
    return jnp.where(jnp.all(jnp.isfinite(L)), L, eye)


def falling_order(h: Float[Array, "k"]) -> Int[Array, "k"]:
    """Indices by falling h, equal ones as they come, NaN last; int32. Each pair is compared: a sort takes XLA
    seconds to compile for a GPU."""
    h = jnp.where(jnp.isnan(h), -jnp.inf, h)
    index = jnp.arange(len(h), dtype=jnp.int32)
    is_before = (h[None] > h[:, None]) | ((h[None] == h[:, None]) & (index[None] < index[:, None]))
    return inverse_order(jnp.sum(is_before, axis=1, dtype=jnp.int32))


def inverse_order(order: Int[Array, "k"]) -> Int[Array, "k"]:
    """The order that undoes one; int32."""
    index = jnp.arange(len(order), dtype=jnp.int32)
    return jnp.zeros_like(index).at[order].set(index, unique_indices=True)


def inverse_factor(
    H: Float[Array, "k k"], damping: float | jax.Array
) -> tuple[Int[Array, "k"], Float[Array, "k k"]]:
    """(order, U): coordinates by falling Hₖₖ, and the upper U with H⁻¹ = Uᵀ U in that order, H damped.

    With J the reversal and J H J = L Lᵀ: H = (J L J)(J L J)ᵀ, whose factor is upper, so U = (J L J)⁻¹.
    """
    order = falling_order(jnp.diagonal(H))
    L = damped_cholesky(H, damping, order[::-1])
    inverse = jax.scipy.linalg.solve_triangular(L, jnp.eye(L.shape[0], dtype=L.dtype), lower=True)
    return order, inverse[::-1, ::-1]


def bands(rows: int, height: int) -> list[tuple[int, int, int]]:
    """Runs of row tiles of one height, (first row, tiles, their height): the whole tiles, then the ragged
    last one, which would cost as much as a whole one if it were padded."""
    whole = rows // height
    runs = [(0, whole, height), (whole * height, 1, rows - whole * height)]
    return [(first, tiles, size) for first, tiles, size in runs if tiles and size]


def band_blocks(G: Float[Array, "t m m"], band: tuple[int, int, int]) -> Float[Array, "tiles size size"]:
    """What of the padded blocks of G lies in a band of `bands`."""
    first, tiles, size = band
    start = first // G.shape[-1]
    return G[start : start + tiles, :size, :size]


@jax.jit
def nats(E: Float[Array, "n k"], H: Float[Array, "k k"], G: Float[Array, "t m m"]) -> Float[Array, ""]:
    """½ tr(G E H Eᵀ): the KL divergence per token, in nats, that the error E = W - Ŵ of a linear costs to
    second order, with input moment H and output sensitivity E[g gᵀ] in diagonal blocks G (Kronecker
    approximation); f32."""
    right = jnp.matmul(E, H, precision=HIGHEST)
    total = jnp.float32(0)
    for band in bands(E.shape[0], G.shape[1]):
        first, tiles, size = band
        left, tall = (x[first : first + tiles * size].reshape(tiles, size, -1) for x in (right, E))
        gram = jnp.einsum("tmk,tnk->tmn", left, tall, precision=HIGHEST)
        total += jnp.sum(band_blocks(G, band) * gram)
    return 0.5 * total
