"""The steps of generating, as functions to compile: a prompt at once, then tokens one after another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from pallas_kernels.decode_step import LOST, Boxes
from pallas_kernels.svsk_matmul.layout import ceil_div
from svsk_jax.model import Decoder, KVCache
from svsk_jax.model.fused_step import exchanges, fused_step
from svsk_jax.runtime.sampling import SamplingNumbers, draw, sample

SMALLEST_BUCKET = 16
BURST = 8
"""Tokens that the fused step makes before the host sees them."""
SLOTS = 64
"""The cache of the fused step holds a multiple of so many positions."""


class State(NamedTuple):
    """What one step leaves to the next, for b texts."""

    keys: tuple[Any, ...]
    """Of each layer, [b, capacity, KV heads, head_dim]."""
    values: tuple[Any, ...]
    lengths: Any
    """int32, filled positions: [b] for the fused step, else one for all."""
    tokens: Any
    """int32 [b], the last tokens, whose keys and values are still to come."""


def rehearsed(run: Callable[[State], State], state: State) -> State:
    """A state as it was, in the place of the one given, after a run whose devices did not wait for one
    another: nothing reads the positions behind a text, where it leaves what means nothing."""
    lengths, tokens = jnp.copy(state.lengths), jnp.copy(state.tokens)
    return jax.block_until_ready(run(state))._replace(lengths=lengths, tokens=tokens)


def prefill_bucket(length: int, capacity: int) -> int:
    """The padded length of a prompt: a power of two from 16 up, at most the capacity; few shapes compile."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), capacity)


def slots_for(capacity: int) -> int:
    """Positions of the fused step's cache for texts of so many: a burst may run past the last token."""
    return SLOTS * ceil_div(capacity + BURST, SLOTS)


def prefill(
    structure: Any,
    slots: int,
    leaves: list[jax.Array],
    tokens: Int[Array, "1 t"],
    length: Int[Array, ""],
    key: PRNGKeyArray,
    numbers: SamplingNumbers,
) -> tuple[Int[Array, "1 1"], State]:
    """The first token after a prompt, and the state behind it, with room for `slots` positions.

    Args:
        structure: of the model, a `Decoder`.
        slots: of the cache.
        leaves: of the model.
        tokens: the prompt, padded.
        length: of the prompt without padding.
        key, numbers: for sampling.
    """
    model: Decoder = jax.tree.unflatten(structure, leaves)
    logits, cache = model.extend(tokens, KVCache.empty(model.config, 1, slots, model.dtype), length - 1)
    # Padding lies beyond the length: no position attends to it before a later token overwrites it.
    token = sample(logits, jax.random.fold_in(key, length), numbers)
    return token[None], State(cache.keys, cache.values, length, token)


def step(
    structure: Any, leaves: list[jax.Array], state: State, key: PRNGKeyArray, numbers: SamplingNumbers
) -> tuple[Int[Array, "1 b"], State]:
    """One more token of each text by the decoder as it is. Donate the state."""
    model: Decoder = jax.tree.unflatten(structure, leaves)
    cache = KVCache(keys=state.keys, values=state.values, length=state.lengths)
    logits, grown = model.extend(state.tokens[:, None], cache)
    token = sample(logits, jax.random.fold_in(key, grown.length), numbers)
    return token[None], State(grown.keys, grown.values, grown.length, token)


def fused_steps(
    structure: Any,
    leaves: list[jax.Array],
    state: State,
    key: PRNGKeyArray,
    numbers: SamplingNumbers,
    boxes: Boxes | None = None,
    *,
    greedy: bool,
    interpret: bool = False,
) -> tuple[Int[Array, "burst b"], State]:
    """`BURST` more tokens of each text by the step of few kernels, without the host. Donate the state.

    Each text is drawn as it would be alone. `boxes` are for `BURST` times the `exchanges` of a step; a sum
    that was lost makes logits NaN, and the token `LOST`, as are those after it. `greedy` takes the likeliest
    tokens; it is not traced, since a branch on the device would make the host wait.
    """
    model: Decoder = jax.tree.unflatten(structure, leaves)

    def one(state: State, index: jax.Array) -> tuple[State, jax.Array]:
        keys, values, lengths, tokens = state
        mine = None
        if boxes is not None:
            mine = boxes.after(boxes.turn + index * exchanges(model, tokens.shape[0], greedy=greedy))
        found, keys, values = fused_step(
            model, tokens, keys, values, lengths, greedy=greedy, boxes=mine, interpret=interpret
        )
        lengths = lengths + 1
        if greedy:
            return State(keys, values, lengths, found), found
        each = jax.vmap(jax.random.fold_in, (None, 0))(key, lengths)
        tokens = jax.vmap(lambda row, key: draw(row[None], key, numbers)[0])(found, each)
        if mine is not None:
            tokens = jnp.where(jnp.isnan(found).any(axis=1), LOST, tokens)
        return State(keys, values, lengths, tokens), tokens

    state, tokens = jax.lax.scan(one, state, jnp.arange(BURST))
    return tokens, state
