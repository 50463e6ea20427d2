"""Seconds and memory against size and devices as Markdown and as a plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.plots import new_figure, save_figure

Row = Mapping[str, Any]
STAGES = ("calibrate", "sensitivity", "plan", "quantize")


def layer_seconds(row: Row) -> dict[str, float]:
    """Seconds of a layer in each stage: the median of all but the first, which compiles most."""
    return {stage: statistics.median(each[1:]) for stage, each in row["seconds_by_layer"].items()}


def peaks(row: Row) -> tuple[float, float]:
    """(measured, predicted) largest memory of the stages that were run, in MB."""
    measured = row["peak_bytes"]
    predicted = row["memory_plan"]["peaks"]
    return max(measured.values()) / 1e6, max(predicted[stage] for stage in measured) / 1e6


def worst(row: Row) -> tuple[str, float]:
    """The stage whose measured memory is largest beside its prediction, and their ratio."""
    predicted = row["memory_plan"]["peaks"]
    ratios = {stage: measured / predicted[stage] for stage, measured in row["peak_bytes"].items()}
    stage = max(ratios, key=lambda name: ratios[name])
    return stage, ratios[stage]


class Growth(NamedTuple):
    """How seconds grow with parameters over several models."""

    power: float
    """Of its parameters that they grow with: least squares of logarithms."""
    straight: float
    """R² of a straight line through them; 1 where they grow in proportion, or by a constant more."""


def growth(parameters: Sequence[float], seconds: Sequence[float]) -> Growth:
    """Fit both."""
    power = np.polyfit(np.log(parameters), np.log(seconds), 1)[0]
    return Growth(float(power), float(np.corrcoef(parameters, seconds)[0, 1] ** 2))


def growths(rows: Sequence[Row]) -> dict[str, Growth]:
    """Of the seconds of a layer with its parameters: of all stages together, and of each."""
    parameters = [row["layer_parameters"] for row in rows]
    seconds = [layer_seconds(row) for row in rows]
    together = {"all stages": growth(parameters, [sum(each.values()) for each in seconds])}
    return together | {stage: growth(parameters, [each[stage] for each in seconds]) for stage in STAGES}


def markdown(report: Mapping[str, Any]) -> str:
    """The tables; `report` as `benchmarks.scale.size` writes it to JSON."""
    blocks = [_table("parameters", report["sizes"])]
    if len(report["sizes"]) > 1:
        blocks.append("Seconds of a layer against its parameters:\n")
        lines = [["", "power of the parameters", "R² of a straight line"], ["---"] + ["---:"] * 2]
        for stage, found in growths(report["sizes"]).items():
            lines.append([stage, f"{found.power:.2f}", f"{found.straight:.3f}"])
        blocks.append(_joined(lines))
    if "by_devices" in report:
        blocks.append(_table("devices", report["by_devices"]))
    return "\n".join(blocks)


def _joined(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _table(key: str, rows: Sequence[Row]) -> str:
    stages = [stage for stage in STAGES if stage in rows[0]["peak_bytes"]]
    header = [key, "all seconds", *(f"{stage}, s/layer" for stage in stages)]
    header += ["peak, MB", "predicted, MB", "measured / predicted", "worst stage"]
    lines = [header, ["---:"] * len(header)]
    for row in rows:
        measured, predicted = peaks(row)
        everything = sum(sum(each) for each in row["seconds_by_layer"].values())
        each, (stage, ratio) = layer_seconds(row), worst(row)
        lines.append(
            [
                f"{row[key]:,}",
                f"{everything:.0f}",
                *(f"{each[stage]:.2f}" for stage in stages),
                f"{measured:.0f}",
                f"{predicted:.0f}",
                f"{measured / predicted:.2f}",
                f"{stage} {ratio:.2f}",
            ]
        )
    return _joined(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Seconds of a layer, and peaks beside their predictions, over parameters, as SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = report["sizes"]
    figure = new_figure(figsize=(9, 3.8), layout="constrained")
    times, memory = figure.subplots(1, 2)
    layers = [row["layer_parameters"] / 1e6 for row in rows]
    for stage in STAGES:
        times.plot(layers, [layer_seconds(row)[stage] for row in rows], "o-", label=stage)
    times.set_xlabel("parameters of a layer (millions)")
    times.set_ylabel("seconds of a layer")
    models = [row["parameters"] / 1e6 for row in rows]
    memory.plot(models, [peaks(row)[0] for row in rows], "o-", label="measured")
    memory.plot(models, [peaks(row)[1] for row in rows], "x--", color="0.35", label="predicted")
    memory.set_xlabel("parameters of the model (millions)")
    memory.set_ylabel("largest memory of the process (MB)")
    for axes in (times, memory):
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
