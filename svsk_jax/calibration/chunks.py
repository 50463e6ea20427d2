"""From the texts that a user names to chunks of a model's tokens."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.mixture import Chunks, cut_chunks, parse_mixture
from svsk_jax.calibration.self_text import sample_tokens
from svsk_jax.calibration.sources import HUB_SOURCES, SOURCES
from svsk_jax.calibration.text import read_texts, tokenize
from svsk_jax.model.source import ModelSource

SELF = "self"
ALIASES: dict[str, dict[str, float]] = {
    "builtin": {"documentation": 0.5, "code": 0.5},
    "mixture": {"documentation": 1, "code": 1, SELF: 1, **dict.fromkeys(HUB_SOURCES, 1.0)},
}
"""Names for several sources, with the share of each."""


def text_identity(calib: Sequence[str]) -> dict[str, float]:
    """Weight of each text in `CalibrationConfig.calib`, a file by the SHA-256 of what is in it, so that two
    runs on the same text can be told from two on different ones."""
    identity: dict[str, float] = {}
    for name, weight in parse_mixture(calib).items():
        path = Path(name).expanduser()
        if name not in {SELF, *ALIASES, *SOURCES} and path.is_file():
            with path.open("rb") as file:
                name = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        identity[name] = identity.get(name, 0.0) + weight
    return identity


def writes_own_text(calib: Sequence[str]) -> bool:
    """Whether some of the text in `CalibrationConfig.calib` is written by the model itself."""
    return any(SELF in ALIASES.get(name, {name: 1.0}) for name in parse_mixture(calib))


def calibration_chunks(source: ModelSource, calibration: CalibrationConfig, dtype: DTypeLike) -> Chunks:
    """Chunks of the texts in `calibration.calib`, tokenized with the model's tokenizer.

    Raises:
        ValueError: no such text, too little of it, or a bad chunk length.
        ConnectionError: a text named by itself needs the hub; within `mixture` it is left out with a warning.
    """
    tokenizer = source.tokenizer()
    weights: dict[str, float] = {}
    optional: set[str] = set()
    for name, weight in parse_mixture(calibration.calib).items():
        for part, share in ALIASES.get(name, {name: 1.0}).items():
            weights[part] = weights.get(part, 0.0) + weight * share
            if name == "mixture" and part in HUB_SOURCES:
                optional.add(part)
    tokens: dict[str, np.ndarray] = {}
    for name in list(weights):
        if name == SELF or (name in optional and name not in weights):
            continue
        try:
            tokens[name] = tokenize(tokenizer, read_texts(name, "calibration"))
        except ConnectionError as error:
            if name not in optional:
                raise
            missing = [part for part in HUB_SOURCES if part in optional and part not in tokens]
            warnings.warn(
                f"calibrating without {', '.join(missing)}: {str(error).splitlines()[0]}", stacklevel=2
            )
            weights = {part: weight for part, weight in weights.items() if part not in missing}
            break

    def tokens_of(name: str, wanted: int) -> np.ndarray:
        if name == SELF:
            return sample_tokens(source, wanted, calibration.seed, dtype)
        return tokens[name]

    return cut_chunks(
        weights,
        tokens_of,
        chunks=calibration.chunks,
        length=calibration.chunk_length,
        context=source.config.max_position_embeddings,
    )
