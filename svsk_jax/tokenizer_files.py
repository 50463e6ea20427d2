"""Tokenizer files of a folder, loaded without trust."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, with chat template. Code that the folder brings is never run.

    Raises:
        ValueError: there is none, or its files are damaged.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(
            f"{folder}: no tokenizer; looked for {', '.join(FILES)}; copy the model's tokenizer files there"
        )
    try:
        # Unless it is told not to, transformers asks on the terminal whether to run the folder's code.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        # Some damage shows only in use.
        tokenizer.decode(tokenizer("A line of text.\n")["input_ids"])
    except Exception as error:  # transformers and tokenizers raise many kinds on damaged files
        raise ValueError(
            f"{folder}: the tokenizer cannot be loaded ({error}); download its files again"
        ) from error
    return tokenizer
