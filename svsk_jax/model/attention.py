"""Causal self-attention with grouped KV heads, rotary positions and optional per-head query and key norms."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from svsk_jax.model.config import ModelConfig
from svsk_jax.model.linear import Linear
from svsk_jax.model.norm import RMSNorm
from svsk_jax.model.tap import Tap, no_tap

LayerCache = tuple[jax.Array, jax.Array, jax.Array]
"""(keys, values, length) of one layer, as in `KVCache`."""


def rotate(
    x: Float[Array, "b t h d"], positions: Int[Array, "t"], frequencies: Float[Array, "half"]
) -> Float[Array, "b t h d"]:
    """Rotary embedding in the half-split layout: the pair (xᵢ, xᵢ₊d/2) turns by positions · frequencies[i]
    radians; computed in f32.

    Source: Su et al., "RoFormer" (2021), with Hugging Face's pairing.
    """
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """softmax(q kᵀ / √head_dim) v, with q, k rotated; scores and softmax in f32. With `axis`, of the heads
    on this device of that axis of a mesh, which `config` counts."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Any], axis: str | None = None):
        def linear(name: str, axis: str | None = None) -> Linear:
            weight, bias = parameters[f"attention.{name}.weight"], parameters.get(f"attention.{name}.bias")
            return Linear(weight, bias, axis)

        def norm(name: str) -> RMSNorm | None:
            return (
                RMSNorm(parameters[f"attention.{name}.scale"], config.rms_norm_eps)
                if config.qk_norm
                else None
            )

        if "attention.qkv.weight" in parameters:
            self.qkv = linear("qkv")
        else:
            self.qkv = None
            self.q, self.k, self.v = linear("q"), linear("k"), linear("v")
        self.o = linear("o", axis)
        self.q_norm, self.k_norm = norm("q_norm"), norm("k_norm")
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "t"],
        cache: LayerCache | None = None,
        tap: Tap = no_tap,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Attend from `positions` to themselves and, with a cache, to what it holds; returns the output and
        the grown cache."""
        config = self.config
        x = tap("attention.input", x)
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if self.qkv is None:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            q, k, v = jnp.split(self.qkv(x), (queries, queries + keys), axis=-1)
        q = tap("attention.q", q).reshape(*x.shape[:2], config.num_heads, config.head_dim)
        k = tap("attention.k", k).reshape(*x.shape[:2], config.num_kv_heads, config.head_dim)
        v = tap("attention.v", v).reshape(*x.shape[:2], config.num_kv_heads, config.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        frequencies = jnp.asarray(config.inverse_frequencies)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        if cache is None:
            window = None if config.sliding_window is None else (config.sliding_window - 1, 0)
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)
        else:
            keys, values, length = cache
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), length, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), length, axis=1)
            slots = jnp.arange(keys.shape[1], dtype=jnp.int32)
            mask = slots[None, :] <= positions[:, None]
            if config.sliding_window is not None:
                mask &= slots[None, :] > positions[:, None] - config.sliding_window
            mixed = jax.nn.dot_product_attention(
                q, keys.astype(q.dtype), values.astype(q.dtype), mask=mask[None, None]
            )
            cache = (keys, values, length + x.shape[1])
        mixed = mixed.reshape(*x.shape[:2], config.num_heads * config.head_dim)
        mixed = tap("attention.output", mixed)
        return tap("attention.o", self.o(mixed)), cache
