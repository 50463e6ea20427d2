"""The decoder: token embedding, layers, final norm and head, over parameters that are dense or packed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from svsk_jax.model.attention import Attention, LayerCache
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.experts import Experts
from svsk_jax.model.kv_cache import KVCache
from svsk_jax.model.linear import Embedding, Linear, join_over, project
from svsk_jax.model.norm import RMSNorm
from svsk_jax.model.parameters import layer_parameters
from svsk_jax.model.tap import Tap, no_tap


class MLP(nnx.Module):
    """y = W_down (silu(W_gate x) ⊙ W_up x). With `axis`, the hidden units are divided over the devices along
    that axis of a mesh."""

    def __init__(self, parameters: Mapping[str, Any], axis: str | None = None):
        def linear(name: str, axis: str | None = None) -> Linear:
            return Linear(parameters[f"mlp.{name}.weight"], parameters.get(f"mlp.{name}.bias"), axis)

        if "mlp.gate_up.weight" in parameters:
            self.gate_up = linear("gate_up")
        else:
            self.gate_up = None
            self.gate, self.up = linear("gate"), linear("up")
        self.down = linear("down", axis)

    def __call__(self, x: Float[Array, "b t d"], tap: Tap = no_tap) -> Float[Array, "b t d"]:
        """Apply to the last axis."""
        x = tap("mlp.input", x)
        if self.gate_up is None:
            gate, up = self.gate(x), self.up(x)
        else:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        hidden = jax.nn.silu(tap("mlp.gate", gate)) * tap("mlp.up", up)
        return tap("mlp.down", self.down(tap("mlp.hidden", hidden)))


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `parameters` are named by path within the layer."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Any], axis: str | None = None):
        self.input_norm = RMSNorm(parameters["input_norm.scale"], config.rms_norm_eps)
        self.attention = Attention(config, parameters, axis)
        self.mlp_norm = RMSNorm(parameters["mlp_norm.scale"], config.rms_norm_eps)
        if "mlp.router.weight" in parameters:
            self.mlp = Experts(config, parameters)
        else:
            self.mlp = MLP(parameters, axis)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "t"],
        cache: LayerCache | None = None,
        tap: Tap = no_tap,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """One layer of the residual stream; with a cache, also the cache grown by these positions."""
        mixed, cache = self.attention(self.input_norm(x), positions, cache, tap)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x), tap), cache


class Tail(nnx.Module):
    """What a decoder has behind its last layer; `parameters` as of `Decoder`, the embedding only where it is
    the head."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Any]):
        self.final_norm = RMSNorm(parameters["final_norm.scale"], config.rms_norm_eps)
        self.head = Linear(parameters["embedding.weight" if config.tie_word_embeddings else "head.weight"])

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Final norm and head, f32."""
        return self.head(self.final_norm(x)).astype(jnp.float32)


class Decoder(nnx.Module):
    """A causal language model. `parameters` are named by full path (`parameters.parameter_shapes`);
    matrices may be packed.

    A module is a pytree: `jax.jit(lambda model, tokens: model(tokens))` is how to run it. Activations have
    `dtype`. With `axis`, the parameters are one device's share of those along that axis of a mesh
    (`parallel.decoder`), and the module runs under `jax.shard_map`.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Mapping[str, Any],
        dtype: DTypeLike = jnp.float32,
        *,
        axis: str | None = None,
    ):
        self.embedding = Embedding(parameters["embedding.weight"], axis)
        self.layers = nnx.List(
            [
                DecoderLayer(config, layer_parameters(parameters, index), axis)
                for index in range(config.num_layers)
            ]
        )
        self.final_norm = RMSNorm(parameters["final_norm.scale"], config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(parameters["head.weight"])
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.axis = axis

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits, f32, of the token after each position."""
        return self.logits(self.hidden_states(tokens))

    def hidden_states(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The residual stream after the last layer, before final norm and head."""
        x = self.embedding(tokens, self.dtype)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        for layer in self.layers:
            x, _ = layer(x, positions)
        return x

    def extend(
        self, tokens: Int[Array, "b t"], cache: KVCache, last: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "b v"], KVCache]:
        """Append tokens after the cache's positions; f32 logits after index `last` (default the final one)
        and the grown cache.

        The caller keeps `cache.length + t <= cache.capacity`.
        """
        x = self.embedding(tokens, self.dtype)
        positions = cache.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        keys, values = [], []
        for layer, layer_keys, layer_values in zip(self.layers, cache.keys, cache.values, strict=True):
            x, layer_cache = layer(x, positions, (layer_keys, layer_values, cache.length))
            assert layer_cache is not None
            keys.append(layer_cache[0])
            values.append(layer_cache[1])
        cache = KVCache(keys=tuple(keys), values=tuple(values), length=cache.length + tokens.shape[1])
        final = jnp.asarray(tokens.shape[1] - 1, jnp.int32) if last is None else last
        return self.logits(jax.lax.dynamic_index_in_dim(x, final, axis=1, keepdims=False)), cache

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Final norm and head, f32."""
        x = self.final_norm(x)
        y = project(x, self.embedding.weight.get_value()) if self.head is None else self.head(x)
        return join_over(y.astype(jnp.float32), self.axis, self.config.vocab_size)
