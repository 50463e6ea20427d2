"""Several texts at a time are the texts that each prompt gives alone."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_int8, random_weight

from svsk_jax.model import Decoder
from svsk_jax.model.laid_out import lay_out_parameters
from svsk_jax.model.parameters import QUANTIZED_LINEARS, random_parameters
from svsk_jax.runtime import SamplingConfig, TextGenerator, generate_batch, steps
from svsk_jax.runtime import generate as generate_module

PROMPTS = ([5, 80, 33, 7, 120, 64, 9], [12], [200, 3, 3])


@pytest.fixture(scope="module")
def fused_generator(config, tokenizer):
    """Of a packed model, by the fused step in interpret mode."""
    config = dataclasses.replace(
        config, hidden_size=64, intermediate_size=64, num_heads=1, num_kv_heads=1, head_dim=64
    )
    rng = np.random.default_rng(0)
    parameters = dict(random_parameters(config, 0))
    for path, value in parameters.items():
        if any(path.endswith(f"{name}.weight") for name in QUANTIZED_LINEARS):
            parameters[path] = random_weight(rng, *value.shape, ranks=2, tile=(64, 0))
        elif len(value.shape) == 2:
            parameters[path] = random_int8(rng, *value.shape)
    model = Decoder(config, lay_out_parameters(parameters), jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "why_not_fused", lambda model: None)
        patch.setattr(steps, "fused_steps", partial(steps.fused_steps, interpret=True))
        return TextGenerator(model, tokenizer, capacity=60)


def test_one_after_another_where_the_model_is_not_fused(generator):
    results = generate_batch(generator, PROMPTS, max_tokens=5)
    alone = [generator.generate(prompt, max_tokens=5) for prompt in PROMPTS]
    assert [each.token_ids for each in results] == [each.token_ids for each in alone]
    assert generate_batch(generator, []) == []


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0.8, seed=3)])
def test_together(fused_generator, sampling, monkeypatch):
    alone = [fused_generator.generate(prompt, max_tokens=20, sampling=sampling) for prompt in PROMPTS]
    together = generate_batch(fused_generator, PROMPTS, max_tokens=20, sampling=sampling)
    # One text stops, the others go on.
    stop = alone[1].token_ids[9]
    monkeypatch.setattr(fused_generator, "stop_ids", frozenset({stop}))
    stopped = generate_batch(fused_generator, PROMPTS, max_tokens=20, sampling=sampling)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert [each.text for each in together] == [each.text for each in alone]
    assert {(len(each.token_ids), each.finish_reason) for each in together} == {(20, "length")}
    for each, whole in zip(stopped, alone, strict=True):
        ends = whole.token_ids.index(stop) if stop in whole.token_ids else len(whole.token_ids)
        assert each.token_ids == whole.token_ids[:ends]
        assert each.finish_reason == ("stop" if stop in whole.token_ids else "length")


def test_mistakes_come_before_any_work(generator):
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        generate_batch(generator, [[1], []])
