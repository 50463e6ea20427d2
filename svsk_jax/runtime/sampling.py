"""Choosing the next token from logits."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray


class SamplingNumbers(NamedTuple):
    """The numbers of a `SamplingConfig` as scalars that are traced: changing them compiles nothing anew."""

    temperature: np.float32 | jax.Array
    top_k: np.int32 | jax.Array
    top_p: np.float32 | jax.Array
    min_p: np.float32 | jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose tokens. Filters that are off: top_k 0, top_p 1, min_p 0.

    Raises:
        ValueError: a number out of its range; names the flag.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest."""
    seed: int = 0
    """Same seed, same text."""

    def __post_init__(self):
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise ValueError(f"--temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"--top-k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1 (off), got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"--min-p must be at least 0 (off) and below 1, got {self.min_p}")

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> "SamplingConfig":
        """The model's own defaults from its generation_config.json, but for `overrides` that are not None.

        As in transformers, `do_sample` absent or false means temperature 0.

        Raises:
            ValueError: a number out of its range.
        """
        # JSON does not tell 1 from 1.0.
        kinds = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
        fields = {name: kind(config[name]) for name, kind in kinds.items() if config.get(name) is not None}
        fields["temperature"] = fields.get("temperature", 1.0) if config.get("do_sample") else 0.0
        return cls(**fields | {name: value for name, value in overrides.items() if value is not None})

    @property
    def numbers(self) -> SamplingNumbers:
        """What `sample` takes."""
        return SamplingNumbers(
            temperature=np.float32(self.temperature),
            top_k=np.int32(self.top_k),
            top_p=np.float32(self.top_p),
            min_p=np.float32(self.min_p),
        )


def sample(logits: Float[Array, "b v"], key: PRNGKeyArray, numbers: SamplingNumbers) -> Int[Array, "b"]:
    """Draw one token id (int32) per row, in f32; the filters apply one after the other, as in transformers.

    z = logits / temperature (0: the argmax, no draw); keep z not below the k-th largest (ties stay); of what
    is left, renormalized, keep the tokens before which the likelier ones sum to less than top_p; of what is
    left, keep p ≥ min_p · max p; draw from the softmax of the rest. The likeliest token always stays.
    """
    return jax.lax.cond(
        numbers.temperature == 0,
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        lambda: draw(logits, key, numbers),
    )


def draw(logits: Float[Array, "b v"], key: PRNGKeyArray, numbers: SamplingNumbers) -> Int[Array, "b"]:
    """`sample` at a temperature above 0."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    # Relative to the likeliest, or a small temperature would overflow to infinities whose difference is nan.
    z = jnp.take_along_axis(logits, order, axis=-1).astype(jnp.float32)
    z = (z - z[:, :1]) / numbers.temperature
    rank = jnp.arange(z.shape[-1], dtype=jnp.int32)

    k = jnp.where(numbers.top_k == 0, z.shape[-1], jnp.minimum(numbers.top_k, z.shape[-1]))
    smallest = jax.lax.dynamic_index_in_dim(z, k - 1, axis=-1)
    z = jnp.where(z < smallest, -jnp.inf, z)

    p = jax.nn.softmax(z, axis=-1)
    likelier = jnp.cumsum(p, axis=-1) - p
    z = jnp.where((likelier < numbers.top_p) | (numbers.top_p >= 1) | (rank == 0), z, -jnp.inf)

    # p ≥ min_p · max p in logarithms, where z is relative to the likeliest.
    z = jnp.where((z >= jnp.log(numbers.min_p)) | (rank == 0), z, -jnp.inf)

    drawn = jax.random.categorical(key, z, axis=-1)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
