"""What an error costs, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.quant.metric import (
    damped_cholesky,
    falling_order,
    inverse_factor,
    inverse_order,
    mix_moments,
    nats,
    shrink_to_diagonal,
    shrink_to_identity,
)


def moment(size, tokens, seed=0):
    x = np.random.default_rng(seed).standard_normal((tokens, size))
    return x.T @ x / tokens


def test_inverse_factor_factors_the_inverse():
    H = moment(24, 100) * np.geomspace(1, 30, 24)[:, None] * np.geomspace(1, 30, 24)
    order, U = inverse_factor(jnp.asarray(H, jnp.float32), 0.01)
    diagonal = np.diag(H)[np.asarray(order)]
    assert (np.diff(diagonal) <= 0).all()
    damped = H[np.ix_(order, order)] + 0.01 * np.mean(np.diag(H)) * np.eye(24)
    np.testing.assert_allclose(np.triu(U), U)
    factor = np.asarray(U, np.float64)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(24), atol=1e-3)


def test_the_order_is_a_stable_sort():
    h = jnp.asarray([2, 0.0, 7, 2, jnp.nan, -0.0, 7, -3, 2], jnp.float32)
    order = falling_order(h)
    np.testing.assert_array_equal(order, jnp.argsort(-h, stable=True))
    np.testing.assert_array_equal(inverse_order(order), jnp.argsort(order))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_singular_matrix_is_damped_until_it_factors(tokens):
    H = jnp.asarray(moment(16, tokens), jnp.float32)
    L = damped_cholesky(H, 1e-9)
    assert jnp.isfinite(L).all()
    np.testing.assert_allclose(L @ L.T, H, atol=0.2 * float(jnp.mean(jnp.diagonal(H))))


def test_nothing_known_is_the_identity():
    np.testing.assert_array_equal(damped_cholesky(jnp.zeros((4, 4)), 0.01), jnp.eye(4))


def test_nats_are_half_the_trace():
    rng = np.random.default_rng(1)
    E, H = rng.standard_normal((10, 6)), moment(6, 50)
    G = np.zeros((12, 12))
    G[:4, :4], G[4:8, 4:8], G[8:10, 8:10] = moment(4, 20, 2), moment(4, 20, 3), moment(2, 20, 4)
    blocks = np.stack([G[i : i + 4, i : i + 4] for i in (0, 4, 8)])
    expected = 0.5 * np.trace(G[:10, :10] @ E @ H @ E.T)
    actual = nats(*(jnp.asarray(x, jnp.float32) for x in (E, H, blocks)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_mixing_keeps_the_trace_and_shrinking_the_diagonal():
    H, other = jnp.asarray(moment(8, 30), jnp.float32), jnp.asarray(7 * moment(8, 30, 5), jnp.float32)
    mixed = mix_moments(H, other, 0.5)
    np.testing.assert_allclose(jnp.trace(mixed), jnp.trace(H), rtol=1e-5)
    np.testing.assert_allclose(
        mixed - 0.5 * H, 0.5 * other * jnp.trace(H) / jnp.trace(other), rtol=1e-4, atol=1e-6
    )
    shrunk = shrink_to_diagonal(H, 0.25)
    np.testing.assert_allclose(jnp.diagonal(shrunk), jnp.diagonal(H), rtol=1e-6)
    np.testing.assert_allclose(shrunk[0, 1], 0.75 * H[0, 1], rtol=1e-6)


def test_shrinking_to_the_identity_keeps_the_trace():
    G = jnp.asarray([[[6.0, 2.0], [2.0, 2.0]]])
    np.testing.assert_allclose(shrink_to_identity(G, 0.5)[0], [[5, 1], [1, 3]])
