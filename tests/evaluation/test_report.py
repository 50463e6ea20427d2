import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from svsk_jax.evaluation import DivergenceReport, Estimate, Evaluation, PerplexityReport, ReportRow
from svsk_jax.evaluation.report import format_estimate, markdown, rich_tables, to_json


def evaluation(seed: int, text: str = "wiki") -> Evaluation:
    rng = np.random.default_rng(seed)
    nll = rng.gamma(2.0, 1.5, 2000)
    noise = 0.05 * rng.standard_normal(2000)
    report = DivergenceReport.from_tokens(
        rng.gamma(0.5, 0.02, 2000), rng.random(2000) < 0.93, nll, nll + noise
    )
    return Evaluation(
        text=text, convention="llama.cpp", window=512, used=4096, available=300000, report=report
    )


@pytest.mark.parametrize(
    ("value", "error", "scale", "expected"),
    [
        (0.0123456, 0.000456, 1.0, "0.01235 ± 0.00046"),
        (0.93456, 0.0123, 100.0, "93.5 ± 1.2"),
        (12.3456, 3.21, 1.0, "12.3 ± 3.2"),
        (1234.5, 67.8, 1.0, "1234 ± 68"),
        (1.0, 0.0, 1.0, "1 ± 0"),
        (2.5e-9, 3.1e-10, 1.0, "2.50e-09 ± 3.1e-10"),
        (0.0, 3.1e-10, 1.0, "0.0e+00 ± 3.1e-10"),
        (float("inf"), float("inf"), 1.0, "inf ± inf"),
    ],
)
def test_digits_follow_the_error(value, error, scale, expected):
    assert format_estimate(Estimate(value=value, error=error), scale) == expected


def test_markdown_groups_what_compares():
    rows = [
        ReportRow(name="svsk|r8", evaluation=evaluation(0), bits_linears=4.51, bits_file=5.0321),
        ReportRow(name="rtn", evaluation=evaluation(1)),
        ReportRow(name="svsk|r8", evaluation=evaluation(2, "code")),
    ]
    text = markdown(rows)
    lines = text.splitlines()
    assert lines[0] == "**wiki: llama.cpp windows of 512, 4,096 of 300,000 tokens used, 2,000 scored**"
    assert sum(line.startswith("**") for line in lines) == 2
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 + 3
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert table[2].startswith("| svsk\\|r8 | 4.510 | 5.032 | ")
    assert "| rtn | — | — |" in table[3]
    report = evaluation(0).report
    assert isinstance(report, DivergenceReport)
    assert format_estimate(report.mean_kld) in table[2]
    assert format_estimate(report.same_top1, 100.0) in table[2]


def test_rich_tables_show_every_row():
    alone = dataclasses.replace(
        evaluation(0), report=PerplexityReport.from_tokens(np.asarray([1.0, 2.0, 4.0]))
    )
    rows = [ReportRow(name="both", evaluation=evaluation(0)), ReportRow(name="alone", evaluation=alone)]
    tables = rich_tables(rows)
    assert [table.row_count for table in tables] == [9, 4]
    console = Console(width=80)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    shown = captured.get()
    assert "both" in shown
    assert "alone" in shown
    assert "Mean KLD (nats)" in shown
    assert format_estimate(alone.report.ppl) in shown


def test_json_has_every_number():
    rows = [ReportRow(name="m", evaluation=evaluation(0), bits_linears=4.5, bits_file=5.0)]
    data = json.loads(json.dumps(to_json(rows)))
    (row,) = data["rows"]
    assert (row["name"], row["bits_per_weight_linears"], row["bits_per_weight_file"]) == ("m", 4.5, 5.0)
    assert (row["used"], row["available"], row["convention"]) == (4096, 300000, "llama.cpp")
    report = rows[0].evaluation.report
    assert isinstance(report, DivergenceReport)
    assert row["report"]["ppl_ratio"]["error"] == report.ppl_ratio.error
