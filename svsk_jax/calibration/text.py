"""Text for calibration and evaluation: named sources, files, and their cutting into chunks of tokens."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Part = Literal["calibration", "evaluation"]
MIN_CHUNKS = 8
FEW_CHUNKS = 64
MIN_AUTO_LENGTH = 256
MAX_LENGTH = 2048


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        """Token ids under `input_ids`; not `verbose` about texts past the model's context."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Equal pieces of a tokenized text.

    Invariant: `ids` is int32 [chunks, length].
    """

    ids: np.ndarray
    text_tokens: int
    """Tokens that the text holds in all."""


def builtin_texts(part: Part) -> list[str]:
    """English documentation from Python's own `pydoc_data.topics`, some 110 k tokens, split by topic.

    In alphabetical order each topic joins the part that holds fewer characters so far. A text that stands
    under several names counts once, so that the parts share none.
    """
    from pydoc_data.topics import topics

    parts: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    sizes: dict[Part, int] = {"calibration": 0, "evaluation": 0}
    for text in dict.fromkeys(topics[name] for name in sorted(topics)):
        smaller: Part = "calibration" if sizes["calibration"] <= sizes["evaluation"] else "evaluation"
        parts[smaller].append(text)
        sizes[smaller] += len(text)
    return parts[part]


def wikitext_texts(part: Part) -> list[str]:
    """WikiText-2 (raw) through `datasets`: the train split for calibration, test for evaluation.

    Raises:
        ConnectionError: neither the hub nor a cached copy could be read.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    split = "train" if part == "calibration" else "test"
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    except (OSError, ConnectionError, DatasetNotFoundError) as error:
        raise ConnectionError(
            f"wikitext: {error}. Without the hub, use 'builtin' or the path of a .txt, .jsonl or "
            ".parquet file"
        ) from error
    return ["".join(rows["text"])]


def read_texts(source: str, part: Part) -> list[str]:
    """The documents of a source: `builtin`, `wikitext`, or a file.

    Files: .jsonl (an object with a `text` field per line) and .parquet (a `text` column) give a document
    per row, anything else
    is one document of UTF-8 text.

    Raises:
        ValueError: no such source or file, or no text in it.
    """
    if source == "builtin":
        return builtin_texts(part)
    if source == "wikitext":
        return wikitext_texts(part)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(
            f"text {source!r}: no such file; give 'builtin', 'wikitext' or the path of a .txt, .jsonl or "
            ".parquet file"
        )
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                texts = [json.loads(line)["text"] for line in file if line.strip()]
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            texts = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
        else:
            texts = [path.read_text(encoding="utf-8")]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"text {source!r}: expected UTF-8 text, or rows with a 'text' field; got {error!r}"
        ) from error
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"text {source!r}: the file holds no text")
    return texts


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids, int32 [n], of the texts joined by a blank line, without special tokens."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, np.int32)


def cut_chunks(ids: np.ndarray, chunks: int, length: int | None, context: int) -> Chunks:
    """Cut `ids` into at most `chunks` pieces, spread evenly over the text.

    Args:
        ids: token ids, int32 [n].
        chunks: pieces wanted. Fewer when the text is short; a warning under 64.
        length: tokens in a piece; None takes as many as `chunks` pieces leave for each, in multiples of 64,
            from 256 to 2048.
        context: longest piece that the model takes.

    Raises:
        ValueError: the text does not hold 8 pieces, or `length` exceeds the context; says what would do.
    """
    if length is not None and not 1 < length <= context:
        raise ValueError(f"--chunk-length: expected 2 to {context} (the model's context), got {length}")
    if chunks < 1:
        raise ValueError(f"--chunks: expected at least 1, got {chunks}")
    if length is None:
        longest = min(MAX_LENGTH, context)
        length = min(max(MIN_AUTO_LENGTH, len(ids) // chunks // 64 * 64), longest)
    count = min(chunks, len(ids) // length)
    if count < min(chunks, MIN_CHUNKS):
        raise ValueError(
            f"the text holds {len(ids)} tokens, but calibration needs at least {min(chunks, MIN_CHUNKS)} "
            f"chunks of {length} "
            f"({min(chunks, MIN_CHUNKS) * length} tokens): give a longer text, another --calib, or a "
            "smaller --chunk-length"
        )
    if count < FEW_CHUNKS:
        warnings.warn(
            f"calibrating on only {count} chunks of {length} tokens; {FEW_CHUNKS} or more give steadier "
            "results",
            stacklevel=2,
        )
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return Chunks(ids=np.stack([ids[start : start + length] for start in starts]), text_tokens=len(ids))
