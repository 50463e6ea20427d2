"""What to calibrate on."""

import dataclasses
from typing import Literal

from svsk_jax.quant.types import QuantConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Calibration text and what is measured on it."""

    calib: tuple[str, ...] = ("mixture",)
    """Texts, each a name or the path of a .txt, .jsonl or .parquet file, with =WEIGHT for its share (1 if not
    given). Names: documentation and code (both ship with Python; builtin is the two), wikitext, github and
    chat (from the hub), self (written by the model itself), mixture (documentation, code, self and, where
    the hub can be reached, its three)."""
    chunks: int = 128
    """Chunks of text in all."""
    chunk_length: int | None = None
    """Tokens in a chunk; by default 512, or the model's context if that is shorter."""
    moments: Literal["full", "diagonal"] = "full"
    """Second moments kept of each linear's input: the full matrix, or the diagonal, which is all that the
    classic recipes need."""
    fisher: Literal["on", "off"] = "on"
    """Whether to measure how strongly the model's output feels each linear's output."""
    fisher_chunks: int = 64
    """Chunks that this is measured on."""
    fisher_memory: float = 8.0
    """Gigabytes of layer inputs held in memory for it; the rest go to disk."""
    batch_tokens: int = 2048
    """Tokens that one device takes at once."""
    seed: int = 0
    """Of the labels that the Fisher pass samples, and of text that the model writes."""

    @property
    def measures_sensitivity(self) -> bool:
        """Whether the Fisher pass runs."""
        return self.fisher == "on" and self.moments == "full"

    def needed_by(self, recipe: QuantConfig) -> "CalibrationConfig":
        """Without what a recipe would not look at."""
        if not recipe.needs_full_moments:
            return dataclasses.replace(self, moments="diagonal", fisher="off")
        return self if recipe.needs_sensitivity else dataclasses.replace(self, fisher="off")
