"""Products on a CPU, superblock by superblock, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import FORMS, error, exact, normal, random_int8, random_weight

from pallas_kernels.svsk_matmul import (
    lay_out,
    svsk_matmul,
    take_rows,
    transpose,
    transpose_int8,
)

SHAPES, ROWS = [(200, 330), (77, 31)], [1, 5]


@pytest.mark.parametrize(
    ("form", "shape", "m"),
    # Any two of a form, a shape and a number of rows meet.
    [(form, shape, ROWS[(i + j) % 2]) for i, form in enumerate(FORMS) for j, shape in enumerate(SHAPES)],
)
def test_against_float64(form, shape, m):
    rng = np.random.default_rng(m)
    weight = random_weight(rng, *shape, **FORMS[form])
    x = normal(rng, m, shape[1], dtype=jnp.float32)
    expected = exact(x, weight)
    assert error(svsk_matmul(x, transpose(weight)), expected) < 2e-6
    assert error(jax.jit(lambda x, w: svsk_matmul(x, w, "blockwise"))(x, weight), expected) < 2e-6
    y = svsk_matmul(x.astype(jnp.bfloat16), transpose(weight))
    assert (y.dtype, y.shape) == (jnp.bfloat16, (m, shape[0]))


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("shape", [(130, 330), (64, 64)])
def test_int8(shape, m):
    rng = np.random.default_rng(m)
    weight = random_int8(rng, *shape)
    x = normal(rng, m, shape[1], dtype=jnp.float32)
    expected = exact(x, weight)
    laid = transpose_int8(weight)
    assert error(svsk_matmul(x, laid), expected) < 2e-6
    assert error(svsk_matmul(x, weight, "blockwise"), expected) < 2e-6
    rows = jnp.asarray([[3, 60], [0, 3]])
    np.testing.assert_array_equal(take_rows(laid, rows, jnp.float32), take_rows(weight, rows, jnp.float32))


def test_the_restored_weight_is_never_held():
    n, k = 2048, 2048
    weight = transpose(random_weight(np.random.default_rng(0), n, k, ranks=8))
    for m in (1, 5):
        x = jnp.zeros((m, k), jnp.float32)
        memory = jax.jit(svsk_matmul).lower(x, weight).compile().memory_analysis()
        assert memory.temp_size_in_bytes < n * k * 4 // 3


def test_no_rows():
    weight = random_weight(np.random.default_rng(0), 70, 300, ranks=3)
    assert svsk_matmul(jnp.zeros((0, 300), jnp.float32), transpose(weight)).shape == (0, 70)


def test_stack_and_refusals():
    rng = np.random.default_rng(1)
    layers = [random_weight(rng, 70, 300, ranks=3) for _ in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(transpose, layers))
    x = normal(rng, 2, 300, dtype=jnp.float32)
    assert error(svsk_matmul(x, stack, layer=jnp.int32(1)), exact(x, layers[1])) < 2e-6
    for name in ("reference", "triton_interpret"):
        with pytest.raises(NotImplementedError, match="cannot run: the weight is laid out for 'blockwise'"):
            svsk_matmul(x.astype(jnp.float16), transpose(layers[0]), name)
    with pytest.raises(NotImplementedError, match="'blockwise' cannot run: the weight is laid out for 'trit"):
        svsk_matmul(x, lay_out(layers[0]), "blockwise")
