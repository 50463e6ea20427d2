"""The benchmark of a large model's first layers: what it tells of memory."""

from benchmarks.speed.block import highest, predicted_peaks_mb, whole
from svsk_jax.known_models import KNOWN


def test_the_stage_of_the_peak_is_the_first_that_reached_it():
    assert highest({"calibrate": 3.0, "sensitivity": 5.0, "plan": 5.0, "quantize": 5.0}) == "sensitivity"
    assert highest({"calibrate": 3.0, "sensitivity": None}) == "calibrate"
    assert highest({"calibrate": None}) is None


def test_each_stage_has_a_prediction():
    peaks = predicted_peaks_mb(KNOWN["Qwen3-0.6B"], 128)
    assert set(peaks) == {"calibrate", "sensitivity", "plan", "quantize"}
    assert all(peak > 100 for peak in peaks.values())


def test_the_whole_model_is_the_measured_layers_and_more_like_the_last():
    stages = {"compiled at first, files at last": [9.0, 5.0, 3.0, 1.0, 2.0, 7.0], "one layer": [2.0]}
    assert whole(stages, 10) == {"compiled at first, files at last": 27.0 + 4 * 1.5, "one layer": 20.0}
