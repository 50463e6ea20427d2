"""How close a quantized model is to its original: KL divergence, top-1 agreement, perplexity, with errors."""

from svsk_jax.evaluation.divergence import DivergenceReport, Estimate, PerplexityReport, TokenDivergence
from svsk_jax.evaluation.evaluate import Evaluation, Progress, evaluate, evaluate_texts
from svsk_jax.evaluation.report import ReportRow, markdown, rich_tables, to_json
from svsk_jax.evaluation.windows import CONVENTIONS, Convention, Windows, cut_windows, encode_texts

__all__ = [
    "CONVENTIONS",
    "Convention",
    "DivergenceReport",
    "Estimate",
    "Evaluation",
    "PerplexityReport",
    "Progress",
    "ReportRow",
    "TokenDivergence",
    "Windows",
    "cut_windows",
    "encode_texts",
    "evaluate",
    "evaluate_texts",
    "markdown",
    "rich_tables",
    "to_json",
]
