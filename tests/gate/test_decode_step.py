"""A decode step compiled for an H100 runs the kernels on the weights where they lie."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.speed.models import CONFIGS, packed_parameters
from pallas_kernels import aot
from svsk_jax.model import Decoder, KVCache
from svsk_jax.model.laid_out import lay_out_parameters

pytestmark = pytest.mark.skipif(
    bool(aot.what_is_missing()),
    reason=f"NO DECODE STEP WAS COMPILED FOR A GPU: {', '.join(aot.what_is_missing())} missing: `make gate`",
)
CONFIG = dataclasses.replace(CONFIGS["Qwen3-0.6B"], num_layers=2, vocab_size=4096, tie_word_embeddings=False)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "f16": 2, "bf16": 2, "s32": 4, "f32": 4}


def step(parameters, token, keys, values, length):
    cache = KVCache(keys=keys, values=values, length=length)
    logits, grown = Decoder(CONFIG, parameters, jnp.bfloat16).extend(token, cache)
    return jnp.argmax(logits, axis=-1), grown.keys, grown.values, grown.length


def moved(text):
    """Bytes of each array that a copy, a conversion or a transposition makes."""
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:copy|convert|transpose)\(", text)
    return [
        BYTES.get(kind, 8) * math.prod(map(int, shape.split(",") if shape else [])) for kind, shape in found
    ]


@pytest.mark.parametrize("batch", [1, 8])
def test_decode_step(batch):
    weights = jax.eval_shape(
        lambda key: lay_out_parameters(packed_parameters(CONFIG, key)), jax.random.key(0)
    )
    token, length = jax.ShapeDtypeStruct((batch, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    keys = jax.ShapeDtypeStruct((batch, 16, CONFIG.num_kv_heads, CONFIG.head_dim), jnp.bfloat16)
    cache = (keys,) * CONFIG.num_layers
    # Attention of bf16 promotes on its own.
    with jax.numpy_dtype_promotion("standard"):
        compiled, kernels = aot.compile_for(step, (weights, token, cache, cache, length), "sm_90")
    names = {re.sub(r"__\d+$", "", kernel.name) for kernel in kernels}
    product = "svsk_decode" if batch == 1 else "svsk_rows"
    assert {product, "svsk_prepare", "svsk_epilogue", "svsk_int8"} <= names
    # Layers of equal shapes share their kernels: qkv, o, gate and up, down.
    assert sum(kernel.name.startswith(product) for kernel in kernels) == 4
    text = compiled.as_text()
    assert len(re.findall(rf'name = "{product}"', text)) == 4 * CONFIG.num_layers
    smallest = min(leaf.words.size for path, leaf in weights.items() if path.endswith("o.weight"))
    assert max(moved(text), default=0) < smallest
