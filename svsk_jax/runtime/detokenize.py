"""Token ids to text piece by piece, never half a character."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 6
"""Tokens of the prompt to decode with the first new ones: SentencePiece drops the leading space of a text."""
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Takes ids one by one and returns the text each completes; the pieces join to the text of all ids.

    A piece is the difference between the decoded recent ids with and without the new ones, held back while it
    ends in U+FFFD, the mark of an unfinished UTF-8 sequence. Method of transformers' TextStreamer and of
    Hugging Face's text-generation-inference.
    Special tokens are not shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._shown = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text completed by one more id; may be empty."""
        self._ids.append(token_id)
        piece = self._pending()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        # The ids just shown are the context of the next ones; older ones are no longer needed.
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return piece

    def flush(self) -> str:
        """What is held back when no more ids come, less a character that was left unfinished."""
        piece = self._pending()
        self._shown = len(self._ids)
        return piece.rstrip(REPLACEMENT)

    def _pending(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)
