"""The two common ways to cut text into scored windows, by name; perplexities do not compare across them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

Convention = Literal["gptq", "llama.cpp"]
CONVENTIONS: tuple[Convention, ...] = ("gptq", "llama.cpp")
WINDOW_LENGTHS: dict[Convention, int] = {"gptq": 2048, "llama.cpp": 512}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of token ids to score, `tokens` int32 [n, length].

    The model reads a whole window; its predictions at positions `first` … length - 2 are scored. `available`
    counts the text's tokens, of which n · length are used.
    """

    convention: Convention
    tokens: Int[np.ndarray, "n length"]
    first: int
    available: int

    @property
    def length(self) -> int:
        """Tokens of one window."""
        return self.tokens.shape[1]

    @property
    def used(self) -> int:
        """Tokens in all windows."""
        return self.tokens.size

    @property
    def scored(self) -> int:
        """Predictions scored in all windows."""
        return self.tokens.shape[0] * (self.length - 1 - self.first)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Int[np.ndarray, "n"]:
    """Ids, int32, of the texts joined by a blank line and tokenized once, special tokens included."""
    # verbose=False: the text is meant to be longer than the context, which the tokenizer would warn of.
    return np.asarray(tokenizer("\n\n".join(texts), verbose=False)["input_ids"], np.int32)


def bos_added_by(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The start token if the tokenizer puts it before every text, else None."""
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and encode_texts(tokenizer, ["a"])[0] == bos else None


def cut_windows(
    ids: Int[np.ndarray, "n"],
    convention: Convention,
    *,
    context: int,
    window: int | None = None,
    bos_id: int | None = None,
    max_tokens: int | None = None,
) -> Windows:
    """Non-overlapping windows from the start of `ids`; the tail is dropped.

    - `gptq`: windows of 2048; every position but the first is scored (`first` = 0). Source: the code of
      Frantar et al., "GPTQ" (2022).
    - `llama.cpp`: windows of 512; the second half is scored (the predictions at positions length // 2 …
      length - 2), and `bos_id`, for tokenizers that add one, replaces each window's first token. Source:
      llama.cpp's perplexity tool with n_ctx 512.

    Args:
        ids: the tokenized text.
        convention: which of the two.
        context: the model's context; longer windows are cut down to it.
        window: another length than the convention's.
        bos_id: the start token, if the tokenizer adds one.
        max_tokens: use at most so many tokens, rounded down to whole windows.

    Raises:
        ValueError: unknown convention, a window of fewer than 4 tokens, or too little text or too small a
            limit for one window.
    """
    if convention not in WINDOW_LENGTHS:
        raise ValueError(f"unknown convention {convention!r}; known are {', '.join(CONVENTIONS)}")
    length = min(window or WINDOW_LENGTHS[convention], context)
    if length < 4:
        raise ValueError(f"windows need at least 4 tokens, got {length} (window {window}, context {context})")
    if ids.size < length:
        raise ValueError(
            f"the {convention} convention needs {length} tokens for one window, found {ids.size}: "
            "evaluate longer text, or a smaller window"
        )
    count = ids.size // length
    if max_tokens is not None:
        if max_tokens < length:
            raise ValueError(
                f"max_tokens {max_tokens} is less than one {convention} window of {length}: "
                "raise the limit, or evaluate a smaller window"
            )
        count = min(count, max_tokens // length)
    tokens = ids[: count * length].reshape(count, length).astype(np.int32)
    if convention == "gptq":
        return Windows(convention=convention, tokens=tokens, first=0, available=ids.size)
    if bos_id is not None:
        tokens[:, 0] = bos_id
    return Windows(convention=convention, tokens=tokens, first=length // 2, available=ids.size)
