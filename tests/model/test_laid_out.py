"""A model whose packed weights are laid out for the kernels gives the logits of the stored ones."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY
from weights import random_weight

from pallas_kernels.svsk_matmul import Int8Weight, SVSKWeight, TritonInt8Weight, TritonWeight, svsk_matmul
from svsk_jax.model import Decoder, KVCache, linear
from svsk_jax.model.laid_out import lay_out_parameters, transpose_parameters
from svsk_jax.model.parameters import QUANTIZED_LINEARS, random_parameters

CONFIG = dataclasses.replace(TINY, qkv_bias=True)
# A layer of the model is enough to see that the parameters are taken as they are laid out.
ONE = dataclasses.replace(CONFIG, num_layers=1)
# Operation by operation, the stored weights' tiles take hundreds of programs.
run = jax.jit(lambda model, tokens: model(tokens))


def packed_parameters(config=CONFIG, flat: tuple[str, ...] = ()):
    """Random parameters with packed matrices of small magnitude, an int8 embedding, and flat scales for the
    linears named."""
    rng = np.random.default_rng(0)
    parameters = dict(random_parameters(config, 0))
    for path, value in parameters.items():
        if any(path.endswith(f"{name}.weight") for name in QUANTIZED_LINEARS):
            form = (
                {"flat": True, "group": 64, "coefficients": None}
                if path.endswith(flat)
                else {"ranks": (1, 3)}
            )
            parameters[path] = random_weight(rng, *value.shape, tile=(32, 0), **form)
    n, k = parameters["embedding.weight"].shape
    parameters["embedding.weight"] = Int8Weight(
        values=jnp.asarray(rng.integers(-127, 128, (n, k)), jnp.int8),
        scales=jnp.full((n, 1), 0.01, jnp.float16),
        shape=(n, k),
    )
    return parameters


@pytest.mark.parametrize("implementation", ["reference", "triton_interpret"])
def test_logits(implementation, monkeypatch):
    parameters = packed_parameters(ONE)
    tokens = jnp.asarray([[5, 9, 2, 77]], jnp.int32)
    expected = run(Decoder(ONE, parameters, jnp.float32), tokens)
    laid = lay_out_parameters(dict(parameters))
    monkeypatch.setattr(linear, "svsk_matmul", partial(svsk_matmul, implementation=implementation))
    model = Decoder(ONE, laid, jnp.float16)
    # Attention of f16 promotes on its own.
    with jax.numpy_dtype_promotion("standard"):
        check_logits(model, tokens, expected)


def check_logits(model, tokens, expected):
    actual = model(tokens)
    assert jnp.linalg.norm(actual - expected) < 5e-3 * jnp.linalg.norm(expected)
    cache = KVCache.empty(ONE, 1, 8, jnp.float16)
    for token in tokens[0]:
        last, cache = model.extend(token[None, None], cache)
    assert jnp.linalg.norm(last - expected[:, -1]) < 5e-3 * jnp.linalg.norm(expected[:, -1])


def test_logits_on_a_cpu():
    parameters = packed_parameters(ONE)
    tokens = jnp.asarray([[5, 9, 2, 77]], jnp.int32)
    expected = run(Decoder(ONE, parameters, jnp.float32), tokens)
    model = Decoder(ONE, transpose_parameters(dict(parameters)), jnp.float32)
    assert jnp.linalg.norm(run(model, tokens) - expected) < 1e-5 * jnp.linalg.norm(expected)


def test_what_is_joined():
    parameters = packed_parameters(flat=("layers.1.mlp.up.weight",))
    taken = dict(parameters)
    laid = lay_out_parameters(taken)
    assert taken == {}
    kinds = {path: type(value) for path, value in laid.items()}
    assert not any(issubclass(kind, SVSKWeight | Int8Weight) for kind in kinds.values())
    assert kinds["embedding.weight"] is TritonInt8Weight
    for joined in ("layers.0.attention.qkv", "layers.1.attention.qkv", "layers.0.mlp.gate_up"):
        assert kinds[f"{joined}.weight"] is TritonWeight
    assert laid["layers.0.attention.qkv.weight"].rows == (48, 16, 16)
    assert laid["layers.0.attention.qkv.bias"].shape == (80,)
    assert "layers.0.attention.q.weight" not in laid
    # Scales of two kinds can't share a launch.
    assert kinds["layers.1.mlp.gate.weight"] is kinds["layers.1.mlp.up.weight"] is TritonWeight
    assert "layers.1.mlp.gate_up.weight" not in laid
