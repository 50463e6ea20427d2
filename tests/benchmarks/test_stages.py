"""What the benchmark of stages makes of what its processes found, and how it keeps to its cores."""

import os

import pytest

from benchmarks.scale.pinned import pin
from benchmarks.scale.stages_report import markdown, stages

MB = 10**6
PREDICTED = {"calibrate": 400 * MB, "sensitivity": 200 * MB, "plan": 500 * MB}


def found(device, anew=True):
    return {
        "seconds_by_layer": {"calibrate": [1.0, 2.0], "sensitivity": [4.0]},
        "predicted_bytes": PREDICTED,
        "peak_bytes": {"calibrate": 100 * MB, "sensitivity": 240 * MB},
        "peak_bytes_by_layer": {"calibrate": [100 * MB, 90 * MB], "sensitivity": [240 * MB]},
        "device_peak_bytes": device,
        "begins_anew": anew,
    }


@pytest.mark.parametrize(
    ("device", "anew", "ratios"),
    [
        ({}, True, [0.25, 1.2]),
        # Since the process began: beside the larger prediction.
        ({}, False, [0.25, 0.6]),
        ({"calibrate": 300 * MB, "sensitivity": 440 * MB}, True, [0.75, 1.1]),
    ],
)
def test_beside_the_plan(device, anew, ratios):
    rows = list(stages({"model": {"done": True}, "calibrate": found(device, anew)}))
    assert [row["ratio"] for row in rows] == pytest.approx(ratios)
    assert [(row["stage"], row["layers"], row["seconds"]) for row in rows] == [
        ("calibrate", 2, 3.0),
        ("sensitivity", 1, 4.0),
    ]


def test_a_process_that_failed_is_told():
    said = markdown(
        {
            "layers": 2,
            "parameters": 1234,
            "processes": {"calibrate": found({}) | {"error": "not done in time"}},
        }
    )
    assert "1,234 parameters" in said
    assert "| calibrate | 2 of 2 | 3 | 100 | 90 |  | 400 | 0.25 |" in said
    assert said.endswith("calibrate: not done in time\n")


def test_cores():
    here = os.sched_getaffinity(0)
    try:
        pin(None)
        assert os.sched_getaffinity(0) == here
        pin(1)
        assert os.sched_getaffinity(0) == {min(here)}
    finally:
        os.sched_setaffinity(0, here)
    with pytest.raises(ValueError, match="--threads 0: expected 1 to"):
        pin(0)
