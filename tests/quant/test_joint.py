"""A linear by the strong method: what it reports is what it stores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.svsk_matmul.reference import dequantize
from svsk_jax.quant.joint import input_metric, output_metric, plain_output_metric, quantize_joint
from svsk_jax.quant.metric import nats
from svsk_jax.quant.scale_search import search_two_level
from svsk_jax.quant.types import InputMoment, OutputSensitivity, TensorPlan, TileShape, recipe

CONFIG = dataclasses.replace(recipe("svsk-r16"), joint_rounds=0)
N, K = 40, 48


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, K)) @ (np.eye(K) + 0.4 * rng.standard_normal((K, K)))
    g = rng.standard_normal((300, N)) @ (np.eye(N) + 0.4 * rng.standard_normal((N, N)))
    W = jnp.asarray(rng.standard_normal((N, K)), jnp.float32)
    moment = InputMoment(total=jnp.asarray(x.T @ x, jnp.float32), tokens=jnp.int32(300))
    sensitivity = OutputSensitivity(
        blocks=jnp.asarray(g.T @ g, jnp.float32)[None], weights=jnp.ones((3, 100)), tokens=jnp.int32(300)
    )
    return W, input_metric(moment, None, CONFIG), output_metric(sensitivity, N, CONFIG)


def plan(rank, coefficients=(0.008, 0.3)):
    return TensorPlan(
        group=16, coefficients=coefficients, tile=TileShape(rows=512, columns=0), ranks=((rank,),)
    )


def test_reported_nats_are_those_of_what_is_stored(case):
    W, inputs, outputs = case
    for rank in (0, 4):
        result = quantize_joint(W, inputs, outputs, plan(rank), CONFIG)
        cost = nats(W - dequantize(result.weight), inputs.H, outputs.G)
        np.testing.assert_allclose(result.nats, cost, rtol=1e-3)
        assert (result.weight.sidecar is None) == (rank == 0)


def test_rounds_never_cost_and_the_same_input_gives_the_same_bytes(case):
    W, inputs, outputs = case
    costs = []
    for rounds in (0, 1, 2):
        # Several beams are followed in the last round alone, so that rounds of the same number differ.
        config = dataclasses.replace(CONFIG, joint_rounds=rounds, beam_width=1)
        costs.append(quantize_joint(W, inputs, outputs, plan(4), config).nats)
    assert costs[2] <= costs[1] <= costs[0]
    first, again = (quantize_joint(W, inputs, outputs, plan(4), CONFIG).weight for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_linear_codebook_is_stored_without_coefficients(case):
    W, inputs, outputs = case
    weight = quantize_joint(W, inputs, outputs, plan(0, None), CONFIG).weight
    assert weight.coefficients is None
    assert float(jnp.sum((W - dequantize(weight)) ** 2)) < 0.05 * float(jnp.sum(W**2))


@pytest.mark.parametrize("tokens", [0, 1])
def test_next_to_no_tokens(case, tokens):
    W = case[0]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, K)), jnp.float32)
    inputs = input_metric(InputMoment(total=x.T @ x, tokens=jnp.int32(tokens)), None, CONFIG)
    outputs = plain_output_metric(W, inputs.H)
    result = quantize_joint(W, inputs, outputs, plan(4), CONFIG)
    assert jnp.isfinite(dequantize(result.weight)).all()
    assert float(jnp.sum((W - dequantize(result.weight)) ** 2)) < 0.2 * float(jnp.sum(W**2))


def test_zero_weights_stay_zero(case):
    _, inputs, outputs = case
    W = jnp.zeros((N, K)).at[3, 20].set(1.0)
    restored = dequantize(quantize_joint(W, inputs, outputs, plan(0), CONFIG).weight)
    assert not restored[:3].any()
    np.testing.assert_allclose(restored[3, 20], 1.0, rtol=0.02)


def test_scales_are_better_than_end_to_end_ones_and_fit_six_bits():
    rng = np.random.default_rng(2)
    W = jnp.asarray(rng.standard_normal((8, 70)), jnp.float32)
    importance = jnp.asarray(rng.uniform(0.1, 4, (8, 70)), jnp.float32)
    pair = jnp.asarray((0.008, 0.3), jnp.float32)
    integers, supers = search_two_level(W, importance, pair, 16)
    assert integers.shape == (8, 5)
    assert supers.shape == (8, 1)
    assert int(integers.min()) >= -32
    assert int(integers.max()) <= 31
    from svsk_jax.quant.codebook import decode, round_to_level

    def cost(scale):
        wide = jnp.repeat(scale, 16, axis=1)[:, :70]
        restored = wide * decode(round_to_level(W, wide, pair), pair)
        return float(jnp.sum(importance * (W - restored) ** 2))

    groups = jnp.pad(jnp.abs(W), ((0, 0), (0, 10))).reshape(8, 5, 16).max(-1)
    naive = groups / float(decode(jnp.array([15]), pair)[0])
    assert cost(integers.astype(jnp.float32) * supers.astype(jnp.float32)) < 0.8 * cost(naive)
