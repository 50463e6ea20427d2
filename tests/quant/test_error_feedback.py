"""Error feedback trades weight error for output error, across columns and across rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.quant.codebook import LINEAR, decode, nearest_codes, round_to_level
from svsk_jax.quant.error_feedback import feedback
from svsk_jax.quant.metric import inverse_factor, nats

COEFFICIENTS = jnp.asarray((0.008, 0.3), jnp.float32)


def spd(rng, size, tokens):
    """A second moment of `tokens` correlated vectors."""
    x = rng.standard_normal((tokens, size)) @ (np.eye(size) + 0.5 * rng.standard_normal((size, size)))
    return jnp.asarray(x.T @ x / tokens, jnp.float32)


def case(n, k, seed=0):
    rng = np.random.default_rng(seed)
    W = jnp.asarray(rng.standard_normal((n, k)), jnp.float32)
    scales = jnp.asarray(rng.uniform(0.2, 0.4, (n, k)) * rng.choice([-1, 1], (n, k)), jnp.float32)
    return rng, W, scales


def residual(W, scales, codes):
    return W - scales * decode(codes, COEFFICIENTS)


@pytest.mark.parametrize("coefficients", [LINEAR, (0.011, 0.3)])
def test_nearest_code_is_the_nearest(coefficients):
    pair = jnp.asarray(coefficients, jnp.float32)
    z = np.random.default_rng(0).uniform(-15, 15, 2000).astype(np.float32)
    levels = np.asarray(decode(jnp.arange(16), pair), np.float64)
    expected = np.argmin(np.abs(z[:, None] - levels), axis=1)
    np.testing.assert_array_equal(nearest_codes(jnp.asarray(z), pair), expected)
    if coefficients == LINEAR:
        np.testing.assert_array_equal(levels, np.arange(16) - 8)


@pytest.mark.parametrize(("n", "k"), [(24, 64), (20, 75)])
def test_output_error_falls_while_weight_error_rises(n, k):
    rng, W, scales = case(n, k)
    H = spd(rng, k, 200)
    eye = jnp.eye(n)[None]
    nearest = residual(W, scales, round_to_level(W, scales, COEFFICIENTS))
    fed = residual(W, scales, feedback(W, scales, COEFFICIENTS, inverse_factor(H, 0.01)))
    assert nats(fed, H, eye) < 0.8 * nats(nearest, H, eye)
    assert jnp.sum(fed**2) > jnp.sum(nearest**2)


def test_columns_follow_the_plain_algorithm():
    """GPTQ, column by column in float64."""
    rng, W, scales = case(8, 40)
    H = spd(rng, 40, 100)
    order, U = (np.asarray(x) for x in inverse_factor(H, 0.01))
    levels = np.asarray(decode(jnp.arange(16), COEFFICIENTS), np.float64)
    w, s, expected = np.array(W, np.float64), np.asarray(scales, np.float64), np.zeros((8, 40), int)
    for place, column in enumerate(order):
        codes = np.argmin(np.abs(w[:, column, None] - s[:, column, None] * levels), axis=1)
        error = (w[:, column] - s[:, column] * levels[codes]) / U[place, place]
        w[:, order] -= np.outer(error, np.where(np.arange(40) > place, U[place], 0))
        expected[:, column] = codes
    actual = feedback(W, scales, COEFFICIENTS, (jnp.asarray(order), jnp.asarray(U)))
    assert np.mean(np.asarray(actual) == expected) > 0.99


@pytest.mark.parametrize(("n", "tile"), [(48, 48), (40, 24)])
def test_rows_make_up_for_one_another(n, tile):
    rng, W, scales = case(n, 32, seed=1)
    H = spd(rng, 32, 100)
    tiles = -(-n // tile)
    sizes = [min(tile, n - tile * index) for index in range(tiles)]
    G = jnp.stack([jnp.pad(spd(rng, size, 300), ((0, tile - size), (0, tile - size))) for size in sizes])
    factors = [inverse_factor(block, 0.01) for block in G]
    rows = (jnp.stack([order for order, _ in factors]), jnp.stack([U for _, U in factors]))
    columns = inverse_factor(H, 0.01)
    alone = residual(W, scales, feedback(W, scales, COEFFICIENTS, columns))
    both = residual(W, scales, feedback(W, scales, COEFFICIENTS, columns, rows, row_block=8))
    assert nats(both, H, G) < 0.7 * nats(alone, H, G)


def test_uncorrelated_outputs_need_no_row_feedback():
    rng, W, scales = case(20, 32, seed=2)
    columns = inverse_factor(spd(rng, 32, 100), 0.01)
    rows = (jnp.arange(20)[None], jnp.eye(20)[None])
    np.testing.assert_array_equal(
        feedback(W, scales, COEFFICIENTS, columns, rows, row_block=8),
        feedback(W, scales, COEFFICIENTS, columns),
    )


def test_permuted_rows_give_permuted_codes():
    rng, W, scales = case(16, 32, seed=3)
    columns = inverse_factor(spd(rng, 32, 100), 0.01)
    order = jnp.asarray(rng.permutation(16))
    np.testing.assert_array_equal(
        feedback(W[order], scales[order], COEFFICIENTS, columns),
        feedback(W, scales, COEFFICIENTS, columns)[order],
    )


def test_dead_channels_and_zero_scales():
    rng, W, scales = case(8, 32, seed=4)
    H = spd(rng, 32, 100).at[5].set(0).at[:, 5].set(0)
    scales = scales.at[:, 8:16].set(0)
    codes = feedback(W, scales, COEFFICIENTS, inverse_factor(H, 0.01))
    assert jnp.isfinite(residual(W, scales, codes)).all()
    np.testing.assert_array_equal(
        codes[:, 5], round_to_level(W[:, 5], scales[:, 5], COEFFICIENTS).astype(jnp.uint8)
    )
