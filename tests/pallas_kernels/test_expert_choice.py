"""Which experts tokens get by the decode step's kernels, against the decoder's choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import Residual, choose_experts
from pallas_kernels.svsk_matmul.triton_prepare import Prepared
from svsk_jax.model import Mixture
from svsk_jax.model.experts import route

EPS = 1e-6


def residual(x):
    squares = jnp.sum(jnp.pad(x * x, ((0, 0), (0, -x.shape[1] % 256))).reshape(len(x), -1, 256), axis=-1)
    return Residual(x=x, squares=squares, scaled=Prepared(values=None, unit=None))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "slots", "columns"), [(1, 5, 3, 200), (24, 130, 5, 1100)])
def test_the_likeliest_experts(tokens, experts, slots, columns, normalized):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, columns)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, columns), jnp.float32)
    router = jnp.asarray(rng.standard_normal((experts, columns)) / columns**0.5, jnp.float32)
    found, weights = choose_experts(
        residual(x), scale, router, slots=slots, normalized=normalized, eps=EPS, interpret=True
    )
    normed = x * scale / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + EPS)
    mixture = Mixture(
        num_experts=experts, num_experts_per_tok=slots, moe_intermediate_size=1, norm_topk_prob=normalized
    )
    logits = jnp.matmul(normed, router.T, precision=jax.lax.Precision.HIGHEST)
    expected, probabilities = route(logits, mixture)
    np.testing.assert_array_equal(found.matrices, expected.reshape(-1))
    np.testing.assert_allclose(weights, probabilities.reshape(-1), rtol=1e-4)
    if tokens == 1:
        assert found.order is None
    else:
        order = np.asarray(found.order)[: tokens * slots]
        np.testing.assert_array_equal(order, np.argsort(found.matrices, kind="stable"))


def test_of_equal_experts_the_first():
    x = jnp.ones((1, 256), jnp.float32)
    router = jnp.ones((6, 256), jnp.float32).at[3].set(2.0)
    stream = residual(x)
    mixture = Mixture(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=1)
    chosen, _ = choose_experts(
        stream, jnp.ones(256), router / 256, slots=3, normalized=False, eps=EPS, interpret=True
    )
    expected, _ = route(jnp.sum(router / 256, axis=1)[None], mixture)
    assert chosen.matrices.tolist() == expected[0].tolist() == [3, 0, 1]


def test_a_token_that_is_no_number_stays_alone():
    x = jnp.ones((3, 256), jnp.float32).at[1].set(jnp.nan)
    router = jnp.asarray(np.random.default_rng(0).standard_normal((6, 256)), jnp.bfloat16)
    chosen, weights = choose_experts(
        residual(x), jnp.ones(256), router, slots=2, normalized=True, eps=EPS, interpret=True
    )
    assert jnp.all((chosen.matrices >= 0) & (chosen.matrices < 6))
    assert sorted(np.asarray(chosen.order)[:6].tolist()) == list(range(6))
    assert jnp.isnan(weights.reshape(3, 2)).any(axis=1).tolist() == [False, True, False]
