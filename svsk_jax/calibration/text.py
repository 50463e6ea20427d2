"""Text by name or from a file, and its tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from svsk_jax.calibration.sources import SOURCES, Part
from svsk_jax.json_data import parse_json, shown


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        """Token ids under `input_ids`; not `verbose` about texts past the model's context."""
        ...


def read_texts(source: str, part: Part) -> list[str]:
    """The documents of a source: a name in `sources.SOURCES`, or a file.

    Files: .jsonl (an object with a `text` field per line) and .parquet (a `text` column) give a document
    per row, anything else is one document of UTF-8 text.

    Raises:
        ValueError: no such source or file, or no text in it.
        ConnectionError: a source that needs the hub, without it.
    """
    if source in SOURCES:
        return SOURCES[source](part)
    path = Path(source).expanduser()
    if not path.is_file():
        names = ", ".join(f"'{name}'" for name in SOURCES)
        raise ValueError(
            f"text {source!r}: no such file; give {names} or the path of a .txt, .jsonl or .parquet file"
        )
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                texts = [parse_json(line)["text"] for line in file if line.strip()]
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            texts = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
        else:
            texts = [path.read_text(encoding="utf-8")]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"text {source!r}: expected UTF-8 text, or rows with a 'text' field; got {error!r}"
        ) from error
    wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"text {source!r}: expected text in every row's 'text' field, found {shown(wrong)}")
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"text {source!r}: the file holds no text")
    return texts


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids, int32 [n], of the texts joined by a blank line, without special tokens."""
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, np.int32)
