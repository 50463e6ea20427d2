"""The ablation as Markdown: what each variant costs against the default recipe, over calibration texts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def mean_divergence(run: Record) -> float:
    """Geometric mean over the families of text of mean KLD, in nats."""
    return statistics.geometric_mean(run["kld"].values())


def change(runs: Sequence[Record], base: Sequence[Record]) -> tuple[float, float]:
    """ln of KLD over the default's KLD, paired by calibration text: mean and standard error.

    Raises:
        ValueError: fewer than two texts, or not as many as the default has.
    """
    if len(runs) != len(base) or len(runs) < 2:
        raise ValueError(f"expected two or more calibration texts each, got {len(runs)} and {len(base)}")
    ratios = [
        math.log(mean_divergence(run) / mean_divergence(of)) for run, of in zip(runs, base, strict=True)
    ]
    return statistics.mean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))


def markdown(report: Record) -> str:
    """One line for each variant; the first row of `report` is what the others are compared with."""
    base = report["rows"][0]
    lines = [
        f"| variant | bits/weight | layer error | KLD | ÷ {base['name']} |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        runs = row["runs"]
        each = [mean_divergence(run) for run in runs]
        shown = "1"
        if row is not base:
            mean, error = change(runs, base["runs"])
            shown = f"{math.exp(mean):.3f} ± {math.exp(mean) * error:.3f}"
        lines.append(
            f"| {row['name']} | {statistics.mean(run['bits'] for run in runs):.3f} "
            f"| {statistics.mean(run['layer_error'] for run in runs):.2e} "
            f"| {statistics.mean(each):.4f} ± {statistics.stdev(each):.4f} | {shown} |"
        )
    return "\n".join(lines) + "\n"
