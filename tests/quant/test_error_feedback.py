"""Error feedback against plain float64 loops, and what it does to the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.quant.codebook import LINEAR
from svsk_jax.quant.error_feedback import feedback
from svsk_jax.quant.metric import inverse_factor

COMPANDED = (0.008, 0.3)
ROW_BLOCK = 16
jit_factor = jax.jit(inverse_factor)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def moment(rng, size):
    """A few strong directions under noise, with channels of very different size."""
    x = rng.standard_normal((400, 6)) @ rng.standard_normal((6, size)) + 0.3 * rng.standard_normal(
        (400, size)
    )
    x *= rng.gamma(1.0, size=size) + 0.1
    return x.T @ x / 400


def problem(n, k, seed=0):
    """W and scales [n, k], H, G."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((n, k)).astype(np.float32)
    scales = np.repeat(rng.uniform(0.15, 0.4, (n, -(-k // 16))) * rng.choice([-1, 1]), 16, axis=1)[:, :k]
    return W, scales.astype(np.float32), moment(rng, k), moment(rng, n)


def exact_levels(pair):
    a, shift = np.asarray(pair, np.float16).astype(np.float64)
    t = np.arange(16) - 7.5
    return t + a * t**3 - shift


def nearest(w, s, pair):
    return np.abs(w[..., None] - s[..., None] * exact_levels(pair)).argmin(-1)


def blocks_of(G, height):
    """G cut into diagonal blocks, the last one filled up with zeros."""
    padded = np.pad(G, ((0, -len(G) % height),) * 2)
    return np.stack([padded[a : a + height, a : a + height] for a in range(0, len(G), height)])


def row_factors(G, height):
    factors = [jit_factor(block, 0.01) for block in f32(blocks_of(G, height))]
    return jnp.stack([order for order, _ in factors]), jnp.stack([U for _, U in factors])


def run(W, scales, columns, rows=None, pair=LINEAR, row_block=ROW_BLOCK):
    pair = jnp.asarray(pair, jnp.float16).astype(jnp.float32)
    codes = feedback(f32(W), f32(scales), pair, columns, rows, row_block=row_block)
    assert codes.shape == W.shape
    assert codes.dtype == jnp.uint8
    assert codes.max() <= 15
    return np.asarray(codes)


def error(W, scales, codes, pair=LINEAR):
    return W - scales.astype(np.float64) * exact_levels(pair)[codes]


def plain_columns(W, scales, columns, pair):
    """One column after another, for rows of one matrix."""
    order, U = np.asarray(columns[0]), np.asarray(columns[1], np.float64)
    W, codes = W.astype(np.float64), np.zeros(W.shape, int)
    for i, column in enumerate(order):
        codes[:, column] = nearest(W[:, column], scales[:, column], pair)
        miss = W[:, column] - scales[:, column] * exact_levels(pair)[codes[:, column]]
        W[:, order[i + 1 :]] -= np.outer(miss / U[i, i], U[i, i + 1 :])
    return codes


def plain_both(W, scales, columns, rows, G, height, pair):
    """Row block after row block of each tile; the rows still to come minimise tr(G E H Eᵀ), solved in G
    itself."""
    W, codes = W.astype(np.float64), np.zeros(W.shape, int)
    for tile, block in enumerate(blocks_of(G, height)):
        damped = block + 0.01 * np.diag(block).mean() * np.eye(height)
        order = np.asarray(rows[0][tile])
        for start in range(0, height, ROW_BLOCK):
            now, later = order[start : start + ROW_BLOCK], order[start + ROW_BLOCK :]
            here = now[now + tile * height < len(W)] + tile * height
            codes[here] = plain_columns(W[here], scales[here], columns, pair)
            miss = np.zeros((len(now), W.shape[1]))
            miss[now + tile * height < len(W)] = W[here] - scales[here] * exact_levels(pair)[codes[here]]
            shift = np.linalg.solve(damped[np.ix_(later, later)], damped[np.ix_(later, now)] @ miss)
            there = later + tile * height < len(W)
            W[later[there] + tile * height] += shift[there]
    return codes


def assert_alike(codes, expected):
    """Equal, but for rows in which a tie fell the other way."""
    assert (codes == expected).all(1).mean() > 0.95


def cost(E, H, G=None):
    return np.sum((E @ H @ E.T) * (np.eye(len(E)) if G is None else G))


@pytest.mark.parametrize(
    ("shape", "pair"), [((40, 150), COMPANDED), ((40, 150), LINEAR), ((40, 64), COMPANDED), ((3, 5), LINEAR)]
)
def test_columns_against_a_plain_loop(shape, pair):
    W, scales, H, _ = problem(*shape)
    columns = jit_factor(f32(H), 0.01)
    codes = run(W, scales, columns, pair=pair)
    assert_alike(codes, plain_columns(W, scales, columns, pair))


@pytest.mark.parametrize("height", [40, 24])
def test_rows_against_a_plain_loop(height):
    """One tile that no row block divides; two tiles, the last one filled up."""
    W, scales, H, G = problem(40, 150)
    columns, rows = jit_factor(f32(H), 0.01), row_factors(G, height)
    codes = run(W, scales, columns, rows, COMPANDED)
    expected = plain_both(W, scales, columns, rows, G, height, COMPANDED)
    # A tie that falls the other way changes the rows that come later too.
    assert (codes == expected).mean() > 0.98


def test_columns_trade_weight_error_for_output_error():
    W, scales, H, _ = problem(40, 150)
    plain = error(W, scales, nearest(W, scales, LINEAR))
    fed = error(W, scales, run(W, scales, jit_factor(f32(H), 0.01)))
    assert cost(fed, H) < 0.5 * cost(plain, H)
    assert (fed**2).sum() > 1.1 * (plain**2).sum()


@pytest.mark.parametrize(("height", "share"), [(40, 0.8), (24, 0.95)])
def test_rows_lower_the_cost_to_the_model(height, share):
    """Less so in small tiles, within which fewer rows are left to make up for the others."""
    W, scales, H, G = problem(40, 150)
    columns = jit_factor(f32(H), 0.01)
    metric = np.zeros((48, 48))
    for tile, block in enumerate(blocks_of(G, height)):
        metric[tile * height : (tile + 1) * height, tile * height : (tile + 1) * height] = block
    metric = metric[:40, :40]
    alone = error(W, scales, run(W, scales, columns))
    both = error(W, scales, run(W, scales, columns, row_factors(G, height)))
    assert cost(both, H, metric) < share * cost(alone, H, metric)
    assert cost(alone, H) < cost(both, H)


@pytest.mark.parametrize("height", [40, 24])
def test_outputs_that_matter_alike_leave_columns_alone(height):
    W, scales, H, _ = problem(40, 150)
    columns = jit_factor(f32(H), 0.01)
    tiles = -(-40 // height)
    order = jnp.broadcast_to(jnp.arange(height), (tiles, height))
    eye = jnp.broadcast_to(jnp.eye(height), (tiles, height, height))
    np.testing.assert_array_equal(run(W, scales, columns, (order, eye)), run(W, scales, columns))


def test_permuted_rows_permute_the_codes():
    W, scales, H, _ = problem(40, 150)
    columns = jit_factor(f32(H), 0.01)
    order = np.random.default_rng(1).permutation(40)
    rows = (jnp.arange(40)[None], jnp.eye(40)[None])
    for metric in (None, rows):
        np.testing.assert_array_equal(
            run(W[order], scales[order], columns, metric), run(W, scales, columns, metric)[order]
        )


def test_the_order_of_rows_is_the_order_of_rounding():
    """Naming the rows differently, in W and G alike, changes nothing."""
    W, scales, H, G = problem(40, 150)
    columns = jit_factor(f32(H), 0.01)
    shuffle = np.random.default_rng(2).permutation(40)
    plain = run(W, scales, columns, row_factors(G, 40))
    shuffled = run(W[shuffle], scales[shuffle], columns, row_factors(G[shuffle][:, shuffle], 40))
    assert (plain[shuffle] == shuffled).mean() > 0.98


def test_a_wide_row_block_is_columns_alone():
    W, scales, H, G = problem(40, 150)
    columns = jit_factor(f32(H), 0.01)
    np.testing.assert_array_equal(
        run(W, scales, columns, row_factors(G, 40), row_block=64), run(W, scales, columns)
    )


def test_dead_channels_are_rounded_to_nearest_and_spoil_nothing():
    W, scales, H, _ = problem(40, 150)
    dead = np.r_[0, 3:20, 149]
    H[dead], H[:, dead] = 0, 0
    codes = run(W, scales, jit_factor(f32(H), 0.01))
    plain = nearest(W, scales, LINEAR)
    np.testing.assert_array_equal(codes[:, dead], plain[:, dead])
    assert cost(error(W, scales, codes), H) < 0.5 * cost(error(W, scales, plain), H)


def test_an_input_never_seen_and_zero_scales():
    W, scales, _, G = problem(40, 150)
    columns = jit_factor(jnp.zeros((150, 150)), 0.01)
    np.testing.assert_array_equal(run(W, scales, columns), nearest(W, scales, LINEAR))
    scales[:, 32:64] = 0
    run(W, scales, columns, row_factors(G, 40))


def test_rows_on_the_grid_are_kept():
    _, scales, H, G = problem(40, 150)
    codes = np.random.default_rng(3).integers(0, 16, (40, 150))
    W = (scales * exact_levels(COMPANDED)[codes]).astype(np.float32)
    found = run(W, scales, jit_factor(f32(H), 0.01), row_factors(G, 24), COMPANDED)
    np.testing.assert_array_equal(found, codes)
