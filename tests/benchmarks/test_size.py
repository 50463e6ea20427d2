"""The tables and the plot of the benchmark of sizes."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks.scale.size_report import STAGES, growths, markdown, peaks, plot, worst


def row(parameters, seconds):
    return {
        "parameters": 2 * parameters,
        "layer_parameters": parameters,
        "devices": 1,
        "seconds_by_layer": {stage: [9.0, seconds, seconds, 4 * seconds] for stage in STAGES},
        "peak_bytes": {"calibrate": 300e6, "quantize": 900e6} | dict.fromkeys(STAGES[1:3], 1e6),
        "memory_plan": {"peaks": {"text": 5e9} | dict.fromkeys(STAGES, 10**9)},
    }


REPORT = {"sizes": [row(1000, 1.0), row(4000, 4.0)], "by_devices": [row(1000, 1.0)]}


def test_tables():
    assert peaks(REPORT["sizes"][0]) == (900, 1000)
    assert worst(REPORT["sizes"][0]) == ("quantize", pytest.approx(0.9))
    said = markdown(REPORT)
    assert "| 8,000 | 132 | 4.00 | 4.00 | 4.00 | 4.00 | 900 | 1000 | 0.90 | quantize 0.90 |" in said
    assert "| all stages | 1.00 | 1.000 |" in said


def test_growth():
    """Proportional, as x^1.5, and no straight line."""
    assert growths([row(1000, 1.0), row(4000, 4.0)])["plan"] == pytest.approx((1, 1))
    assert growths([row(1000, 1.0), row(4000, 8.0)])["all stages"].power == pytest.approx(1.5)
    bent = growths([row(1000, 1.0), row(2000, 9.0), row(3000, 1.0)])
    assert bent["quantize"].straight == pytest.approx(0)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot(REPORT, tmp_path / "size.svg")
    assert ET.parse(tmp_path / "size.svg").getroot().tag.endswith("svg")
