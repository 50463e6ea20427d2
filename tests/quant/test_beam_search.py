"""Roundings of a row that are followed side by side, against the whole tree of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_error_feedback import COMPANDED, cost, error, exact_levels, f32, problem, row_factors, run

from svsk_jax.quant.codebook import LINEAR
from svsk_jax.quant.error_feedback import feedback
from svsk_jax.quant.metric import inverse_factor


def beams(W, scales, columns, width, rows=None, pair=LINEAR):
    pair = jnp.asarray(pair, jnp.float16).astype(jnp.float32)
    codes = feedback(f32(W), f32(scales), pair, columns, rows, row_block=16, beam_width=width)
    assert codes.shape == W.shape
    assert codes.dtype == jnp.uint8
    return np.asarray(codes)


def damped_cost(E, columns):
    """Σ (e_k / U_kk)² over columns in their order, which is E H Eᵀ with the damped H."""
    order, U = np.asarray(columns[0]), np.asarray(columns[1], np.float64)
    return np.sum(np.linalg.solve(U.T, E[:, order].T) ** 2, axis=0)


def cheapest_leaf(w, s, U, levels):
    """Depth-first through the two levels on either side of each weight; the least cost, float64."""
    if not len(w):
        return 0.0
    distance = np.abs(w[0] - s[0] * levels)
    nearest = distance.argmin()
    above = (w[0] - s[0] * levels[nearest]) * np.sign(s[0]) > 0
    costs = []
    for code in (nearest, nearest + (1 if above else -1)):
        if 0 <= code <= 15:
            miss = (w[0] - s[0] * levels[code]) / U[0, 0]
            costs.append(miss**2 + cheapest_leaf(w[1:] - miss * U[0, 1:], s[1:], U[1:, 1:], levels))
    return min(costs)


@pytest.mark.parametrize("pair", [LINEAR, COMPANDED])
def test_enough_beams_find_the_cheapest_leaf_of_the_tree(pair):
    W, scales, H, _ = problem(6, 7)
    columns = jax.jit(inverse_factor)(f32(H), 0.01)
    codes = beams(W, scales, columns, 128, pair=pair)
    found = damped_cost(error(W, scales, codes, pair), columns)
    order, U = np.asarray(columns[0]), np.asarray(columns[1], np.float64)
    for row in range(6):
        best = cheapest_leaf(W[row, order].astype(np.float64), scales[row, order], U, exact_levels(pair))
        np.testing.assert_allclose(found[row], best, rtol=1e-4)


def test_more_beams_cost_less():
    W, scales, H, G = problem(40, 150)
    columns, rows = jax.jit(inverse_factor)(f32(H), 0.01), row_factors(G, 40)
    for metric, weight in ((None, None), (rows, G)):
        costs = [cost(error(W, scales, run(W, scales, columns, metric)), H, weight)]
        costs += [
            cost(error(W, scales, beams(W, scales, columns, width, metric)), H, weight) for width in (4, 16)
        ]
        assert costs[2] < costs[1] < 0.99 * costs[0]


def test_weights_past_the_outermost_levels_and_zero_scales():
    W, scales, H, _ = problem(8, 40)
    scales[:, 16:32] = 0
    codes = beams(10 * W, scales, jax.jit(inverse_factor)(f32(H), 0.01), 4)
    assert codes.max() <= 15
    W, scales, _, _ = problem(8, 40)
    dead = beams(10 * W, scales, jax.jit(inverse_factor)(jnp.zeros((40, 40)), 0.01), 4)
    np.testing.assert_array_equal(
        dead, run(10 * W, scales, jax.jit(inverse_factor)(jnp.zeros((40, 40)), 0.01))
    )


def test_permuted_rows_permute_the_codes():
    W, scales, H, _ = problem(40, 150)
    columns = jax.jit(inverse_factor)(f32(H), 0.01)
    order = np.random.default_rng(1).permutation(40)
    np.testing.assert_array_equal(
        beams(W[order], scales[order], columns, 4), beams(W, scales, columns, 4)[order]
    )
