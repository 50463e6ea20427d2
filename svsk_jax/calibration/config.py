"""What to calibrate on."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Calibration text and what is measured on it."""

    calib: str = "builtin"
    """Text: builtin, wikitext, or the path of a .txt, .jsonl or .parquet file."""
    chunks: int = 128
    """Chunks of text."""
    chunk_length: int | None = None
    """Tokens in a chunk; by default what the text and the model's context allow, up to 2048."""
    moments: Literal["diagonal", "full"] = "diagonal"
    """Second moments kept of each linear's input: the diagonal, which the classic recipes use, or the full
    matrix."""
    batch_tokens: int = 2048
    """Tokens that one device takes at once."""
