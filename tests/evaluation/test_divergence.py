import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from svsk_jax.evaluation.divergence import (
    DivergenceReport,
    Estimate,
    PerplexityReport,
    exponential,
    mean_estimate,
    quantile_estimate,
    token_divergence,
    token_nll,
)


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def kld64(reference: np.ndarray, model: np.ndarray) -> np.ndarray:
    log_p, log_q = log_softmax64(reference), log_softmax64(model)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def random_logits(seed: int, noise: float, vocabulary: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = (4 * rng.standard_normal((3, 7, vocabulary))).astype(np.float32)
    return reference, reference + (noise * rng.standard_normal(reference.shape)).astype(np.float32)


@pytest.mark.parametrize("noise", [3.0, 0.1])
def test_divergence_matches_float64(noise):
    reference, model = random_logits(0, noise)
    targets = np.random.default_rng(1).integers(0, reference.shape[-1], (3, 7)).astype(np.int32)
    result = token_divergence(jnp.asarray(reference), jnp.asarray(model), jnp.asarray(targets))
    np.testing.assert_allclose(result.kld, kld64(reference, model), rtol=1e-5)
    np.testing.assert_array_equal(result.same_top1, reference.argmax(-1) == model.argmax(-1))
    for nll, logits in ((result.nll_reference, reference), (result.nll_model, model)):
        expected = -np.take_along_axis(log_softmax64(logits), targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(token_nll(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=1e-5)


def test_tiny_divergences_are_resolved():
    """KLD near 1e-9 nats, a hundredth of what rounding a log-normalizer costs when log p - log q is
    summed."""
    reference, model = random_logits(2, 1e-4)
    expected = kld64(reference, model)
    assert expected.max() < 2e-8
    zeros = jnp.zeros((3, 7), jnp.int32)
    kld = token_divergence(jnp.asarray(reference), jnp.asarray(model), zeros).kld
    np.testing.assert_allclose(kld, expected, rtol=0.05)


def test_identical_logits_have_no_divergence_and_certain_ones_are_finite():
    logits = jnp.asarray([[200.0, 0.0, -200.0], [1.0, 2.0, 3.0]])
    targets = jnp.asarray([1, 0], jnp.int32)
    assert np.all(np.asarray(token_divergence(logits, logits, targets).kld) == 0)
    opposite = token_divergence(logits, logits[:, ::-1], targets)
    np.testing.assert_allclose(
        opposite.kld, kld64(np.asarray(logits), np.asarray(logits)[:, ::-1]), rtol=1e-6
    )


def test_report_errors_are_those_of_paired_differences():
    rng = np.random.default_rng(3)
    nll_reference = rng.gamma(2.0, 1.5, (40, 25)).astype(np.float32)
    nll_model = nll_reference + 0.01 * rng.standard_normal((40, 25)).astype(np.float32) + np.float32(0.02)
    kld = rng.gamma(0.5, 0.1, (40, 25)).astype(np.float32)
    same = rng.random((40, 25)) < 0.9
    report = DivergenceReport.from_tokens(kld, same, nll_reference, nll_model)
    n = 1000
    difference = nll_model.astype(np.float64) - nll_reference
    assert report.tokens == n
    assert report.mean_kld.value == pytest.approx(np.mean(kld, dtype=np.float64))
    assert report.mean_kld.error == pytest.approx(np.std(kld.astype(np.float64), ddof=1) / math.sqrt(n))
    assert report.delta_nll.error == pytest.approx(np.std(difference, ddof=1) / math.sqrt(n))
    assert report.delta_nll.error < report.nll_model.error / 50
    p = same.mean()
    assert report.same_top1.value == pytest.approx(p)
    assert report.same_top1.error == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    ratio = report.ppl_model.value / report.ppl_reference.value
    assert report.ppl_ratio.value == pytest.approx(ratio, rel=1e-12)
    assert report.ppl_ratio.error == pytest.approx(ratio * report.delta_nll.error, rel=1e-12)
    assert report.kld_max == kld.max()
    assert report.kld_median.value == pytest.approx(np.median(kld))
    assert json.loads(json.dumps(report.to_dict()))["mean_kld"]["error"] == report.mean_kld.error


def test_quantile_error_is_half_the_distance_of_order_statistics():
    values = np.random.default_rng(4).permutation(np.arange(1, 10001)) ** 2
    # n p = 9990, the deviation √(10000 · 0.999 · 0.001) = 3.16: ranks 9986 and 9994 hold their own squares.
    estimate = quantile_estimate(values, 0.999)
    assert estimate.error == (9994**2 - 9986**2) / 2
    assert estimate.value == pytest.approx(np.quantile(values, 0.999))
    few = quantile_estimate(np.asarray([1.0, 3.0, 7.0]), 0.999)
    assert few.error == (7 - 3) / 2


def test_quantile_error_is_the_spread_of_sample_quantiles():
    rng = np.random.default_rng(5)
    estimates = [quantile_estimate(rng.exponential(size=2000), 0.9) for _ in range(300)]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(spread, rel=0.2)


def test_perplexity_and_its_limits():
    report = PerplexityReport.from_tokens(np.asarray([1.0, 2.0, 3.0]))
    assert report.ppl.value == pytest.approx(math.exp(2))
    assert report.ppl.error == pytest.approx(math.exp(2) / math.sqrt(3))
    assert exponential(Estimate(value=1000.0, error=1.0)).value == math.inf
    for estimate in (mean_estimate, lambda values: quantile_estimate(values, 0.5)):
        with pytest.raises(ValueError, match="at least 2 scored tokens, got 1"):
            estimate(np.ones(1))
