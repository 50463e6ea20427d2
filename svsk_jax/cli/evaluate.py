"""`svsk evaluate`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from svsk_jax.calibration.text import read_texts
from svsk_jax.cli.common import ModelFlags, Verb, console, progress_bar
from svsk_jax.evaluation import report
from svsk_jax.evaluation.evaluate import Evaluation, evaluate_texts
from svsk_jax.evaluation.windows import CONVENTIONS, Convention
from svsk_jax.model.source import ModelSource
from svsk_jax.models import Weights, load_model, open_model
from svsk_jax.storage.checkpoint import SavedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(ModelFlags, Verb):
    """Measure a model against its unquantized reference: KL divergence, agreement, perplexity, with
    standard errors."""

    reference: str | None = None
    """The unquantized model; without it only perplexity is measured."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")] = ("builtin",)
    """Texts to evaluate on: builtin, wikitext, or paths."""
    convention: Literal["both", "gptq", "llama.cpp"] = "both"
    """Windows: gptq (whole windows of up to 2048), llama.cpp (second half of windows of 512), or both."""
    window: int | None = None
    """Tokens in a window, instead of the convention's."""
    tokens: int = 32768
    """At most this many tokens of each text under each convention; 0 for all of it."""

    weights: Weights = "auto"
    """Run from packed weights or from their dense restore; auto: dense on a CPU, which is faster and takes
    six times the memory."""

    def run(self) -> dict[str, Any]:
        """Evaluate."""
        source = open_model(self.model, revision=self.revision)
        tokenizer = source.tokenizer()
        texts = {_title(name): read_texts(name, "evaluation") for name in self.text}
        conventions: tuple[Convention, ...] = CONVENTIONS if self.convention == "both" else (self.convention,)
        model = load_model(source, weights=self.weights)
        reference = (
            None if self.reference is None else load_model(open_model(self.reference), weights="dense")
        )
        rows = []
        for name, documents in texts.items():
            with progress_bar(f"evaluate {name}") as move:
                evaluations = evaluate_texts(
                    model,
                    tokenizer,
                    documents,
                    reference=reference,
                    text=name,
                    conventions=conventions,
                    window=self.window,
                    max_tokens=self.tokens or None,
                    progress=lambda done, total, move=move: move(done, total, "windows"),
                )
            rows += [report_row(source, evaluation) for evaluation in evaluations]
        for table in report.rich_tables(rows):
            console.print(table)
        return report.to_json(rows)


def _title(text: str) -> str:
    return text if text in ("builtin", "wikitext") else Path(text).name


def report_row(source: ModelSource, evaluation: Evaluation) -> report.ReportRow:
    """A line of the report, with the model's bits per weight where it is a quantized one."""
    metadata = source.metadata if isinstance(source, SavedModel) else {}
    bits = metadata.get("bits", {})
    return report.ReportRow(
        name=metadata.get("recipe", "unquantized"),
        evaluation=evaluation,
        bits_linears=bits.get("decoder_linears"),
        bits_file=bits.get("whole_file"),
    )
