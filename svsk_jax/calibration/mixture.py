"""A calibration set: chunks of tokens from several texts, in given shares."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

MIN_CHUNKS = 8
FEW_CHUNKS = 64
DEFAULT_LENGTH = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Equal pieces of tokenized text, sources interleaved so that any run of chunks is mixed like the whole.

    Invariants: `ids` is int32 [chunks, length]; `counts` gives the chunks of each source and sums to
    `chunks`.
    """

    ids: np.ndarray
    counts: Mapping[str, int]


def check_chunks(chunks: Chunks) -> None:
    """ValueError unless the ids are whole numbers [chunks, length], at least one, as `counts` says."""
    ids = chunks.ids
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"chunks: expected integers [chunks, length], at least one, got {ids.dtype} {ids.shape}"
        )
    if sum(chunks.counts.values()) != len(ids):
        raise ValueError(f"chunks: their counts give {sum(chunks.counts.values())}, there are {len(ids)}")


def parse_mixture(texts: Sequence[str]) -> dict[str, float]:
    """Weight of each source in a list of `source` or `source=weight` (1 when not given).

    Raises:
        ValueError: an empty list, a source named twice, or a weight that is no positive number.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, separator, number = text.rpartition("=")
        if not separator:
            name, number = text, "1"
        try:
            weight = float(number)
        except ValueError:
            # A path may hold an equals sign.
            name, weight = text, 1.0
        if not 0 < weight < np.inf:
            raise ValueError(f"--calib {text}: expected a positive weight after '=', got {number}")
        if name in weights:
            raise ValueError(f"--calib: {name} is named twice; give it once, with a weight: {name}=2")
        weights[name] = weight
    if not weights:
        raise ValueError("--calib: expected at least one text")
    return weights


def cut_chunks(
    weights: Mapping[str, float],
    tokens_of: Callable[[str, int], np.ndarray],
    *,
    chunks: int,
    length: int | None,
    context: int,
) -> Chunks:
    """Cut `chunks` pieces from several texts, each text's share by its weight and spread evenly over it.

    Args:
        weights: share of each source, in any unit.
        tokens_of: called with a source and the number of tokens wanted; its token ids, int32 [n], may be
            more or fewer. Pieces of a text that is too short for its share are fewer, never repeated.
        chunks: pieces wanted in all; a warning when there are under 64.
        length: tokens in a piece; None for 512, or the context if that is shorter.
        context: longest piece that the model takes.

    Raises:
        ValueError: the texts do not hold 8 pieces, or `length` exceeds the context; says what would do.
    """
    if length is not None and not 1 < length <= context:
        raise ValueError(f"--chunk-length: expected 2 to {context} (the model's context), got {length}")
    if chunks < 1:
        raise ValueError(f"--chunks: expected at least 1, got {chunks}")
    length = min(DEFAULT_LENGTH, context) if length is None else length
    pieces: list[np.ndarray] = []
    places: list[float] = []
    counts: dict[str, int] = {}
    available = 0
    for name, share in _shares(weights, chunks).items():
        ids = tokens_of(name, share * length)
        available += len(ids)
        count = counts[name] = min(share, len(ids) // length)
        starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
        pieces += [ids[start : start + length] for start in starts]
        places += [(index + 0.5) / count for index in range(count)]
    if len(pieces) < min(chunks, MIN_CHUNKS):
        needed = min(chunks, MIN_CHUNKS)
        raise ValueError(
            f"the text holds {available} tokens, but calibration needs at least {needed} chunks of {length} "
            f"({needed * length} tokens): give a longer text, another --calib, or a smaller --chunk-length"
        )
    if len(pieces) < FEW_CHUNKS:
        warnings.warn(
            f"calibrating on only {len(pieces)} chunks of {length} tokens; {FEW_CHUNKS} or more give "
            "steadier results",
            stacklevel=2,
        )
    order = np.argsort(places, kind="stable")
    return Chunks(ids=np.stack([pieces[index] for index in order]), counts=counts)


def _shares(weights: Mapping[str, float], chunks: int) -> dict[str, int]:
    """Whole numbers that sum to `chunks` in proportion to the weights (largest remainder)."""
    exact = {name: chunks * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: chunks - sum(shares.values())]:
        shares[name] += 1
    return {name: share for name, share in shares.items() if share}
