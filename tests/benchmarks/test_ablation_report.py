"""What an ablation's table says."""

import math

import pytest

from benchmarks.quality.ablation_report import change, markdown, mean_divergence


def run(*klds, bits=4.6):
    return {"kld": dict(zip("abc", klds, strict=True)), "bits": bits, "layer_error": 1e-3}


def test_change_is_paired_by_text():
    base = [run(0.01, 0.01, 0.01), run(0.04, 0.04, 0.04)]
    assert mean_divergence(run(0.01, 0.02, 0.04)) == pytest.approx(0.02)
    # Twice the divergence on both texts: no error, however far apart the texts are.
    mean, error = change([run(0.02, 0.02, 0.02), run(0.08, 0.08, 0.08)], base)
    assert (mean, error) == pytest.approx((math.log(2), 0.0))
    mean, error = change([run(0.01, 0.01, 0.01), run(0.08, 0.08, 0.08)], base)
    assert (mean, error) == pytest.approx((math.log(2) / 2, math.log(2) / 2))
    with pytest.raises(ValueError, match="got 1 and 2"):
        change(base[:1], base)


def test_table():
    rows = [{"name": "default", "runs": [run(0.01, 0.01, 0.01), run(0.02, 0.02, 0.02)]}]
    rows.append({"name": "other", "runs": [run(0.02, 0.02, 0.02), run(0.04, 0.04, 0.04)]})
    lines = markdown({"rows": rows}).splitlines()
    assert lines[2] == "| default | 4.600 | 1.00e-03 | 0.0150 ± 0.0071 | 1 |"
    assert lines[3].endswith("| 0.0300 ± 0.0141 | 2.000 ± 0.000 |")
