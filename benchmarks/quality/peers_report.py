"""The comparison with peers as Markdown and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import new_figure, save_figure
from svsk_jax.evaluation.divergence import Estimate
from svsk_jax.evaluation.report import format_estimate

Record = Mapping[str, Any]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines)) + "\n"


def _shown(estimate: Mapping[str, float], scale: float = 1.0) -> str:
    return format_estimate(Estimate(**estimate), scale)


def markdown(report: Mapping[str, Any]) -> str:
    """A table over all families and one for each; `report` as `peers evaluate` writes it to JSON."""
    records: Sequence[Record] = report["rows"]
    families, baseline = report["families"], report["baseline"]
    header = ["Linears", "Bits/weight, linears", "… with padding", "Bits/weight, file"]
    header += [f"KLD, {family}" for family in families] + [f"KLD / {baseline}"]
    lines = [
        [
            record["name"],
            f"{record['bits_linears']:.3f}",
            f"{record['bits_linears_with_padding']:.3f}",
            f"{record['bits_file']:.3f}",
            *(_shown(record["families"][family]["mean_kld"]) for family in families),
            _shown(record["kld_ratio"]),
        ]
        for record in records
    ]
    used = ", ".join(f"{count:,} tokens of {family}" for family, count in families.items())
    blocks = [
        f"{report['model']}, {used}; {report['machine']}, {report['date']}.\n\n"
        "± is one standard error, tokens taken as independent. The ratio is the geometric mean over the "
        "families, its error from paired tokens. Only decoder linears are quantized; the file's size takes "
        "embedding and head as int8 (8.25 bits) in every row.\n",
        _table(header, lines),
    ]
    for family in families:
        header = ["Linears", "KLD (nats)", f"/ {baseline}", "99.9 % KLD", "ΔNLL (nats)", "Same top-1 (%)"]
        lines = []
        for record in records:
            found = record["families"][family]
            shown = (_shown(found[key]) for key in ("mean_kld", "kld_ratio", "kld_999", "delta_nll"))
            lines.append([record["name"], *shown, _shown(found["same_top1"], 100)])
        blocks.append(f"**{family}**\n\n" + _table(header, lines))
    return "\n".join(blocks)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """KLD over bits per weight of the linears, as SVG: the geometric mean over the families.

    Raises:
        ImportError: matplotlib is not installed.
    """
    base = next(record for record in report["rows"] if record["name"] == report["baseline"])
    product = 1.0
    for family in report["families"]:
        product *= base["families"][family]["mean_kld"]["value"]
    scale = product ** (1 / len(report["families"]))
    figure = new_figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for record in report["rows"]:
        ours = "recipe" in record
        x, y = record["bits_linears"], record["kld_ratio"]["value"] * scale
        color = "C0" if ours else "0.35"
        axes.errorbar(x, y, yerr=record["kld_ratio"]["error"] * scale, fmt="o", color=color, capsize=2)
        axes.annotate(
            record["name"], (x, y), xytext=(6, 4), textcoords="offset points", color=color, fontsize=9
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("bits per weight of the decoder linears")
    axes.set_ylabel("KL divergence from the original (nats per token)")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
