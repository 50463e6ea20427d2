import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.evaluation import DivergenceReport, PerplexityReport, evaluate, evaluate_texts
from svsk_jax.evaluation.divergence import token_divergence
from svsk_jax.evaluation.evaluate import chunk_rows, window_divergence, window_nll
from svsk_jax.evaluation.windows import cut_windows
from svsk_jax.model import Decoder, ModelConfig
from svsk_jax.model.parameters import random_parameters


@pytest.fixture
def config(tiny_config) -> ModelConfig:
    return dataclasses.replace(tiny_config, num_layers=1)


@pytest.fixture
def reference(config) -> Decoder:
    return Decoder(config, random_parameters(config, 0))


@pytest.fixture
def model(config) -> Decoder:
    clean, noise = random_parameters(config, 0), random_parameters(config, 1)
    return Decoder(config, {path: clean[path] + 0.1 * noise[path] for path in clean})


@pytest.fixture
def windows(tiny_config):
    ids = np.random.default_rng(0).integers(0, tiny_config.vocab_size, 7 * 24 + 5).astype(np.int32)
    return cut_windows(ids, "llama.cpp", context=256, window=24)


run = jax.jit(lambda decoder, tokens: decoder(tokens))


def direct(reference: Decoder, model: Decoder, windows):
    """The definition: all logits at once, then the scored positions."""
    tokens = jnp.asarray(windows.tokens)
    logits = [run(decoder, tokens)[:, windows.first : -1] for decoder in (reference, model)]
    return token_divergence(*logits, tokens[:, windows.first + 1 :])


@pytest.mark.parametrize("chunk", [10, 77, 500])
def test_chunked_heads_equal_all_logits_at_once(reference, model, windows, chunk):
    expected = direct(reference, model, windows)
    tokens = jnp.asarray(windows.tokens)
    result = window_divergence(reference, model, tokens, first=windows.first, chunk=chunk)
    nll = window_nll(model, tokens, first=windows.first, chunk=chunk)
    assert result.kld.shape == (7, 24 - 1 - 12)
    np.testing.assert_allclose(result.kld, expected.kld, atol=1e-6)
    np.testing.assert_array_equal(result.same_top1, expected.same_top1)
    np.testing.assert_allclose(result.nll_reference, expected.nll_reference, atol=1e-5)
    np.testing.assert_allclose(result.nll_model, expected.nll_model, atol=1e-5)
    np.testing.assert_allclose(nll, expected.nll_model, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_and_their_filling_do_not_change_the_report(reference, model, windows, batch_size):
    calls = []
    evaluation = evaluate(
        model,
        windows,
        reference=reference,
        text="noise",
        batch_size=batch_size,
        progress=lambda done, total: calls.append((done, total)),
    )
    expected = DivergenceReport.from_tokens(
        *(np.asarray(field) for field in direct(reference, model, windows))
    )
    report = evaluation.report
    assert isinstance(report, DivergenceReport)
    assert report.tokens == windows.scored == 77
    for name in ("mean_kld", "kld_999", "same_top1", "delta_nll", "ppl_ratio", "ppl_reference", "ppl_model"):
        ours, theirs = getattr(report, name), getattr(expected, name)
        assert ours.value == pytest.approx(theirs.value, rel=1e-4, abs=1e-6), name
        assert ours.error == pytest.approx(theirs.error, rel=1e-3, abs=1e-6), name
    assert report.mean_kld.value > 1e-3
    assert calls[-1] == (7, 7)
    assert [done for done, _ in calls] == sorted({min(7, i + batch_size) for i in range(0, 7, batch_size)})
    assert (evaluation.used, evaluation.available, evaluation.window) == (168, 173, 24)


def test_batches_compile_once(reference, model, windows):
    before = window_divergence._cache_size()
    evaluate(model, windows, reference=reference, batch_size=2)
    assert window_divergence._cache_size() == before + 1


def test_identical_models_do_not_diverge(reference, windows):
    report = evaluate(reference, windows, reference=reference).report
    assert isinstance(report, DivergenceReport)
    assert report.kld_max == 0
    assert report.same_top1.value == 1
    assert (report.delta_nll.value, report.delta_nll.error) == (0, 0)
    assert report.ppl_ratio.value == 1


def test_a_model_alone_has_the_perplexity_it_has_beside_a_reference(reference, model, windows):
    alone = evaluate(model, windows).report
    both = evaluate(model, windows, reference=reference).report
    assert isinstance(alone, PerplexityReport)
    assert isinstance(both, DivergenceReport)
    assert alone.ppl.value == pytest.approx(both.ppl_model.value, rel=1e-5)
    assert alone.nll.error == pytest.approx(both.nll_model.error, rel=1e-5)


def test_texts_by_both_conventions(config, byte_tokenizer):
    config = dataclasses.replace(config, vocab_size=300, max_position_embeddings=64)
    model = Decoder(config, random_parameters(config, 0))
    texts = ["lorem ipsum " * 20, "dolor sit amet"]
    first, second = evaluate_texts(model, byte_tokenizer(bos=True), texts, text="latin", max_tokens=150)
    assert (first.convention, second.convention) == ("gptq", "llama.cpp")
    assert first.text == "latin"
    assert (first.window, first.used, first.available) == (64, 128, 1 + 240 + 2 + 14)
    assert first.report.tokens == 2 * 63
    assert second.report.tokens == 2 * 31
    assert first.report != second.report


def test_mistakes_are_told(reference, config, windows):
    other = dataclasses.replace(config, vocab_size=98)
    with pytest.raises(ValueError, match="vocabulary of 98, the model of 97"):
        evaluate(reference, windows, reference=Decoder(other, random_parameters(other, 0)))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(reference, windows, batch_size=0)
    foreign = cut_windows(np.full(24, 97, np.int32), "gptq", context=24)
    with pytest.raises(ValueError, match="token id 97, the model's vocabulary is 97"):
        evaluate(reference, foreign)


def test_chunks_shrink_with_the_vocabulary():
    assert chunk_rows(49_152) == 256
    assert chunk_rows(151_936) * 151_936 * 4 <= 128 * 2**20
    assert chunk_rows(2**30) == 1
