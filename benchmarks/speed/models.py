"""Models of real shapes with random packed weights: speed does not depend on the values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.svsk_matmul.synthetic import random_int8, random_weight
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import QUANTIZED_LINEARS, parameter_shapes


def qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool = False) -> ModelConfig:
    """Qwen3 of a size."""
    return ModelConfig(
        architecture="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        qk_norm=True,
    )


CONFIGS = {
    "SmolLM2-135M": ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64),
}
"""By name."""


def packed_parameters(config: ModelConfig, seed: jax.Array, **form: Any) -> dict[str, Any]:
    """Decoder linears in 4 bits (`form` as `synthetic.random_weight` takes it), int8 embedding and head."""
    parameters: dict[str, Any] = {}
    for index, (path, shape) in enumerate(parameter_shapes(config).items()):
        key = jax.random.fold_in(seed, index)
        if any(path.endswith(f"{name}.weight") for name in QUANTIZED_LINEARS):
            parameters[path] = random_weight(key, *shape, **form)
        elif len(shape) == 2:
            parameters[path] = random_int8(key, *shape)
        else:
            parameters[path] = jnp.ones(shape, jnp.bfloat16)
    return parameters


def dense_parameters(config: ModelConfig, seed: jax.Array, dtype: DTypeLike) -> dict[str, Any]:
    """The same shapes, dense."""
    return {
        path: jnp.ones(shape, dtype)
        if len(shape) == 1
        else jax.random.normal(jax.random.fold_in(seed, index), shape, dtype)
        / jnp.asarray(shape[1] ** 0.5, dtype)
        for index, (path, shape) in enumerate(parameter_shapes(config).items())
    }
