"""Run a model, beside its reference or alone, over windows of text and report how well it predicts."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from transformers import PreTrainedTokenizerBase

from svsk_jax.evaluation.divergence import (
    DivergenceReport,
    PerplexityReport,
    TokenDivergence,
    token_divergence,
    token_nll,
)
from svsk_jax.evaluation.windows import (
    CONVENTIONS,
    Convention,
    Windows,
    bos_added_by,
    cut_windows,
    encode_texts,
)
from svsk_jax.model import Decoder

Progress = Callable[[int, int], None]
"""Called after every batch with the windows done and their total."""

TOKENS_PER_BATCH = 4096
MAX_CHUNK = 256
LOGITS_PER_CHUNK = 2**25
"""Logits of one model alive at a time: 128 MiB in f32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A report on `used` of the `available` tokens of `text`, in windows of `window` tokens."""

    text: str
    convention: Convention
    window: int
    used: int
    available: int
    report: DivergenceReport | PerplexityReport

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def evaluate(
    model: Decoder,
    windows: Windows,
    *,
    reference: Decoder | None = None,
    text: str = "text",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Divergence of `model` from `reference`, side by side in one pass; without a reference, perplexity only.

    Logits exist only for a few hundred positions at a time. The last batch is filled up with rows that are
    not scored, so that each window length compiles once.

    Args:
        model: the model to judge.
        windows: from `cut_windows`.
        reference: the model to compare with, of the same vocabulary.
        text: what the windows are of, for the report.
        batch_size: windows per batch; default: 4096 tokens' worth.
        progress: called with (windows done, windows in all).

    Raises:
        ValueError: `batch_size` below 1, vocabularies of different sizes, or ids outside them.
    """
    total, length = windows.tokens.shape
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    vocabulary = model.config.vocab_size
    if reference is not None and reference.config.vocab_size != vocabulary:
        raise ValueError(
            f"the reference has a vocabulary of {reference.config.vocab_size}, the model of {vocabulary}; "
            "a divergence needs the same tokens on both sides"
        )
    if int(windows.tokens.max()) >= vocabulary:
        raise ValueError(
            f"the text has token id {int(windows.tokens.max())}, the model's vocabulary is {vocabulary}; "
            "use the tokenizer that belongs to the model"
        )
    batch = min(batch_size or max(1, TOKENS_PER_BATCH // length), total)
    chunk = chunk_rows(vocabulary)
    results = []
    for start in range(0, total, batch):
        rows = windows.tokens[start : start + batch]
        filled = jnp.asarray(np.pad(rows, ((0, batch - len(rows)), (0, 0))))
        if reference is None:
            scores = (window_nll(model, filled, first=windows.first, chunk=chunk),)
        else:
            scores = window_divergence(reference, model, filled, first=windows.first, chunk=chunk)
        results.append([np.asarray(score)[: len(rows)] for score in scores])
        if progress is not None:
            progress(start + len(rows), total)
    fields = [np.concatenate(parts) for parts in zip(*results, strict=True)]
    report = (
        PerplexityReport.from_tokens(fields[0])
        if reference is None
        else DivergenceReport.from_tokens(*fields)
    )
    return Evaluation(
        text=text,
        convention=windows.convention,
        window=length,
        used=windows.used,
        available=windows.available,
        report=report,
    )


def evaluate_texts(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    reference: Decoder | None = None,
    text: str = "text",
    conventions: Sequence[Convention] = CONVENTIONS,
    window: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """`evaluate` by each convention, on at most `max_tokens` tokens each. Raises as `cut_windows` does."""
    ids, bos_id = encode_texts(tokenizer, texts), bos_added_by(tokenizer)
    context = model.config.max_position_embeddings
    # All windows are cut first: an impossible one is told before minutes of work on another.
    cuts = [
        cut_windows(ids, convention, context=context, window=window, bos_id=bos_id, max_tokens=max_tokens)
        for convention in conventions
    ]
    return [
        evaluate(model, cut, reference=reference, text=text, batch_size=batch_size, progress=progress)
        for cut in cuts
    ]


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits are alive at a time: at most 256, fewer for vocabularies above 131,072."""
    return max(1, min(MAX_CHUNK, LOGITS_PER_CHUNK // vocabulary))


@partial(jax.jit, static_argnames=("first", "chunk"))
def window_divergence(
    reference: Decoder, model: Decoder, tokens: Int[Array, "b t"], *, first: int, chunk: int
) -> TokenDivergence:
    """`token_divergence` of the predictions at positions first … t - 2, each field [b, t - 1 - first].

    The heads run on `chunk` positions at a time.
    """

    def compare(rows: tuple[jax.Array, jax.Array, jax.Array]) -> TokenDivergence:
        x_reference, x_model, targets = rows
        return token_divergence(reference.logits(x_reference), model.logits(x_model), targets)

    x = (reference.hidden_states(tokens)[:, first:-1], model.hidden_states(tokens)[:, first:-1])
    return _map_rows(compare, (*x, tokens[:, first + 1 :]), chunk)


@partial(jax.jit, static_argnames=("first", "chunk"))
def window_nll(model: Decoder, tokens: Int[Array, "b t"], *, first: int, chunk: int) -> jax.Array:
    """`token_nll` of the predictions at positions first … t - 2, f32 [b, t - 1 - first].

    The head runs on `chunk` positions at a time.
    """

    def score(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        return token_nll(model.logits(rows[0]), rows[1])

    return _map_rows(score, (model.hidden_states(tokens)[:, first:-1], tokens[:, first + 1 :]), chunk)


def _map_rows(function: Callable[[Any], Any], arrays: Any, chunk: int) -> Any:
    """Apply `function` to arrays [b, s, …], flattened to rows, `chunk` rows at a time; results [b, s]."""
    shape = arrays[0].shape[:2]
    rows = shape[0] * shape[1]
    chunks = -(-rows // chunk)

    def split(array: jax.Array) -> jax.Array:
        flat = array.reshape(rows, *array.shape[2:])
        padding = [(0, chunks * chunk - rows)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(chunks, chunk, *flat.shape[1:])

    results = jax.lax.map(function, jax.tree.map(split, arrays))
    return jax.tree.map(lambda result: result.reshape(-1)[:rows].reshape(shape), results)
