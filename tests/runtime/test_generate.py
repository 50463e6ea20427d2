import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.model import Decoder
from svsk_jax.model.parameters import random_parameters
from svsk_jax.runtime import SamplingConfig, TextGenerator, steps
from svsk_jax.runtime.steps import prefill_bucket

run = jax.jit(lambda decoder, tokens: decoder(tokens))
PROMPT = [5, 80, 33, 7, 120, 64, 9]


def greedy_by_full_forward(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The definition: the whole text again for every token, at one padded length (causality makes padding
    harmless)."""
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(run(model, jnp.asarray(padded))[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_of_the_full_forward_repeated(model, generator):
    result = generator.generate(PROMPT, max_tokens=24)
    assert list(result.token_ids) == greedy_by_full_forward(model, PROMPT, 24)
    assert len(set(result.token_ids)) > 3
    assert (result.finish_reason, result.prompt_tokens) == ("length", 7)
    assert result.prefill_seconds > 0
    assert result.tokens_per_second > 0


def test_padding_of_the_prompt_changes_nothing(generator, monkeypatch):
    sampling = SamplingConfig(temperature=1.0, seed=3)
    texts = []
    for bucket in (len(PROMPT), 61, 96):
        monkeypatch.setattr(steps, "prefill_bucket", lambda length, capacity, bucket=bucket: bucket)
        texts.append(generator.generate(PROMPT, max_tokens=30, sampling=sampling).token_ids)
    assert len(set(texts)) == 1


def test_buckets_are_powers_of_two_up_to_the_capacity():
    lengths = (1, 16, 17, 64, 65, 99)
    assert [prefill_bucket(length, 100) for length in lengths] == [16, 16, 32, 64, 100, 100]
    assert prefill_bucket(3, 8) == 8


def test_prompts_of_one_bucket_compile_once(model, tokenizer, monkeypatch):
    traces = []
    for name in ("prefill", "step"):
        original = getattr(steps, name)

        def counted(*arguments, _original=original, _name=name, **named):
            traces.append(_name)
            return _original(*arguments, **named)

        # The wrapper must keep the parameter names: the state is donated by name.
        counted.__signature__ = inspect.signature(original)
        monkeypatch.setattr(steps, name, counted)
    generator = TextGenerator(model, tokenizer)
    for prompt, sampling in (
        ([1, 2, 3], SamplingConfig()),
        ([4] * 9, SamplingConfig(temperature=0.7, top_k=4, seed=9)),
        ([4] * 16, SamplingConfig(temperature=0.3, min_p=0.1)),
    ):
        generator.generate(prompt, max_tokens=5, sampling=sampling)
    assert sorted(traces) == ["prefill", "step"]
    generator.generate([4] * 17, max_tokens=5)
    assert sorted(traces) == ["prefill", "prefill", "step"]


def test_stop_tokens_end_the_text_and_are_not_shown(generator, monkeypatch):
    free = generator.generate(PROMPT, max_tokens=24).token_ids
    stop = free[10]
    first = free.index(stop)
    monkeypatch.setattr(generator, "stop_ids", frozenset({stop, 261}))
    result = generator.generate(PROMPT, max_tokens=24)
    assert result.token_ids == free[:first]
    assert result.finish_reason == "stop"
    monkeypatch.setattr(generator, "stop_ids", frozenset({free[0]}))
    at_once = generator.generate(PROMPT, max_tokens=24)
    assert (at_once.text, at_once.token_ids, at_once.finish_reason) == ("", (), "stop")
    assert at_once.tokens_per_second == 0


def test_pieces_stream_and_join_to_the_text(generator, tokenizer):
    sampling = SamplingConfig(temperature=2.0, seed=1)
    stream = generator.stream(PROMPT, max_tokens=60, sampling=sampling)
    first = next(stream)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = stream.result
    pieces = [first, *stream]
    assert len(pieces) > 5
    assert "".join(pieces) == stream.result.text
    decoded = tokenizer.decode(stream.result.token_ids, skip_special_tokens=True)
    assert stream.result.text == decoded.rstrip("\ufffd")
    assert list(stream) == []
    assert len(stream.result.token_ids) == 60


def test_text_comes_before_the_last_step(generator, monkeypatch):
    calls = []
    step = generator._step

    class Counting:
        lower = staticmethod(step.lower)

        def __call__(self, *arguments):
            calls.append(None)
            return step(*arguments)

    monkeypatch.setattr(generator, "_step", Counting())
    stream = generator.stream(PROMPT, max_tokens=20)
    next(stream)
    early = len(calls)
    assert len([*stream]) > 3
    assert early < 10
    assert len(calls) == 19


def test_seeds_decide_the_text(generator):
    def text(seed: int) -> tuple[int, ...]:
        sampling = SamplingConfig(temperature=1.5, top_p=0.95, seed=seed)
        return generator.generate(PROMPT, max_tokens=20, sampling=sampling).token_ids

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_capacity_ends_the_text(generator, model, tokenizer):
    result = TextGenerator(model, tokenizer, capacity=20).generate(PROMPT, max_tokens=1000)
    assert (len(result.token_ids), result.finish_reason) == (13, "length")
    assert list(result.token_ids) == greedy_by_full_forward(model, PROMPT, 24)[:13]
    filled = generator.generate([3] * 95, max_tokens=10)
    assert len(filled.token_ids) == 1


def test_the_default_capacity_is_the_context_up_to_a_limit(config, generator, tokenizer):
    assert generator.capacity == 96
    large = dataclasses.replace(config, max_position_embeddings=131_072)
    assert TextGenerator(Decoder(large, random_parameters(large, 0)), tokenizer).capacity == 4096


def test_mistakes_are_told_with_numbers(model, tokenizer):
    generator = TextGenerator(model, tokenizer, capacity=20)
    with pytest.raises(ValueError, match=r"prompt has 20 tokens and leaves no room within 20.*context is 96"):
        generator.stream([1] * 20)
    with pytest.raises(ValueError, match="prompt is empty"):
        generator.stream([])
    with pytest.raises(ValueError, match="from 1 to 262, the vocabulary is 262"):
        generator.stream([1, 262])
    with pytest.raises(ValueError, match="--max-tokens must be at least 1, got 0"):
        generator.stream([1], max_tokens=0)
    with pytest.raises(ValueError, match="from 2 to the model's context of 96, got 97"):
        TextGenerator(model, tokenizer, capacity=97)
