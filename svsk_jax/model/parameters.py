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
"""Paths, within a decoder layer with a dense MLP, of the linears that a recipe quantizes."""

EXPERT_LINEARS = ("gate", "up", "down")
"""The linears of one expert, by path within it."""

LINEAR_INPUTS: dict[str, str] = {
    "attention.q": "attention.input",
    "attention.k": "attention.input",
    "attention.v": "attention.input",
    "attention.o": "attention.output",
    "mlp.gate": "mlp.input",
    "mlp.up": "mlp.input",
    "mlp.down": "mlp.hidden",
}
"""Which activation each linear of a layer with a dense MLP reads; linears that share one share its
statistics."""

HEAD_INPUT = "head.input"
"""The activation that the head reads, by full path."""

EXPERTS = "mlp.experts"
"""Where the experts are in a layer; the pooled statistics of all of them go by this name."""
EXPERT_INPUTS = {"gate": "input", "up": "input", "down": "hidden"}
"""Which of an expert's activations each of its linears reads."""

JOINED_LINEARS: dict[str, tuple[str, ...]] = {
    "attention.qkv": ("attention.q", "attention.k", "attention.v"),
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
    f"{EXPERTS}.gate_up": (f"{EXPERTS}.gate", f"{EXPERTS}.up"),
}
"""Linears of one input that a model may hold as one, their outputs one after another; of experts, their
stacks."""


def expert(index: int, name: str) -> str:
    """Path within a layer of a linear, or an activation, of one expert."""
    return f"{EXPERTS}.{index}.{name}"


def linear_inputs(config: ModelConfig, index: int) -> dict[str, str]:
    """Which activation each quantized linear of decoder layer `index` reads, linears of one input next to
    each other. The router of a mixture is none of them: what it gives is which experts run, and where two
    are nearly as probable a small error changes that for all of the token."""
    if not config.has_experts(index):
        return dict(LINEAR_INPUTS)
    assert config.mixture is not None
    attention = {name: read for name, read in LINEAR_INPUTS.items() if name.startswith("attention.")}
    return attention | {
        expert(number, name): expert(number, EXPERT_INPUTS[name])
        for number in range(config.mixture.num_experts)
        for name in EXPERT_LINEARS
    }


def quantized_linears(config: ModelConfig, index: int) -> tuple[str, ...]:
    """Paths, within decoder layer `index`, of the linears that a recipe quantizes."""
    return tuple(linear_inputs(config, index))


def input_widths(config: ModelConfig, index: int) -> dict[str, int]:
    """Channels of each activation that the quantized linears of decoder layer `index` read."""
    shapes = layer_shapes(config, index)
    return {read: shapes[f"{name}.weight"][1] for name, read in linear_inputs(config, index).items()}


def layer_linears(config: ModelConfig, index: int) -> dict[str, tuple[int, int]]:
    """[N, K] of each quantized linear of decoder layer `index`, by path within the layer."""
    shapes = layer_shapes(config, index)
    return {
        name: (shapes[f"{name}.weight"][0], shapes[f"{name}.weight"][1])
        for name in quantized_linears(config, index)
    }


def quantized_paths(config: ModelConfig) -> tuple[str, ...]:
    """Full paths of the linears that a recipe quantizes, layer by layer."""
    return tuple(
        f"layers.{index}.{name}"
        for index in range(config.num_layers)
        for name in quantized_linears(config, index)
    )


def layer_kinds(config: ModelConfig) -> dict[int, int]:
    """A layer of each kind that the model has, by index, and how many are of its kind: layers of a kind have
    the same shapes."""
    kinds: dict[bool, list[int]] = {}
    for index in range(config.num_layers):
        kinds.setdefault(config.has_experts(index), []).append(index)
    return {indices[0]: len(indices) for indices in kinds.values()}


def layer_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of decoder layer `index`, by path within the layer."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_norm.scale": (hidden,),
        "attention.q.weight": (queries, hidden),
        "attention.k.weight": (keys, hidden),
        "attention.v.weight": (keys, hidden),
        "attention.o.weight": (hidden, queries),
        "mlp_norm.scale": (hidden,),
    }
    if config.has_experts(index):
        shapes |= _expert_shapes(config)
    else:
        shapes |= {
            "mlp.gate.weight": (mlp, hidden),
            "mlp.up.weight": (mlp, hidden),
            "mlp.down.weight": (hidden, mlp),
        }
    if config.qkv_bias:
        shapes |= {"attention.q.bias": (queries,), "attention.k.bias": (keys,), "attention.v.bias": (keys,)}
    if config.o_bias:
        shapes["attention.o.bias"] = (hidden,)
    if config.mlp_bias and not config.has_experts(index):
        shapes |= {"mlp.gate.bias": (mlp,), "mlp.up.bias": (mlp,), "mlp.down.bias": (hidden,)}
    if config.qk_norm:
        shapes |= {"attention.q_norm.scale": (config.head_dim,), "attention.k_norm.scale": (config.head_dim,)}
    return shapes


def _expert_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    assert config.mixture is not None
    hidden, mlp, experts = (
        config.hidden_size,
        config.mixture.moe_intermediate_size,
        config.mixture.num_experts,
    )
    shapes: dict[str, tuple[int, ...]] = {"mlp.router.weight": (experts, hidden)}
    for number in range(experts):
        for name in EXPERT_LINEARS:
            shape = (hidden, mlp) if name == "down" else (mlp, hidden)
            shapes[f"{expert(number, name)}.weight"] = shape
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
        for path, shape in layer_shapes(config, index).items()
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
