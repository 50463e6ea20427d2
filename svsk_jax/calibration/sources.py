"""Named texts: what ships with Python, and public data sets through `datasets`."""

import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

Part = Literal["calibration", "evaluation"]
HUB_DOCUMENTS = 2000
"""Documents taken of a streamed data set."""


def _halve(texts: Iterable[str], part: Part) -> list[str]:
    """One of two halves: in the order given, each text joins the half that holds fewer characters so far.

    A text that stands there several times counts once, so that the halves share none.
    """
    halves: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    sizes: dict[Part, int] = {"calibration": 0, "evaluation": 0}
    for text in dict.fromkeys(texts):
        smaller: Part = "calibration" if sizes["calibration"] <= sizes["evaluation"] else "evaluation"
        halves[smaller].append(text)
        sizes[smaller] += len(text)
    return halves[part]


def documentation(part: Part) -> list[str]:
    """English documentation: Python's own `pydoc_data.topics`, some 110 k tokens, halved by topic in
    alphabetical order."""
    from pydoc_data.topics import topics

    return _halve((topics[name] for name in sorted(topics)), part)


def code(part: Part) -> list[str]:
    """Python source: the standard library's single-file public modules, about a million tokens, halved by
    module in alphabetical order."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
    return _halve((path.read_text(encoding="utf-8", errors="replace") for path in modules), part)


def builtin(part: Part) -> list[str]:
    """`documentation` and `code`, cut to the same number of characters."""
    texts = [documentation(part), code(part)]
    shortest = min(sum(map(len, group)) for group in texts)
    return [text for group in texts for text in _first_characters(group, shortest)]


def _first_characters(texts: list[str], limit: int) -> list[str]:
    taken, left = [], limit
    for text in texts:
        if left <= 0:
            break
        taken.append(text[:left])
        left -= len(text)
    return taken


def _load(name: str, dataset: str, config: str | None, split: str, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    except (OSError, ConnectionError, DatasetNotFoundError) as error:
        raise ConnectionError(
            f"text {name!r}: {error}. Without the hub, use 'builtin', 'documentation', 'code' or the path of "
            "a .txt, .jsonl or .parquet file"
        ) from error


def wikitext(part: Part) -> list[str]:
    """Encyclopedia: WikiText-2 (raw), its train split for calibration and its test split for evaluation.

    Raises:
        ConnectionError: neither the hub nor a cached copy could be read; likewise for the other hub sets.
    """
    split = "train" if part == "calibration" else "test"
    rows = _load("wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1", split, streaming=False)
    return ["".join(rows["text"])]


def github(part: Part) -> list[str]:
    """Python files of public repositories (`codeparrot-clean-valid`), alternately for either part."""
    rows = _load("github", "codeparrot/codeparrot-clean-valid", None, "train", streaming=True)
    first = 0 if part == "calibration" else 1
    return [row["content"] for row in rows.take(HUB_DOCUMENTS)][first::2]


def chat(part: Part) -> list[str]:
    """Conversations (UltraChat 200k), turns joined by a blank line; its train_sft and test_sft splits."""
    split = "train_sft" if part == "calibration" else "test_sft"
    rows = _load("chat", "HuggingFaceH4/ultrachat_200k", None, split, streaming=True)
    return [
        "\n\n".join(message["content"] for message in row["messages"]) for row in rows.take(HUB_DOCUMENTS)
    ]


SOURCES: dict[str, Callable[[Part], list[str]]] = {
    "builtin": builtin,
    "documentation": documentation,
    "code": code,
    "wikitext": wikitext,
    "github": github,
    "chat": chat,
}
"""Texts by name. `documentation` and `code` are on every machine; `builtin` is both."""

HUB_SOURCES = ("wikitext", "github", "chat")
"""Those that need the hub, or a cached copy."""
