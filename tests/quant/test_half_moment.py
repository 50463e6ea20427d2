"""Halves of symmetric matrices and what comes back of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.parallel import make_mesh, sharding
from svsk_jax.quant.half_moment import (
    STRIP,
    HalfMoment,
    diagonal_places,
    half_size,
    half_width,
    halved,
    part_size,
    whole_moment,
)
from svsk_jax.quant.types import InputMoment


def moment_of(total):
    return InputMoment(total=jnp.asarray(total), tokens=jnp.int32(7))


@pytest.mark.parametrize("width", [1, 5, STRIP, STRIP + 1, 2 * STRIP, 2 * STRIP + 6])
def test_the_whole_is_the_lower_half_mirrored(width):
    total = np.random.default_rng(width).random((width, width), np.float32)
    half = jax.device_get(halved(moment_of(total)))
    assert half.total.shape == (half_size(width),)
    assert half.width == width
    np.testing.assert_array_equal(half.total[diagonal_places(width)], np.diagonal(total))
    lower = np.tril(total)
    np.testing.assert_array_equal(half.whole.total, lower + np.tril(lower, -1).T)
    np.testing.assert_allclose(half.mean, half.whole.total / 7, rtol=1e-6)
    assert whole_moment(half).tokens == 7


def test_half_the_numbers():
    for width, share in ((4096, 0.5625), (12288, 0.5 + 1 / 48)):
        assert half_size(width) == share * width**2
    assert half_size(STRIP) == STRIP**2
    assert half_size(STRIP + 1) == STRIP**2 + STRIP + 1


def test_a_size_tells_the_width():
    widths = range(1, 4 * STRIP)
    assert [half_width(half_size(width)) for width in widths] == list(widths)
    for size in (2, STRIP**2 + 1, half_size(5 * STRIP) - 1):
        with pytest.raises(ValueError, match=f"{size} numbers: no symmetric matrix"):
            half_width(size)


@pytest.mark.parametrize("rows", ["moment_rows", "summed_rows"])
@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (8, 1)])
def test_rows_of_several_devices_make_one_half(shape, rows):
    """Strips lie across the devices' rows."""
    width = 2 * STRIP + 32
    total = np.random.default_rng(0).random((width, width), np.float32)
    mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    found = halved(moment_of(jax.device_put(total, sharding(mesh, rows, None))))
    grid = mesh.devices if rows == "summed_rows" else mesh.devices[:1]
    assert [part.devices() for part in found.parts] == [{device} for device in grid.T.flat]
    assert max(part.size for part in found.parts) == found.parts[-1].size == part_size(width, grid.size)
    assert found.width == width
    for half in (found, jax.device_get(found)):
        np.testing.assert_array_equal(half.total, halved(moment_of(total)).total)


def test_stacks_of_experts():
    width = STRIP + 3
    stack = np.random.default_rng(1).random((2, width, width), np.float32)
    tokens = jnp.arange(2)
    halves = halved(InputMoment(total=jnp.asarray(stack), tokens=tokens))
    assert isinstance(halves, HalfMoment)
    assert halves.width == width
    for number, total in enumerate(stack):
        np.testing.assert_array_equal(halves.total[number], halved(moment_of(total)).total)


def test_a_diagonal_is_whole():
    diagonal = moment_of(np.ones(4, np.float32))
    assert whole_moment(diagonal) is diagonal
