"""A weight's continuous numbers, moved and stored again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.svsk_matmul import reference
from svsk_jax.quant import polish
from svsk_jax.quant.joint import input_metric, plain_output_metric, quantize_joint
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.polish import Deviation, store
from svsk_jax.quant.types import InputMoment, QuantConfig, TensorPlan, TileShape, recipe

N, K = 40, 70
# As the pipeline runs them; operation by operation, each would be compiled on its own.
dequantize = jax.jit(reference.dequantize)
restore = jax.jit(polish.restore, static_argnums=2)


@pytest.fixture(scope="module", params=[(0, None), (4, (0.008, 0.3))], ids=["base alone", "with a sidecar"])
def weight(request):
    rank, pair = request.param
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((300, K)), jnp.float32)
    W = jnp.asarray(rng.standard_normal((N, K)), jnp.float32)
    config = dataclasses.replace(recipe("svsk-r16").without_sensitivity(), beam_width=1)
    inputs = input_metric(InputMoment(total=x.T @ x, tokens=jnp.int32(300)), None, config)
    plan = TensorPlan(
        group=16, coefficients=pair, tile=TileShape(rows=24, columns=48), ranks=((rank, 2), (3, rank))
    )
    return quantize_joint(W, inputs, plain_output_metric(W, inputs.H), plan, config).weight


def random_deviation(weight, size):
    leaves, tree = jax.tree.flatten(Deviation.none(weight))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    )


def test_no_deviation_is_the_stored_weight(weight):
    none = Deviation.none(weight)
    dense = dequantize(weight)
    np.testing.assert_allclose(restore(weight, none, False), dense, rtol=1e-6, atol=1e-6)
    again = store(weight, none)
    np.testing.assert_allclose(dequantize(again), dense, rtol=2e-3, atol=2e-4)
    np.testing.assert_array_equal(again.super_scales, weight.super_scales)


def test_what_is_stored_is_what_was_measured(weight):
    moved = random_deviation(weight, 0.05)
    kept = store(weight, moved)
    np.testing.assert_allclose(dequantize(kept), restore(weight, moved, True), rtol=1e-5, atol=1e-5)
    assert kept.nbytes == weight.nbytes
    np.testing.assert_array_equal(kept.codes, weight.codes)
    np.testing.assert_array_equal(kept.scales, weight.scales)
    exact = restore(weight, moved, False)
    change = float(jnp.sum((exact - dequantize(weight)) ** 2))
    assert float(jnp.sum((exact - dequantize(kept)) ** 2)) < 0.02 * change


def test_gradients_reach_every_number(weight):
    goal = jnp.asarray(np.random.default_rng(2).standard_normal((N, K)), jnp.float32)
    gradient = jax.grad(lambda moved: jnp.sum((restore(weight, moved, False) - goal) ** 2))(
        Deviation.none(weight)
    )
    for leaf in jax.tree.leaves(gradient):
        assert jnp.isfinite(leaf).all()
    assert (gradient.super_scales != 0).all()
    assert (gradient.coefficients != 0).all() == (weight.coefficients is not None)
    assert all((u != 0).any() and (v != 0).any() for row in gradient.factors for u, v in row if u.size)


def test_flat_scales_are_refused():
    W = jnp.ones((8, 64))
    flat = quantize_linear(W, InputMoment(total=jnp.ones(64), tokens=jnp.int32(1)), QuantConfig(rank=0))
    with pytest.raises(ValueError, match="two-level scales, got flat"):
        Deviation.none(flat)
    with pytest.raises(ValueError, match="no polish"):
        QuantConfig(polish=10)
