"""The Triton kernels on a GPU against float64, the inline assembly included:

JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels/test_device.py
"""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_round_columns import problem as rounding_problem
from weights import FORMS, TOLERANCE, error, exact, normal, random_int8, random_weight

from pallas_kernels.error_feedback import COLUMNS, round_columns
from pallas_kernels.svsk_matmul import (
    lay_out,
    lay_out_int8,
    svsk_matmul,
    why_no_triton,
)
from pallas_kernels.svsk_matmul.tuning import FUSED_LIMIT
from svsk_jax.quant.beam_search import _round_block

REASON = why_no_triton("bfloat16")
pytestmark = pytest.mark.skipif(
    REASON is not None, reason=f"NO KERNEL WAS RUN ON A GPU: {REASON}; set JAX_PLATFORMS=cuda on one"
)
SHAPES = [(200, 330), (577, 31), (1024, 2048)]
ROWS = [1, 2, 7, 16, 64, 128, FUSED_LIMIT]


@pytest.fixture
def rng():
    """Other numbers at every run."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return np.random.default_rng(seed)


def poison():
    """Leave NaN in the memory that the next outputs get."""
    for size in (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 26):
        jax.block_until_ready([jnp.full(size, jnp.nan, jnp.float32) for _ in range(4)])


def product(x, weight):
    poison()
    return jax.jit(lambda x, weight: svsk_matmul(x, weight, "triton"))(x, weight)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_against_float64(form, m, rng):
    for shape, dtype in itertools.product(SHAPES, (jnp.float16, jnp.bfloat16)):
        weight = random_weight(rng, *shape, **FORMS[form])
        x = normal(rng, m, shape[1], dtype=dtype)
        y = product(x, lay_out(weight))
        assert (y.shape, y.dtype) == ((m, shape[0]), x.dtype)
        assert error(y, exact(x, weight)) < TOLERANCE[x.dtype], (shape, dtype)


@pytest.mark.parametrize("m", ROWS)
def test_int8(m, rng):
    for (n, k), dtype in itertools.product([(130, 576), (70, 1100)], (jnp.float16, jnp.bfloat16)):
        weight = random_int8(rng, n, k)
        x = normal(rng, m, k, dtype=dtype)
        assert error(product(x, lay_out_int8(weight)), exact(x, weight)) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("m", ROWS)
def test_several_weights_in_one_launch(m, rng):
    weights = [
        random_weight(rng, 100, 300, ranks=4),
        random_weight(rng, 30, 300, group=32, coefficients=(0.01, 0.1)),
        random_weight(rng, 64, 300, group=32, coefficients=None, ranks=(0, 9), tile=(32, 0)),
    ]
    x = normal(rng, m, 300)
    assert error(product(x, lay_out(weights)), exact(x, *weights)) < 1e-3


@pytest.mark.parametrize("m", ROWS)
def test_a_layer_of_a_stack(m, rng):
    layers = [random_weight(rng, 70, 300, ranks=3) for _ in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(lay_out, layers))
    x = normal(rng, m, 300)

    def step(carry, layer):
        return carry, svsk_matmul(x, stack, "triton", layer=layer)

    poison()
    _, ys = jax.jit(lambda: jax.lax.scan(step, 0, jnp.arange(3)))()
    for y, weight in zip(ys, layers, strict=True):
        assert error(y, exact(x, weight)) < 1e-3


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_columns_are_rounded_as_xla_does(beams):
    operands = rounding_problem(COLUMNS, beams)
    ours, theirs = round_columns(*operands), jax.jit(_round_block)(*operands)
    costs = [np.sort(each.cost, axis=0) for each in (ours, theirs)]
    np.testing.assert_allclose(*costs, rtol=1e-3)
    assert np.mean(np.asarray(ours.codes) == np.asarray(theirs.codes)) > 0.95
