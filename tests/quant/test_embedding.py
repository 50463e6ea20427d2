"""An embedding and a head in 4 bits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.svsk_matmul import dequantize
from svsk_jax.quant.budget import embedding_bytes
from svsk_jax.quant.embedding import quantize_embedding, quantize_embedding_int8
from svsk_jax.quant.int8 import quantize_int8
from svsk_jax.quant.joint import input_metric
from svsk_jax.quant.types import InputMoment, QuantConfig, recipe

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_t(4, (150, 200)) * 0.03, jnp.float32)
X = RNG.standard_normal((500, 12)) @ RNG.standard_normal((12, 200)) + RNG.standard_normal((500, 200))
MOMENT = InputMoment(total=jnp.asarray(X.T @ X, jnp.float32), tokens=jnp.int32(500))
CONFIG = dataclasses.replace(recipe("svsk-r16"), embedding="q4")


def cost(weight, H):
    E = np.asarray(W - dequantize(weight), np.float64)
    return np.sum((E @ H) * E)


def test_bytes_and_the_error_that_each_keeps_small():
    H = np.asarray(MOMENT.mean, np.float64)
    head = quantize_embedding(W, input_metric(MOMENT, None, CONFIG), CONFIG, 64)
    embedding = quantize_embedding(W, None, CONFIG, 64)
    for weight in (head, embedding):
        assert weight.nbytes == embedding_bytes((150, 200), CONFIG)
    assert cost(head, H) < 0.5 * cost(embedding, H)
    assert cost(embedding, np.eye(200)) < 0.9 * cost(head, np.eye(200))
    assert cost(embedding, np.eye(200)) < 0.01 * np.sum(np.square(W))


@pytest.mark.parametrize("rows", [40, 150, 1000])
def test_rows_at_a_time_change_nothing(rows):
    inputs = input_metric(MOMENT, None, CONFIG)
    for found, expected in (
        (quantize_embedding(W, inputs, CONFIG, rows), quantize_embedding(W, inputs, CONFIG, 64)),
        (quantize_embedding_int8(W, rows), quantize_int8(W)),
    ):
        np.testing.assert_array_equal(dequantize(found), dequantize(expected))


def test_a_linear_codebook():
    config = dataclasses.replace(CONFIG, codebook="linear")
    weight = quantize_embedding(W, None, config, 64)
    assert weight.codebook == "linear"
    assert weight.nbytes == embedding_bytes((150, 200), config)
    assert cost(weight, np.eye(200)) < 0.01 * np.sum(np.square(W))


def test_flat_scales_are_refused():
    with pytest.raises(ValueError, match="4 bits go with two_level scales"):
        QuantConfig(embedding="q4")
