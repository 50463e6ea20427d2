"""Parts of a matrix are matrices, and together they are the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_int8, random_weight

from pallas_kernels.svsk_matmul import SVSKWeight, dequantize
from svsk_jax.parallel.cut import alike, cut, why_not_cut

# Operation by operation, tiles take hundreds of programs.
restore = jax.jit(dequantize)
FORMS = {
    "no sidecar": {},
    "whole tiles, ranks that differ": {"ranks": (0, 9), "tile": (64, 0)},
    "cuts through tiles": {"ranks": (0, 9), "tile": (512, 0)},
    "a ragged tile": {"ranks": (1, 9), "tile": (192, 0), "coefficients": None},
    "flat scales of 64": {"flat": True, "group": 64, "ranks": 3, "tile": (128, 0)},
}


def weight_of(form, n=256, k=1024):
    return random_weight(np.random.default_rng(0), n, k, **form)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_parts_restore_to_the_whole(form, axis):
    weight = weight_of(form)
    parts = cut(weight, 4, axis)
    assert all(isinstance(part, SVSKWeight) for part in parts)
    together = jnp.concatenate([restore(part) for part in parts], axis=axis)
    assert jnp.array_equal(together, restore(weight))


def test_column_tiles_keep_u_and_take_their_columns_of_v():
    weight = weight_of({"ranks": (0, 5), "tile": (100, 300), "coefficients": None})
    parts = cut(weight, 4, 1)
    for part in parts[1:]:
        assert part.sidecar.ranks == parts[0].sidecar.ranks
        assert jnp.array_equal(part.sidecar.u, weight.sidecar.u)
        assert jnp.array_equal(part.sidecar.scale, weight.sidecar.scale)
    together = jnp.concatenate([restore(part) for part in parts], axis=1)
    np.testing.assert_allclose(together, restore(weight), atol=1e-6)


@pytest.mark.parametrize(
    "form", [FORMS["whole tiles, ranks that differ"], {"ranks": (0, 5), "tile": (64, 300)}]
)
def test_parts_made_alike_restore_to_the_same(form):
    weight = weight_of(form)
    parts = cut(weight, 2, 0)
    same = alike(parts)
    assert parts[0].sidecar.ranks != parts[1].sidecar.ranks
    assert len({jax.tree.structure(part) for part in same}) == 1
    for part, other in zip(parts, same, strict=True):
        np.testing.assert_allclose(restore(other), restore(part), atol=1e-6)


def test_host_arrays_stay_on_the_host():
    weight = jax.tree.map(np.asarray, weight_of(FORMS["whole tiles, ranks that differ"]))
    leaves = jax.tree.leaves([alike(cut(weight, 2, axis)) for axis in (0, 1)])
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_and_dense(axis):
    weight = random_int8(np.random.default_rng(0), 128, 256)
    for whole, dense in ((weight, restore(weight)), (restore(weight), restore(weight))):
        parts = [part if isinstance(part, jax.Array) else restore(part) for part in cut(whole, 2, axis)]
        assert jnp.array_equal(jnp.concatenate(parts, axis=axis), dense)


@pytest.mark.parametrize(
    ("form", "parts", "axis", "why"),
    [
        ({}, 3, 0, "256 rows do not divide by 3"),
        ({}, 8, 1, "128 of 1024 columns are not whole groups of 256"),
        (
            {"flat": True, "group": 64, "coefficients": None},
            32,
            1,
            "32 of 1024 columns are not whole groups of 64",
        ),
        (
            {"ranks": 1, "tile": (100, 0)},
            2,
            0,
            "128 rows and the sidecar's tiles of 100 have only blocks of 4",
        ),
    ],
)
def test_what_does_not_divide(form, parts, axis, why):
    weight = weight_of(form)
    assert why in str(why_not_cut(weight, parts, axis))
    with pytest.raises(ValueError, match=why):
        cut(weight, parts, axis)
