"""The decode step of few kernels gives the logits of the decoder."""

import dataclasses
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY
from weights import random_int8, random_weight

from pallas_kernels.decode_step import attention
from pallas_kernels.decode_step.attention import splits_of
from pallas_kernels.decode_step.product import Chosen, product
from pallas_kernels.svsk_matmul.triton_prepare import Prepared
from svsk_jax.model import Decoder, KVCache, Mixture
from svsk_jax.model.fused_step import batch_bucket, fused_step, why_not_fused
from svsk_jax.model.laid_out import lay_out_parameters
from svsk_jax.model.parameters import quantized_paths, random_parameters

# Interpreted kernels take seconds to compile, in every layer again.
BASE = dataclasses.replace(
    TINY, num_layers=1, hidden_size=200, intermediate_size=328, num_heads=3, num_kv_heads=1, head_dim=64
)
step = jax.jit(partial(fused_step, interpret=True))
# Operation by operation, the stored weights' tiles take hundreds of programs.
run = jax.jit(lambda model, tokens: model(tokens))
extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache)[1])
MIXTURE = Mixture(
    num_experts=5,
    num_experts_per_tok=3,
    moe_intermediate_size=72,
    norm_topk_prob=True,
    decoder_sparse_step=2,
)
CONFIGS = {
    "one key head of 64": (BASE, {"ranks": (1, 3)}),
    "heads of 128 with norms": (
        dataclasses.replace(BASE, num_heads=4, num_kv_heads=2, head_dim=128, qk_norm=True),
        {"ranks": (0, 20), "group": 32, "tile": (128, 0)},
    ),
    "biases, a window, a head of its own, no sidecar": (
        dataclasses.replace(
            BASE, qkv_bias=True, o_bias=True, mlp_bias=True, sliding_window=3, tie_word_embeddings=False
        ),
        {"coefficients": None},
    ),
    "eight queries for a key head": (
        dataclasses.replace(BASE, num_heads=8, qk_norm=True),
        # The tile of values begins at no multiple of two blocks.
        {"ranks": (1, 3), "tile": (128, 0)},
    ),
    "a head in 4 bits": (BASE, {"group": 32, "embedding": {"group": 16}}),
    "a mixture behind a dense layer": (
        dataclasses.replace(BASE, num_layers=2, mixture=MIXTURE),
        {"ranks": (1, 3)},
    ),
    "flat scales, two layers": (
        dataclasses.replace(BASE, num_layers=2),
        {"flat": True, "group": 64, "coefficients": None, "ranks": 2},
    ),
}


def packed_parameters(config, embedding=None, **form):
    rng = np.random.default_rng(0)
    parameters, quantized = dict(random_parameters(config, 0)), quantized_paths(config)
    for path, value in parameters.items():
        if path.removesuffix(".weight") in quantized:
            parameters[path] = random_weight(rng, *value.shape, **{"tile": (64, 0), **form})
        elif len(value.shape) == 2 and "router" not in path:
            parameters[path] = (
                random_int8(rng, *value.shape)
                if embedding is None
                else random_weight(rng, *value.shape, **embedding)
            )
    return parameters


def models(name, dtype=jnp.float16):
    config, form = CONFIGS[name]
    parameters = packed_parameters(config, **form)
    exact = Decoder(config, parameters, jnp.float32)
    return exact, Decoder(config, lay_out_parameters(dict(parameters)), dtype)


def cache_behind(tokens, exact, model, capacity):
    """Keys and values of all layers, by the exact model, in the other's dtype."""
    cache = extend(exact, tokens, KVCache.empty(model.config, len(tokens), capacity, exact.dtype))
    return (tuple(each.astype(model.dtype) for each in part) for part in (cache.keys, cache.values))


@pytest.mark.parametrize("name", CONFIGS)
def test_one_sequence(name):
    exact, model = models(name)
    assert why_not_fused(model, interpret=True) is None
    tokens = jnp.asarray([[5, 9, 2, 77, 31]], jnp.int32)
    expected = run(exact, tokens)[0]
    cache = KVCache.empty(model.config, 1, 8, model.dtype)
    keys, values = cache.keys, cache.values
    for position, token in enumerate(tokens[0]):
        lengths = jnp.asarray([position], jnp.int32)
        logits, keys, values = step(model, token[None], keys, values, lengths)
        error = jnp.linalg.norm(logits[0] - expected[position]) / jnp.linalg.norm(expected[position])
        assert error < 1e-2, position


@pytest.mark.parametrize(
    "name",
    [
        "heads of 128 with norms",
        "eight queries for a key head",
        "a mixture behind a dense layer",
        "biases, a window, a head of its own, no sidecar",
        "a head in 4 bits",
    ],
)
def test_sequences_of_different_lengths(name):
    exact, model = models(name)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 97, (8, 6)), jnp.int32)
    lengths = jnp.asarray([0, 1, 2, 3, 4, 5, 0, 3], jnp.int32)
    filled_keys, filled_values = cache_behind(tokens, exact, model, 128)
    item = jnp.arange(8)
    logits, keys, _ = step(model, tokens[item, lengths], filled_keys, filled_values, lengths)
    expected = run(exact, tokens)[item, lengths]
    error = jnp.linalg.norm(logits - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    assert jnp.max(error) < 1e-2
    # The new position's keys are as they were; others are not touched.
    difference = jnp.abs(keys[0].astype(jnp.float32) - filled_keys[0].astype(jnp.float32))
    assert jnp.max(difference) < 1e-2
    untouched = jnp.arange(128)[None, :] != lengths[:, None]
    assert jnp.max(jnp.where(untouched[:, :, None, None], difference, 0)) == 0


@contextmanager
def as_of_many_texts():
    """Attention as of many texts; yields warps of its launches, to which are added what is traced within."""
    warps, launch = [], attention.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MANY", 0)
        patch.setattr(attention, "launch", lambda *a, **k: warps.append(k["warps"]) or launch(*a, **k))
        attention.attend.clear_cache()
        try:
            yield warps
        finally:
            attention.attend.clear_cache()


def test_small_programs_of_attention():
    """Three blocks of positions."""
    exact, model = models("one key head of 64")
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 97, (8, 72)), jnp.int32)
    item, lengths = jnp.arange(8), jnp.asarray([0, 31, 32, 33, 63, 64, 70, 71], jnp.int32)
    keys, values = cache_behind(tokens, exact, model, 72)
    with as_of_many_texts() as warps:
        logits, *_ = fused_step(model, tokens[item, lengths], keys, values, lengths, interpret=True)
    assert warps == [attention.WARPS_OF_MANY]
    expected = run(exact, tokens)[item, lengths]
    assert jnp.max(jnp.linalg.norm(logits - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)) < 1e-2


@pytest.mark.parametrize(
    ("capacity", "programs", "numbers", "splits"),
    [
        (8, 8, 512, 1),
        (128, 16, 512, 2),
        (1088, 8, 512, 16),
        (1088, 4, 512, 16),
        (1088, 4, 1024, 8),
        (1088, 4, 896, 8),
        (8256, 4, 512, 32),
        (8256, 4, 1024, 32),
        (8256, 64, 512, 2),
        (8256, 512, 512, 1),
    ],
)
def test_how_attention_splits_positions(capacity, programs, numbers, splits):
    assert splits_of(capacity, programs, numbers) == splits


def test_what_cannot_run():
    parameters = packed_parameters(BASE)
    stored = Decoder(BASE, parameters, jnp.float16)
    assert "attention.qkv is not laid out" in str(why_not_fused(stored, interpret=True))
    _, model = models("flat scales, two layers")
    here = why_not_fused(model)
    assert here is None if jax.default_backend() == "gpu" else "GPU" in str(here)
    parameters = packed_parameters(BASE, embedding={"ranks": 2, "tile": (64, 0)})
    corrected = Decoder(BASE, lay_out_parameters(parameters), jnp.float16)
    assert "the head has a sidecar" in str(why_not_fused(corrected, interpret=True))
    shared = dataclasses.replace(BASE, num_heads=17)
    many = Decoder(shared, dict(random_parameters(shared, 0)), jnp.float16)
    assert "more than 16 heads" in str(why_not_fused(many, interpret=True))
    small = Decoder(TINY, dict(random_parameters(TINY, 0)), jnp.float16)
    assert "8 columns" in str(why_not_fused(small, interpret=True))


@pytest.mark.parametrize(("matrices", "run"), [([0, 1, 2], 256), ([0, 1, 2, 0], 16)])
def test_rows_of_a_stack_that_do_not_fit(matrices, run):
    weight = lay_out_parameters({"o.weight": random_weight(np.random.default_rng(0), 64, 256)})["o.weight"]
    x = Prepared(jnp.zeros((256 // run, 2, run), jnp.float16), jnp.ones((2, 1), jnp.float32))
    chosen = Chosen(jnp.asarray(matrices, jnp.int32), None)
    with pytest.raises(ValueError, match=f"for 2 rows of x in runs of {run}; expected a multiple of 2"):
        product(x, jax.tree.map(lambda leaf: leaf[None], weight), chosen=chosen, interpret=True)


def test_batches():
    assert [batch_bucket(n) for n in (1, 2, 8, 9, 33, 64)] == [1, 8, 8, 16, 64, 64]
    with pytest.raises(ValueError, match="1 to 64 sequences, got 65"):
        batch_bucket(65)
    _, model = models("flat scales, two layers")
    cache = KVCache.empty(model.config, 3, 8, model.dtype)
    token = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="3 rows of x; expected 1, 8, 16, 32 or a multiple of 64"):
        fused_step(model, token, cache.keys, cache.values, token, interpret=True)
