"""A whole linear: bytes as budgeted, deterministic, each ingredient pays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.svsk_matmul import dequantize
from svsk_jax.quant.budget import embedding_bytes, linear_bytes, predict
from svsk_jax.quant.error import layer_error
from svsk_jax.quant.int8 import quantize_int8
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.types import RECIPES, InputMoment, QuantConfig, TileShape, recipe

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.standard_t(4, (130, 200)) * 0.03, jnp.float32)
X = RNG.standard_normal((500, 200)) * RNG.gamma(0.5, size=200)
H = InputMoment(total=jnp.asarray(X.T @ X, jnp.float32), tokens=jnp.int32(500))
DIAGONAL = InputMoment(total=jnp.diagonal(H.total), tokens=H.tokens)


@pytest.mark.parametrize("name", [name for name, config in RECIPES.items() if config.bits is None])
@pytest.mark.parametrize("shape", [(130, 200), (600, 65), (3, 1)])
def test_stored_bytes_are_the_budget(name, shape):
    matrix = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    moment = InputMoment(total=jnp.ones(shape[1]), tokens=jnp.int32(1))
    weight = jax.eval_shape(lambda W: quantize_linear(W, moment, recipe(name)), matrix)
    assert weight.nbytes == linear_bytes(shape, recipe(name))


def test_int8_bytes_and_error():
    weight = quantize_int8(W)
    assert weight.nbytes == embedding_bytes((130, 200), QuantConfig())
    step = np.repeat(np.asarray(weight.scales, np.float32), 64, axis=1)[:, :200]
    assert (np.abs(dequantize(weight) - W) <= 0.51 * step).all()


def test_error_falls_with_rank_and_is_the_stated_ratio():
    errors = [
        float(layer_error(W, dequantize(quantize_linear(W, DIAGONAL, recipe(name))), H))
        for name in ("q4", "classic-r8", "classic-r16")
    ]
    assert errors[2] < errors[1] < errors[0] < 0.05
    E = np.asarray(W - dequantize(quantize_linear(W, DIAGONAL, recipe("q4"))), np.float64)
    second = X.T @ X
    wide = np.asarray(W, np.float64)
    assert errors[0] == pytest.approx(np.trace(E @ second @ E.T) / np.trace(wide @ second @ wide.T), rel=1e-4)


def test_same_input_same_bytes():
    first, second = (quantize_linear(W + jnp.float32(0), DIAGONAL, recipe("classic-r8")) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_full_moment_serves_as_its_diagonal():
    full, diagonal = (
        dequantize(quantize_linear(W, moment, recipe("classic-r8"))) for moment in (H, DIAGONAL)
    )
    np.testing.assert_allclose(full, diagonal, atol=1e-2 * float(jnp.abs(W).max()))


def test_moments_add():
    half = [
        InputMoment(total=jnp.asarray(x.T @ x, jnp.float32), tokens=jnp.int32(250))
        for x in (X[:250], X[250:])
    ]
    total = half[0] + half[1]
    assert total.tokens == 500
    np.testing.assert_allclose(total.total, H.total, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(total.diagonal, (X**2).mean(0), rtol=1e-5)


def test_a_layer_of_zeros_has_no_error():
    zero = jnp.zeros((4, 64))
    moment = InputMoment(total=jnp.ones(64), tokens=jnp.int32(1))
    assert layer_error(zero, dequantize(quantize_linear(zero, moment, recipe("classic-r8"))), moment) == 0


def test_combinations_that_are_not_are_refused():
    for change in ({"codebook": "companded"}, {"feedback": "columns"}, {"bits": 4.5}, {"groups": (16, 32)}):
        with pytest.raises(ValueError, match="two_level"):
            dataclasses.replace(recipe("q4"), **change)
    with pytest.raises(ValueError, match="tiles of at most 512 rows"):
        dataclasses.replace(recipe("svsk-r16"), tile=TileShape(rows=1024))
    with pytest.raises(ValueError, match="flat"):
        quantize_linear(W, DIAGONAL, recipe("svsk-r16"))


def test_unknown_recipe_lists_the_known():
    with pytest.raises(
        ValueError, match="unknown recipe 'q5'; known are svsk-r16, svsk-r16-polish, svsk-r8, classic-r16"
    ):
        recipe("q5")
    with pytest.raises(ValueError, match="rank"):
        QuantConfig(rank=129)
    with pytest.raises(ValueError, match="TileShape"):
        TileShape(rows=0)


QWEN3_4B = {
    "layers.0.attention.q.weight": (4096, 2560),
    "layers.0.attention.k.weight": (1024, 2560),
    "layers.0.attention.v.weight": (1024, 2560),
    "layers.0.attention.o.weight": (2560, 4096),
    "layers.0.mlp.gate.weight": (9728, 2560),
    "layers.0.mlp.up.weight": (9728, 2560),
    "layers.0.mlp.down.weight": (2560, 9728),
}


@pytest.mark.parametrize(
    ("name", "low", "high"), [("q4", 4.25, 4.25), ("classic-r8", 4.435, 4.45), ("classic-r16", 4.60, 4.645)]
)
def test_published_budgets_on_qwen3_4b(name, low, high):
    linears = tuple(path.removesuffix(".weight") for path in QWEN3_4B)
    assert low <= predict(QWEN3_4B, linears, recipe(name)).linear_bits <= high
