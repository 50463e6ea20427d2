"""The fit behind the estimates, and what they follow from."""

import numpy as np
import pytest

from benchmarks.speed.estimate import MODELS, measured_shapes
from svsk_jax.pipeline.costs import PARTS, device_bytes, fit, fitted, predict

SHAPES = measured_shapes(1024)


def test_a_cost_that_is_such_a_sum_is_found_again():
    terms = np.array([PARTS["joint"](*shape) for shape in SHAPES], np.float64)
    true = np.array([3e-12, 0.0, 2e-9, 1e-7, 5e-12, 0.0])
    np.testing.assert_allclose(fit(terms, terms @ true), true, rtol=1e-6, atol=1e-18)


def test_no_coefficient_is_negative():
    rng = np.random.default_rng(0)
    terms = rng.uniform(0.5, 2, (6, 3))
    found = fit(terms, terms @ [1.0, 1.0, -0.3])
    assert (found >= 0).all()
    assert found[2] == 0


def test_seconds_are_those_of_all_layers():
    seconds = [(shape, dict.fromkeys(PARTS, shape[0] * shape[1] ** 2 * 1e-09)) for shape in SHAPES]
    for part, exact in (("joint", True), ("options", True), ("output metric", False)):
        cost = fitted(seconds)(part, (4096, 12288))
        assert (cost == pytest.approx(4096 * 12288**2 * 1e-9, rel=1e-6)) == exact
    config = MODELS["Qwen3-8B"]
    found = predict(config, lambda part, shape: float(part == "joint") * shape[0] * shape[1])
    per_layer = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 12288
    assert found["quantize_seconds"] == 36 * per_layer
    assert found["plan_seconds"] == 0


def test_bytes_follow_from_the_widest_input():
    config = MODELS["Qwen3-32B"]
    widest = 4 * 25600**2
    assert 6 * widest < device_bytes(config) < 8 * widest
    assert device_bytes(config, "cpu") > 9 * widest
    assert predict(config, lambda part, shape: 0.0)["statistics_bytes"] > 64 * widest
