"""Keys and values of past positions, as a pytree that a step takes and returns."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from svsk_jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Room for `capacity` positions of every layer.

    Invariants: `keys` and `values` hold one array [B, capacity, KV heads, head_dim] per layer; positions
    below `length` (int32 scalar)
    are filled.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.keys[0].shape[1]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> "KVCache":
        """A cache with nothing in it."""
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def arrays() -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(keys=arrays(), values=arrays(), length=jnp.zeros((), jnp.int32))
