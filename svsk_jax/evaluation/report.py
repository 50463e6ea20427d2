"""Evaluations as tables for the terminal and for Markdown, and as plain data."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from svsk_jax.evaluation.divergence import DivergenceReport, Estimate
from svsk_jax.evaluation.evaluate import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One line of a table: a model's name, its evaluation, and its size in bits per weight.

    `bits_linears` counts the decoder's linears alone, `bits_file` the whole file with embeddings and norms;
    None shows as a dash.
    """

    name: str
    evaluation: Evaluation
    bits_linears: float | None = None
    bits_file: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        sizes = {"bits_per_weight_linears": self.bits_linears, "bits_per_weight_file": self.bits_file}
        return {"name": self.name, **sizes, **self.evaluation.to_dict()}


def format_estimate(estimate: Estimate, scale: float = 1.0) -> str:
    """`value ± error` times `scale`, with two significant digits of the error, the value to the same place.

    Errors of zero, or not finite, leave the value with four significant digits; tiny ones go to exponents.
    """
    value, error = estimate.value * scale, estimate.error * scale
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{value:.4g} ± {error:.2g}"
    place = 1 - math.floor(math.log10(error))
    if place > 7:
        digits = max(1, place + math.floor(math.log10(abs(value)))) if value else 1
        return f"{value:.{digits}e} ± {error:.1e}"
    return f"{value:.{max(place, 0)}f} ± {error:.{max(place, 0)}f}"


def _bits(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


_Column = tuple[str, Callable[[ReportRow], str]]


def _estimate_column(title: str, field: str, scale: float = 1.0) -> _Column:
    return title, lambda row: format_estimate(getattr(row.evaluation.report, field), scale)


_SIZE_COLUMNS: tuple[_Column, ...] = (
    ("Model", lambda row: row.name),
    ("Bits/weight, linears", lambda row: _bits(row.bits_linears)),
    ("Bits/weight, file", lambda row: _bits(row.bits_file)),
)
_DIVERGENCE_COLUMNS: tuple[_Column, ...] = (
    *_SIZE_COLUMNS,
    _estimate_column("Mean KLD (nats)", "mean_kld"),
    _estimate_column("Same top-1 (%)", "same_top1", 100.0),
    _estimate_column("ΔNLL (nats)", "delta_nll"),
    _estimate_column("PPL ratio", "ppl_ratio"),
    _estimate_column("99.9 % KLD", "kld_999"),
    _estimate_column("PPL", "ppl_model"),
    _estimate_column("PPL, reference", "ppl_reference"),
)
_PERPLEXITY_COLUMNS: tuple[_Column, ...] = (
    *_SIZE_COLUMNS,
    _estimate_column("NLL (nats)", "nll"),
    _estimate_column("PPL", "ppl"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
    """Rows that were measured on the same tokens in the same way, and so compare."""

    title: str
    header: list[str]
    cells: list[list[str]]


def _sections(rows: Sequence[ReportRow]) -> list[_Section]:
    groups: dict[tuple, list[ReportRow]] = {}
    for row in rows:
        run = row.evaluation
        key = (
            run.text,
            run.convention,
            run.window,
            run.used,
            run.available,
            run.report.tokens,
            type(run.report),
        )
        groups.setdefault(key, []).append(row)
    sections = []
    for (text, convention, window, used, available, scored, kind), members in groups.items():
        columns = _DIVERGENCE_COLUMNS if kind is DivergenceReport else _PERPLEXITY_COLUMNS
        share = f"{used:,} of {available:,} tokens used, {scored:,} scored"
        cells = [[cell(row) for _, cell in columns] for row in members]
        sections.append(
            _Section(
                title=f"{text}: {convention} windows of {window}, {share}",
                header=[name for name, _ in columns],
                cells=cells,
            )
        )
    return sections


def rich_tables(rows: Sequence[ReportRow]) -> list[Table]:
    """One table for each text, convention and number of tokens; ± is one standard error.

    A column per model, so that a few models fit a terminal of 80 columns.
    """
    tables = []
    for section in _sections(rows):
        table = Table(title=section.title, caption="± one standard error, tokens taken as independent")
        for line in zip(section.header, *section.cells, strict=True):
            if not table.columns:
                for index, name in enumerate(line):
                    table.add_column(name, justify="right" if index else "left")
            else:
                table.add_row(*line)
        tables.append(table)
    return tables


def markdown(rows: Sequence[ReportRow]) -> str:
    """The same tables in Markdown, each under its title in bold; ± is one standard error."""
    blocks = []
    for section in _sections(rows):
        rule = ["---", *["---:"] * (len(section.header) - 1)]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in section.cells]
        lines = ["| " + " | ".join(line) + " |" for line in (section.header, rule, *cells)]
        blocks.append(f"**{section.title}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(blocks)


def to_json(rows: Sequence[ReportRow]) -> dict[str, Any]:
    """Plain data of all rows, with the units spelled out."""
    units = {"kld": "nats", "nll": "nats per token", "same_top1": "fraction", "error": "one standard error"}
    return {"units": units, "rows": [row.to_dict() for row in rows]}
