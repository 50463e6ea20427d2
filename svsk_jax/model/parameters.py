"""The declared parameters of a decoder: one table of paths and shapes that every other part reads.

A parameter's path is its place in the module tree: `embedding.weight`, `layers.3.attention.q.weight`,
`final_norm.scale`, `head.weight`.
Matrices are stored [out, in], as in the checkpoints, so `y = x Wᵀ`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from svsk_jax.model.config import ModelConfig

QUANTIZED_LINEARS = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)
"""Paths, within a decoder layer, of the linears that a recipe quantizes."""

JOINED_LINEARS: dict[str, tuple[str, ...]] = {
    "attention.qkv": ("attention.q", "attention.k", "attention.v"),
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
}
"""Linears of one input that a model may hold as one, their outputs one after another."""

LINEAR_INPUTS: dict[str, str] = {
    "attention.q": "attention.input",
    "attention.k": "attention.input",
    "attention.v": "attention.input",
    "attention.o": "attention.output",
    "mlp.gate": "mlp.input",
    "mlp.up": "mlp.input",
    "mlp.down": "mlp.hidden",
}
"""Which activation each linear reads; linears that share one share its statistics."""


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of one decoder layer, by path within the layer."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_norm.scale": (hidden,),
        "attention.q.weight": (queries, hidden),
        "attention.k.weight": (keys, hidden),
        "attention.v.weight": (keys, hidden),
        "attention.o.weight": (hidden, queries),
        "mlp_norm.scale": (hidden,),
        "mlp.gate.weight": (mlp, hidden),
        "mlp.up.weight": (mlp, hidden),
        "mlp.down.weight": (hidden, mlp),
    }
    if config.qkv_bias:
        shapes |= {"attention.q.bias": (queries,), "attention.k.bias": (keys,), "attention.v.bias": (keys,)}
    if config.o_bias:
        shapes["attention.o.bias"] = (hidden,)
    if config.mlp_bias:
        shapes |= {"mlp.gate.bias": (mlp,), "mlp.up.bias": (mlp,), "mlp.down.bias": (hidden,)}
    if config.qk_norm:
        shapes |= {"attention.q_norm.scale": (config.head_dim,), "attention.k_norm.scale": (config.head_dim,)}
    return shapes


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter outside the decoder layers. Tied embeddings have no `head.weight`."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.weight": (config.vocab_size, config.hidden_size),
        "final_norm.scale": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model by full path."""
    layers = {
        f"layers.{index}.{path}": shape
        for index in range(config.num_layers)
        for path, shape in layer_shapes(config).items()
    }
    return outer_shapes(config) | layers


def layer_parameters(parameters: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The parameters of decoder layer `index`, by path within the layer."""
    prefix = f"layers.{index}."
    return {path.removeprefix(prefix): value for path, value in parameters.items() if path.startswith(prefix)}


def random_parameters(config: ModelConfig, seed: int, dtype: DTypeLike = np.float32) -> dict[str, jax.Array]:
    """Random parameters of the right shapes, for tests and benchmarks: matrices ~ N(0, 1/in), scales near
    1."""
    rng = np.random.default_rng(seed)
    parameters = {}
    for path, shape in parameter_shapes(config).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        if path.endswith(".scale"):
            value = 1 + 0.1 * noise
        elif path.endswith(".bias"):
            value = 0.1 * noise
        else:
            value = noise / np.sqrt(shape[-1])
        parameters[path] = jax.numpy.asarray(value.astype(dtype))
    return parameters
