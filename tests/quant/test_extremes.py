"""Weights and statistics at the edges of f32 and f16: a right answer, or an error that names the tensor."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.svsk_matmul import dequantize
from svsk_jax.calibration import store
from svsk_jax.calibration.statistics import embed_batches
from svsk_jax.parallel import make_mesh
from svsk_jax.pipeline.checks import MAX_WEIGHT, check_weight
from svsk_jax.quant.error import layer_error
from svsk_jax.quant.half_moment import halved
from svsk_jax.quant.joint import input_metric, plain_output_metric, quantize_joint
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.types import InputMoment, TensorPlan, TileShape, recipe

N, K = 40, 48
CONFIG = dataclasses.replace(recipe("svsk-r16"), joint_rounds=0)
PLAN = TensorPlan(group=16, coefficients=(0.008, 0.3), tile=TileShape(rows=512, columns=0), ranks=((2,),))
RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((N, K)).astype(np.float32)
WEIGHTS = {
    "zero": np.zeros((N, K), np.float32),
    "constant": np.full((N, K), 0.37, np.float32),
    "denormal": NORMAL * np.float32(1e-40),
    "below f16": NORMAL * np.float32(1e-9),
    "as large as f16 scales go": np.clip(NORMAL, -1, 1) * np.float32(MAX_WEIGHT),
    "one large among small": np.where(np.arange(K) == 5, np.float32(1e4), NORMAL),
}
UNIT = 2.0**-24
"""Smallest f16 above 0."""


def full(x):
    return InputMoment(total=jnp.asarray(x.T @ x, jnp.float32), tokens=jnp.int32(len(x)))


MOMENTS = {
    "whole": full(RNG.standard_normal((200, K))),
    "singular": full(np.repeat(RNG.standard_normal((1, K)), 3, axis=0)),
    "no token": full(np.zeros((0, K))),
    "dead channels": full(RNG.standard_normal((200, K)) * (np.arange(K) % 3 > 0)),
}


def by_classic(W, moment):
    return dequantize(quantize_linear(W, moment, recipe("classic-r8")))


def by_joint(W, moment):
    inputs = input_metric(moment, None, CONFIG)
    return dequantize(quantize_joint(W, inputs, plain_output_metric(W, inputs.H), PLAN, CONFIG).weight)


@pytest.mark.parametrize("method", [by_classic, by_joint])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_comes_back_is_near_what_went_in(method, moment, weights):
    W = jnp.asarray(WEIGHTS[weights])
    restored = method(W, MOMENTS[moment])
    assert jnp.isfinite(restored).all()
    # A step is at most a seventh of a row's peak, and not below what an f16 scale can say.
    step = jnp.maximum(jnp.max(jnp.abs(W), axis=-1, keepdims=True) / 7, 32 * UNIT)
    if moment == "whole":
        assert (jnp.abs(W - restored) <= 3 * step).all()
    lost = 1.01 if weights in ("denormal", "below f16") else 0.2
    assert float(layer_error(W, restored, MOMENTS[moment])) <= lost


@pytest.mark.parametrize("value", [1e30, 2 * MAX_WEIGHT, np.nan, np.inf])
def test_weights_beyond_the_format_are_named(value):
    W = NORMAL.copy()
    W[3, 4] = value
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up\.weight: its largest magnitude is"):
        check_weight(W, "layers.3.mlp.up.weight")
    assert check_weight(NORMAL, "w") is NORMAL


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_overflow_are_named(tmp_path, value):
    total = np.eye(K, dtype=np.float32)
    total[2, :] = total[:, 2] = value
    moment = InputMoment(total=jnp.asarray(total), tokens=jnp.int32(4))
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.hidden: 1 of 48 channels are NaN or Inf"):
        store.write_moments(tmp_path, 7, {"mlp.hidden": halved(moment)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_without_a_row_is_named(token):
    with pytest.raises(ValueError, match="the embedding has 97 rows"):
        embed_batches(np.ones((97, 8), np.float32), np.array([[0, token]]), 64, make_mesh())
