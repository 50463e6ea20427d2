"""The Triton kernel for int8 matrices in interpret mode against float64, and its layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import TOLERANCE, error, exact, random_int8

from pallas_kernels.svsk_matmul import dequantize, lay_out_int8, svsk_matmul, take_rows
from pallas_kernels.svsk_matmul.triton_reference import restore
from pallas_kernels.svsk_matmul.tuning import FUSED_LIMIT

SHAPES = [(64, 256), (130, 576), (9, 1), (70, 1100)]
ROWS = [1, 5, 20, FUSED_LIMIT]
DTYPES = [jnp.float16, jnp.bfloat16]


@pytest.mark.parametrize(
    ("shape", "m", "dtype"),
    # Every shape with every number of rows, and either dtype with each of both.
    [(shape, m, DTYPES[(i + j) % 2]) for i, shape in enumerate(SHAPES) for j, m in enumerate(ROWS)],
)
def test_against_float64(shape, m, dtype):
    rng = np.random.default_rng(m)
    weight = random_int8(rng, *shape)
    x = jnp.asarray(rng.standard_normal((m, shape[1])), dtype)
    expected = exact(x, weight)
    laid = lay_out_int8(weight)
    for implementation in ("triton_interpret", "reference"):
        y = svsk_matmul(x, laid, implementation)
        assert (y.shape, y.dtype) == ((m, shape[0]), dtype)
        assert error(y, expected) < TOLERANCE[x.dtype]


def test_the_layout_holds_the_same_weight():
    weight = random_int8(np.random.default_rng(0), 130, 330)
    laid = lay_out_int8(weight)
    np.testing.assert_array_equal(restore(laid), dequantize(weight))
    rows = jnp.asarray([[3, 129], [0, 3]])
    np.testing.assert_array_equal(take_rows(laid, rows, jnp.bfloat16), take_rows(weight, rows, jnp.bfloat16))
    # 192 padded rows of two superblocks, with four scales each.
    assert laid.nbytes == 192 * 2 * (256 + 4 * 2)


def test_a_stored_weight_is_laid_out_on_the_way_but_no_stack():
    rng = np.random.default_rng(1)
    weight = random_int8(rng, 70, 300)
    x = jnp.asarray(rng.standard_normal((3, 300)), jnp.float16)
    expected = exact(x, weight)
    y = svsk_matmul(x, weight, "triton_interpret")
    assert error(y, expected) < 1e-3
    stack = jax.tree.map(lambda leaf: leaf[None], lay_out_int8(weight))
    with pytest.raises(NotImplementedError, match="takes no stack of layers"):
        svsk_matmul(x, stack, "triton_interpret", layer=jnp.int32(0))
