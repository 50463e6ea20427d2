"""Texts over several GPUs, which add up in each other's memory:

JAX_PLATFORMS=cuda python -m pytest tests/parallel/test_generate_device.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from support import byte_tokenizer
from test_decoder import PACKED, PROMPTS, PackedSource

from svsk_jax.model import Decoder
from svsk_jax.model.laid_out import lay_out_for_device
from svsk_jax.parallel import make_mesh
from svsk_jax.parallel.decoder import load_parallel
from svsk_jax.runtime import TextGenerator, generate_batch

GPUS = jax.device_count() if jax.default_backend() == "gpu" else 0
pytestmark = pytest.mark.skipif(
    GPUS < 2,
    reason=f"NO TEXT WAS MADE OVER SEVERAL GPUS: there are {GPUS}; set JAX_PLATFORMS=cuda where there are",
)

DTYPE = jnp.float16


@pytest.mark.parametrize("gpus", [2, 4])
def test_texts_are_those_of_one_gpu(gpus):
    if gpus > GPUS:
        pytest.skip(f"NO TEXT WAS MADE OVER {gpus} GPUS: there are {GPUS}")
    config = dataclasses.replace(
        PACKED, hidden_size=512, intermediate_size=1024, num_layers=3, num_heads=16, num_kv_heads=4
    )
    source = PackedSource(config, ranks=(0, 9), tile=(64, 0))
    parameters = jax.device_put(dict(source.parameters), jax.devices()[0])
    alone = Decoder(config, lay_out_for_device(parameters, DTYPE), DTYPE)
    spread = load_parallel(source, DTYPE, make_mesh(1, gpus, jax.devices()[:gpus]))
    one, several = (TextGenerator(model, byte_tokenizer(), capacity=200) for model in (alone, spread))
    assert several.fused
    assert several.boxes is not None
    expected = [one.generate(prompt, max_tokens=40).token_ids for prompt in PROMPTS]
    assert len(set(expected[0])) > 2
    for _ in range(10):
        assert [several.generate(prompt, max_tokens=40).token_ids for prompt in PROMPTS] == expected
    together = generate_batch(one, PROMPTS, max_tokens=40)
    for _ in range(10):
        found = generate_batch(several, PROMPTS, max_tokens=40)
        assert [each.token_ids for each in found] == [each.token_ids for each in together]
