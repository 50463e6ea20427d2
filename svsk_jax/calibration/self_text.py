"""Text that the model writes itself: what it knows, where no calibration text is at hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from convert.load import load_decoder
from svsk_jax.model import Decoder, KVCache
from svsk_jax.model.source import ModelSource

SAMPLE_LENGTH = 256
MAX_BATCH = 128


def sample_tokens(source: ModelSource, wanted: int, seed: int, dtype: DTypeLike) -> np.ndarray:
    """At least `wanted` tokens that the model samples at temperature 1, int32 [n].

    Texts of 256 tokens (the context, if that is shorter) start from the tokenizer's beginning-of-text
    token, or its end-of-text token where it has none, which is not among the tokens returned. Batched; the
    same seed gives the same text. The whole unquantized model is in memory meanwhile.

    Source: Liu et al., "LLM-QAT" (2023), for calibrating on a model's own text.
    """
    length = min(SAMPLE_LENGTH, source.config.max_position_embeddings - 1)
    texts = -(-wanted // length)
    batch = min(texts, MAX_BATCH)
    tokenizer = source.tokenizer()
    first: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError(
            f"--calib self: the tokenizer of {source.description} names neither a beginning-of-text nor an "
            "end-of-text token to start from; give another text"
        )
    model = load_decoder(source, dtype)
    keys = jax.random.split(jax.random.key(seed), -(-texts // batch))
    starts = jnp.asarray(np.full(batch, int(first), np.int32))
    parts = [np.asarray(_sample(model, starts, key, length)) for key in keys]
    return np.concatenate(parts).reshape(-1)


def _draw(logits: Float[Array, "b v"], key: jax.Array) -> Int[Array, "b"]:
    """A token of each row from softmax(logits), by inverting the cumulative distribution: one random number
    a row, where Gumbel noise would take one for every entry of the vocabulary."""
    reached = jnp.cumsum(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), axis=-1)
    drawn = jax.random.uniform(key, (len(logits), 1)) * reached[:, -1:]
    return jnp.sum(reached <= drawn, axis=-1, dtype=jnp.int32).clip(0, logits.shape[1] - 1)


@partial(jax.jit, static_argnames="length")
def _sample(model: Decoder, starts: jax.Array, key: jax.Array, length: int) -> jax.Array:
    """int32 [batch, length]: `length` tokens after each start."""

    def step(state, key):
        tokens, keys, values, filled = state
        cache = KVCache(keys=keys, values=values, length=filled)
        logits, cache = model.extend(tokens[:, None], cache)
        tokens = _draw(logits, key)
        return (tokens, cache.keys, cache.values, cache.length), tokens

    cache = KVCache.empty(model.config, len(starts), length, model.dtype)
    start = (starts, cache.keys, cache.values, cache.length)
    _, tokens = jax.lax.scan(step, start, jax.random.split(key, length))
    return tokens.T
