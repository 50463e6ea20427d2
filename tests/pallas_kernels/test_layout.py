"""Packing is exact and takes the bytes that the format says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.svsk_matmul.layout import (
    levels,
    pack_codes,
    pack_int6,
    tile_spans,
    unpack_codes,
    unpack_int6,
)
from pallas_kernels.svsk_matmul.reference import dequantize, dequantize_sidecar, matmul
from pallas_kernels.svsk_matmul.types import Int8Weight, Sidecar, SVSKWeight

shapes = st.sampled_from([(1, 1), (2, 3), (5, 4), (1, 69), (9, 70)])


@settings(deadline=None, max_examples=30)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_codes_round_trip(shape, seed):
    codes = np.random.default_rng(seed).integers(0, 16, shape).astype(np.uint8)
    packed = pack_codes(jnp.asarray(codes))
    assert packed.shape == (shape[0], -(-shape[1] // 2))
    np.testing.assert_array_equal(unpack_codes(packed, shape[1]), codes)


@settings(deadline=None, max_examples=30)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_int6_round_trip(shape, seed):
    values = np.random.default_rng(seed).integers(-32, 32, shape).astype(np.int8)
    packed = pack_int6(jnp.asarray(values))
    assert packed.shape == (shape[0], -(-6 * shape[1] // 8))
    np.testing.assert_array_equal(unpack_int6(packed, shape[1]), values)


def test_code_layout_is_low_nibble_first():
    packed = pack_codes(jnp.asarray([[1, 2, 3]], jnp.uint8))
    np.testing.assert_array_equal(packed, [[0x21, 0x03]])


def test_levels_of_both_codebooks():
    codes = jnp.arange(16, dtype=jnp.uint8)[None]
    np.testing.assert_array_equal(levels(codes, None)[0], np.arange(16) - 8)
    coefficients = jnp.asarray([0.011, 0.3], jnp.float16)
    a, delta = np.asarray(coefficients, np.float64)
    t = np.arange(16) - 7.5
    np.testing.assert_allclose(levels(codes, coefficients)[0], t + a * t**3 - delta, rtol=1e-6)


def random_weight(rng, shape, group, two_level, companded, tile, ranks):
    n, k = shape
    groups = -(-k // group)
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    int6 = rng.integers(-32, 32, (n, groups)).astype(np.int8)
    supers = rng.standard_normal((n, -(-k // 256))).astype(np.float16)
    flat = rng.standard_normal((n, groups)).astype(np.float16)
    coefficients = np.asarray([0.011, 0.3], np.float16)
    sidecar = None
    dense = np.zeros(shape)
    if tile is not None:
        rows, columns = tile_spans(n, tile[0]), tile_spans(k, tile[1])
        us, vs, scales = [], [], []
        for (r0, r1), row_ranks in zip(rows, ranks, strict=True):
            u_parts = []
            for (c0, c1), rank in zip(columns, row_ranks, strict=True):
                u = rng.integers(-127, 128, (r1 - r0, rank))
                v = rng.integers(-127, 128, (rank, c1 - c0))
                scale = rng.random(rank).astype(np.float16)
                dense[r0:r1, c0:c1] = u @ np.diag(scale.astype(np.float64)) @ v / 2**14
                u_parts.append(u)
                vs.append(v.ravel())
                scales.append(scale)
            us.append(np.concatenate(u_parts, axis=1).ravel())
        sidecar = Sidecar(
            u=jnp.asarray(np.concatenate(us), jnp.int8),
            v=jnp.asarray(np.concatenate(vs), jnp.int8),
            scale=jnp.asarray(np.concatenate(scales), jnp.float16),
            shape=shape,
            tile=tile,
            ranks=ranks,
        )
    weight = SVSKWeight(
        codes=pack_codes(jnp.asarray(codes)),
        scales=pack_int6(jnp.asarray(int6)) if two_level else jnp.asarray(flat),
        super_scales=jnp.asarray(supers) if two_level else None,
        coefficients=jnp.asarray(coefficients) if companded else None,
        sidecar=sidecar,
        shape=shape,
        group=group,
    )
    level = codes - 8.0
    if companded:
        t, (a, delta) = codes - 7.5, coefficients.astype(np.float64)
        level = t + a * t**3 - delta
    column = np.arange(k)
    scale = flat.astype(np.float64)[:, column // group]
    if two_level:
        scale = int6.astype(np.float64)[:, column // group] * supers.astype(np.float64)[:, column // 256]
    return weight, scale * level + dense


MIXED = ((32, 128), ((0, 3, 9), (1, 0, 2)))
BASES = [
    (g, two_level, companded, *MIXED) for g in (16, 32, 64) for two_level in (0, 1) for companded in (0, 1)
]
SIDECARS = [
    (64, False, False, tile, ranks)
    for tile, ranks in (
        (None, None),
        ((32, 128), ((5, 5, 5), (5, 5, 5))),
        ((64, 0), ((7,),)),
        ((64, 0), ((0,),)),
    )
]


@pytest.mark.parametrize(("group", "two_level", "companded", "tile", "ranks"), BASES + SIDECARS)
def test_dequantize_against_float64(group, two_level, companded, tile, ranks):
    rng = np.random.default_rng(0)
    weight, expected = random_weight(rng, (45, 301), group, two_level, companded, tile, ranks)
    actual = np.asarray(jax.jit(dequantize)(weight), np.float64)
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()
    x = rng.standard_normal((3, 2, 301)).astype(np.float32)
    y = np.asarray(jax.jit(matmul)(jnp.asarray(x), weight))
    assert np.abs(y - x @ expected.T).max() <= 1e-5 * np.abs(x @ expected.T).max()


def test_stored_bytes_of_the_format():
    rng = np.random.default_rng(0)
    weight, _ = random_weight(rng, (64, 512), 16, True, False, None, None)
    assert weight.bits_per_weight == 4.4375
    weight, _ = random_weight(rng, (64, 512), 32, True, False, None, None)
    assert weight.bits_per_weight == 4.25
    weight, _ = random_weight(rng, (64, 512), 64, False, False, None, None)
    assert weight.bits_per_weight == 4.25


def test_equal_and_mixed_rank_paths_agree():
    rng = np.random.default_rng(1)
    equal, _ = random_weight(rng, (45, 301), 64, False, False, (32, 128), ((4, 4, 4), (4, 4, 4)))
    assert equal.sidecar is not None
    # The same correction, with an empty rank column appended to one tile, takes the general path.
    spans = equal.sidecar.row_spans
    height = spans[0][1]
    u = np.asarray(equal.sidecar.u)
    first = np.concatenate([u[: height * 12].reshape(height, 12), np.zeros((height, 1), np.int8)], axis=1)
    v = np.asarray(equal.sidecar.v)
    v = np.concatenate([v[: 4 * 301], np.zeros(301 - 256, np.int8), v[4 * 301 :]])
    scale = np.asarray(equal.sidecar.scale)
    scale = np.concatenate([scale[:12], np.zeros(1, np.float16), scale[12:]])
    mixed = Sidecar(
        u=jnp.asarray(np.concatenate([first.ravel(), u[height * 12 :]])),
        v=jnp.asarray(v),
        scale=jnp.asarray(scale),
        shape=(45, 301),
        tile=(32, 128),
        ranks=((4, 4, 5), (4, 4, 4)),
    )
    np.testing.assert_allclose(
        dequantize_sidecar(mixed), dequantize_sidecar(equal.sidecar), rtol=1e-6, atol=1e-6
    )


def test_wrong_shapes_are_named_with_both_sides():
    rng = np.random.default_rng(0)
    weight, _ = random_weight(rng, (8, 64), 64, False, False, None, None)
    with pytest.raises(
        ValueError, match=r"SVSKWeight\.codes: expected shape \[\.\.\., 8, 32\] of uint8, got \[8, 31\]"
    ):
        SVSKWeight(
            codes=weight.codes[:, :31],
            scales=weight.scales,
            super_scales=None,
            coefficients=None,
            sidecar=None,
            shape=(8, 64),
            group=64,
        )
    with pytest.raises(ValueError, match=r"of float32"):
        Int8Weight(values=jnp.zeros((2, 64)), scales=jnp.zeros((2, 1), jnp.float16), shape=(2, 64))
    with pytest.raises(ValueError, match="expected 1 × 2 ranks"):
        Sidecar(
            u=jnp.zeros(0, jnp.int8),
            v=jnp.zeros(0, jnp.int8),
            scale=jnp.zeros(0, jnp.float16),
            shape=(8, 64),
            tile=(8, 32),
            ranks=((1,),),
        )
