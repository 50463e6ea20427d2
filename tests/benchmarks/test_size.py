"""The tables and the plot of the benchmark of sizes."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks.scale.size_report import STAGES, growth, markdown, peaks, plot


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
    assert growth(REPORT["sizes"]) == pytest.approx(1)
    assert growth([row(1000, 1.0), row(4000, 8.0)]) == pytest.approx(1.5)
    assert peaks(REPORT["sizes"][0]) == (900, 1000)
    said = markdown(REPORT)
    assert "| 8,000 | 132 | 4.00 | 4.00 | 4.00 | 4.00 | 900 | 1000 | 0.90 |" in said
    assert "to the power 1.00" in said


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot(REPORT, tmp_path / "size.svg")
    assert ET.parse(tmp_path / "size.svg").getroot().tag.endswith("svg")
