"""Codes are the nearest ones, and two-level scales fit the weights that they are made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svsk_jax.quant.codebook import LINEAR, decode, nearest_codes, round_to_level
from svsk_jax.quant.scale_search import imatrix_importance, search_two_level

PAIRS = [LINEAR, (0.008, 0.3), (0.02, 0.0)]
SHAPE = (6, 300)
jit_nearest = jax.jit(nearest_codes)


def stored(pair):
    return jnp.asarray(pair, jnp.float16).astype(jnp.float32)


def exact_levels(pair):
    a, shift = np.asarray(stored(pair), np.float64)
    t = np.arange(16) - 7.5
    return t + a * t**3 - shift


def restore(W, integers, super_scales, pair, group):
    """Ŵ in float64, each weight at its best level."""
    steps = np.repeat(np.asarray(super_scales, np.float64), 256 // group, axis=1)
    integers = np.asarray(integers, np.float64)
    scale = np.repeat(integers * steps[:, : integers.shape[1]], group, axis=1)[:, : W.shape[1]]
    choices = scale[..., None] * exact_levels(pair)
    best = np.abs(W[..., None] - choices).argmin(-1)
    return np.take_along_axis(choices, best[..., None], axis=-1)[..., 0]


def search(W, importance, pair, group):
    return search_two_level(
        jnp.asarray(W, jnp.float32), jnp.asarray(importance, jnp.float32), stored(pair), group
    )


def draw(seed):
    rng = np.random.default_rng(seed)
    W = rng.standard_t(4, SHAPE) * rng.choice([1e-3, 1.0, 30.0])
    return W.astype(np.float32), rng.gamma(0.5, size=SHAPE).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), pair=st.sampled_from(PAIRS), spread=st.sampled_from([0.5, 4.0, 20.0]))
def test_the_code_is_the_nearest_of_sixteen(seed, pair, spread):
    z = (np.random.default_rng(seed).standard_normal(200) * spread).astype(np.float32)
    distance = np.abs(z[:, None] - exact_levels(pair))
    codes = np.asarray(jit_nearest(jnp.asarray(z), stored(pair)))
    nearest, second = np.sort(distance, axis=1)[:, :2].T
    clear = second - nearest > 1e-5
    np.testing.assert_array_equal(codes[clear], distance.argmin(1)[clear])
    assert codes.min() >= 0
    assert codes.max() <= 15


def test_a_level_is_its_own_nearest():
    for pair in PAIRS:
        codes = jnp.arange(16)
        z = decode(codes, stored(pair))
        np.testing.assert_allclose(z, exact_levels(pair), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(nearest_codes(z, stored(pair)), codes)


def test_linear_levels_and_ties():
    np.testing.assert_array_equal(decode(jnp.arange(16), stored(LINEAR)), np.arange(16) - 8)
    halves = jnp.arange(15, dtype=jnp.float32) - 7.5
    np.testing.assert_array_equal(nearest_codes(halves, stored(LINEAR)), np.arange(15))


def test_scales_may_be_negative_or_zero():
    w = jnp.linspace(-3, 3, 41)
    for scale in (0.5, -0.5):
        restored = (
            scale
            * exact_levels((0.008, 0.3))[
                np.asarray(round_to_level(w, jnp.full(41, scale), stored((0.008, 0.3))))
            ]
        )
        best = np.abs(np.asarray(w)[:, None] - scale * exact_levels((0.008, 0.3))).min(1)
        np.testing.assert_allclose(np.abs(np.asarray(w) - restored), best, atol=1e-6)
    codes = np.asarray(round_to_level(w, jnp.zeros(41), stored(LINEAR)))
    assert set(codes) <= set(range(16))


def test_importance_of_the_imatrix():
    W, _ = draw(0)
    h = np.random.default_rng(1).gamma(0.5, size=SHAPE[1])
    wide = W.astype(np.float64)
    mean = np.empty(SHAPE)
    for start in range(0, SHAPE[1], 16):
        mean[:, start : start + 16] = (wide[:, start : start + 16] ** 2).mean(1, keepdims=True)
    found = imatrix_importance(jnp.asarray(W), jnp.asarray(h, jnp.float32), 16)
    np.testing.assert_allclose(found, h * np.sqrt(2 * mean + wide**2), rtol=1e-5)


@pytest.mark.parametrize("pair", PAIRS[:2])
@pytest.mark.parametrize("group", [16, 32])
def test_weights_on_the_grid_come_back(pair, group):
    rng = np.random.default_rng(0)
    n, k = SHAPE
    groups = -(-k // group)
    codes = rng.integers(0, 16, SHAPE)
    codes[:, ::group] = 0
    integers = rng.integers(5, 32, (n, groups)) * rng.choice([-1, 1], (n, groups))
    integers[:, :: 256 // group] = -32
    steps = np.repeat(rng.choice([0.5, -0.25, 3.0], (n, 2)), 256 // group, axis=1)[:, :groups]
    W = np.repeat(integers * steps, group, axis=1)[:, :k] * exact_levels(pair)[codes]
    found, supers = search(W, np.ones(SHAPE), pair, group)
    restored = restore(W, found, supers, pair, group)
    assert ((W - restored) ** 2).sum() < 1e-9 * (W**2).sum()


def naive(W, pair, group):
    """Each group's peak to the outermost level, the largest scale to 31, round to nearest."""
    n, k = W.shape
    padded = np.pad(W, ((0, 0), (0, -k % group))).reshape(n, -1, group)
    scales = np.abs(padded).max(-1) / np.abs(exact_levels(pair)).max()
    supers = []
    for start in range(0, scales.shape[1], 256 // group):
        supers.append(scales[:, start : start + 256 // group].max(1) / 31)
    supers = np.stack(supers, axis=1).astype(np.float16)
    steps = np.repeat(supers.astype(np.float64), 256 // group, axis=1)[:, : scales.shape[1]]
    return restore(W, np.clip(np.round(scales / steps), -32, 31), supers, pair, group)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), pair=st.sampled_from(PAIRS[:2]), group=st.sampled_from([16, 32]))
def test_better_than_peak_scales(seed, pair, group):
    W, importance = draw(seed)
    integers, supers = search(W, importance, pair, group)
    assert integers.dtype == jnp.int8
    assert integers.shape == (6, -(-300 // group))
    assert supers.shape == (6, 2)
    assert supers.dtype == jnp.float16
    assert integers.min() >= -32
    assert integers.max() <= 31
    found = (importance * (W - restore(W, integers, supers, pair, group)) ** 2).sum(1)
    plain = (importance * (W - naive(W, pair, group)) ** 2).sum(1)
    assert (found < plain).all()
    assert found.sum() < 0.9 * plain.sum()


def test_important_weights_are_fitted_better():
    W, _ = draw(3)
    focus = (np.random.default_rng(0).random(SHAPE) < 0.1).astype(np.float32)
    errors = []
    for importance in (1e-3 + 100 * focus, np.ones(SHAPE)):
        errors.append((focus * (W - restore(W, *search(W, importance, LINEAR, 16), LINEAR, 16)) ** 2).sum())
    assert errors[0] < 0.5 * errors[1]


def test_only_ratios_of_importance_count():
    W, importance = draw(4)
    first, second = (search(W, importance * factor, LINEAR, 16) for factor in (1.0, 2.0**-40))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-7, 6e4, 1e8])
@pytest.mark.parametrize("weight", [1.0, 0.0, 1e-30])
def test_odd_groups_stay_finite(value, weight):
    W = np.zeros(SHAPE, np.float32)
    W[0, [3, 299]] = value
    W[1, :16] = 1
    integers, supers = search(W, np.full(SHAPE, weight), (0.008, 0.3), 16)
    assert np.isfinite(np.asarray(supers, np.float32)).all()
    restored = restore(W, integers, supers, (0.008, 0.3), 16)
    np.testing.assert_array_equal(restored[2:], 0)
    np.testing.assert_allclose(restored[1, :16], 1, rtol=1e-2)
    np.testing.assert_array_equal(restored[1, 16:], 0)
    if value == 6e4:
        np.testing.assert_allclose(restored[0, [3, 299]], value, rtol=1e-2)


def test_rows_do_not_see_each_other():
    W, importance = draw(5)
    order = np.random.default_rng(0).permutation(SHAPE[0])
    plain = search(W, importance, LINEAR, 16)
    permuted = search(W[order], importance[order], LINEAR, 16)
    for a, b in zip(plain, permuted, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[order], b)
