"""The scale search does what its docstring says."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svsk_jax.quant.native_q4 import search_scales


def weighted_error(W, codes, scales, h, group):
    scale = np.repeat(np.asarray(scales, np.float64), group, axis=1)[:, : W.shape[1]]
    return (h * (W - scale * codes) ** 2).sum()


def draw(seed, shape):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal(shape).astype(np.float32) * rng.choice([1e-3, 1.0, 30.0])
    return W, rng.gamma(0.5, size=shape[1]).astype(np.float32)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(5, 64), (3, 130), (4, 20)]))
def test_never_worse_than_round_to_nearest(seed, shape):
    W, h = draw(seed, shape)
    codes, scales = search_scales(jnp.asarray(W), jnp.asarray(h), 64)
    assert codes.dtype == jnp.int8
    assert codes.min() >= -8
    assert codes.max() <= 7
    padded = np.pad(W, ((0, 0), (0, -shape[1] % 64))).reshape(shape[0], -1, 64)
    plain = (np.abs(padded).max(-1) / 7).astype(np.float16)
    step = np.repeat(plain.astype(np.float64), 64, axis=1)[:, : shape[1]]
    nearest = np.clip(np.round(W / step), -8, 7)
    found = weighted_error(W, np.asarray(codes), scales, h, 64)
    assert found <= weighted_error(W, nearest, plain, h, 64) * (1 + 1e-5)


def test_scale_is_the_least_squares_scale_of_its_codes():
    W, h = draw(0, (16, 64))
    codes, scales = search_scales(jnp.asarray(W), jnp.asarray(h), 64)
    c = np.asarray(codes, np.float64)
    best = (h * W * c).sum(1) / (h * c * c).sum(1)
    # f16 rounding, and codes rounded once more after the refit, leave a little.
    np.testing.assert_allclose(np.asarray(scales, np.float64)[:, 0], best, rtol=0.02)


def test_weights_on_the_grid_are_exact():
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (8, 128))
    codes[:, [0, 64]] = -8
    scales = rng.choice([0.5, -0.25, 2.0], (8, 2))
    W = np.repeat(scales, 64, axis=1) * codes
    found, found_scales = search_scales(jnp.asarray(W, jnp.float32), jnp.ones(128), 64)
    np.testing.assert_array_equal(
        np.repeat(np.asarray(found_scales, np.float32), 64, axis=1) * np.asarray(found), W
    )


def test_important_columns_are_fitted_better():
    W, _ = draw(3, (64, 64))
    h = np.full(64, 1e-3, np.float32)
    h[:4] = 100
    codes, scales = search_scales(jnp.asarray(W), jnp.asarray(h), 64)
    even, even_scales = search_scales(jnp.asarray(W), jnp.ones(64), 64)
    important = np.where(np.arange(64) < 4, 1.0, 0.0)
    focused = weighted_error(W, np.asarray(codes), scales, important, 64)
    assert focused < 0.7 * weighted_error(W, np.asarray(even), even_scales, important, 64)


@pytest.mark.parametrize("value", [0.0, 1e-12, 6e4])
def test_degenerate_groups_stay_finite(value):
    W = np.zeros((2, 64), np.float32)
    W[0, 3] = value
    for h in (np.ones(64), np.zeros(64), np.full(64, 1e-30)):
        codes, scales = search_scales(jnp.asarray(W), jnp.asarray(h, jnp.float32), 64)
        restored = np.asarray(scales, np.float32) * np.asarray(codes)
        assert np.isfinite(restored).all()
        np.testing.assert_array_equal(restored[1], 0)
        if value == 6e4:
            np.testing.assert_allclose(restored[0, 3], value, rtol=1e-3)


def test_rows_are_independent():
    W, h = draw(5, (12, 192))
    order = np.random.default_rng(0).permutation(12)
    codes, scales = search_scales(jnp.asarray(W), jnp.asarray(h), 64)
    permuted, permuted_scales = search_scales(jnp.asarray(W[order]), jnp.asarray(h), 64)
    np.testing.assert_array_equal(np.asarray(codes)[order], permuted)
    np.testing.assert_array_equal(np.asarray(scales)[order], permuted_scales)
