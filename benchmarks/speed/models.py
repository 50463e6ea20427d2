"""Models of real shapes with random packed weights: speed does not depend on the values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.svsk_matmul import SVSKWeight
from pallas_kernels.svsk_matmul.synthetic import FORM, random_int8, random_weight
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import EXPERT_LINEARS, EXPERTS, QUANTIZED_LINEARS, expert, parameter_shapes
from svsk_jax.quant.types import EMBEDDING_GROUP


def packed_parameters(
    config: ModelConfig, seed: jax.Array, *, embedding: str = "int8", **form: Any
) -> dict[str, Any]:
    """Decoder linears in 4 bits (`form` as `synthetic.random_weight` takes it), experts as stacks, embedding
    and head in int8 or as `--embedding q4` stores them. A router is dense."""
    parameters: dict[str, Any] = {}
    for index, (path, shape) in enumerate(parameter_shapes(config).items()):
        key = jax.random.fold_in(seed, index)
        if any(path.endswith(f"{name}.weight") for name in QUANTIZED_LINEARS):
            parameters[path] = random_weight(key, *shape, **form)
        elif config.mixture is not None and EXPERTS in path:
            for name in EXPERT_LINEARS:
                # The first stands for all.
                if path.endswith(first := f"{expert(0, name)}.weight"):
                    stack = f"{path.removesuffix(first)}{EXPERTS}.{name}.weight"
                    parameters[stack] = _random_stack(key, config.mixture.num_experts, shape, **form)
        elif path.endswith("router.weight"):
            parameters[path] = _dense(key, shape, jnp.bfloat16)
        elif len(shape) == 2:
            parameters[path] = (
                random_int8(key, *shape)
                if embedding == "int8"
                else random_weight(key, *shape, group=EMBEDDING_GROUP, rank=0)
            )
        else:
            parameters[path] = jnp.ones(shape, jnp.bfloat16)
    return parameters


@partial(jax.jit, static_argnames=("experts", "shape", *FORM))
def _random_stack(key: jax.Array, experts: int, shape: tuple[int, int], **form: Any) -> SVSKWeight:
    return jax.vmap(lambda key: random_weight(key, *shape, **form))(jax.random.split(key, experts))


def _dense(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / jnp.asarray(shape[1] ** 0.5, dtype)


def dense_parameters(config: ModelConfig, seed: jax.Array, dtype: DTypeLike) -> dict[str, Any]:
    """The same shapes, dense."""
    return {
        path: jnp.ones(shape, dtype)
        if len(shape) == 1
        else _dense(jax.random.fold_in(seed, index), shape, dtype)
        for index, (path, shape) in enumerate(parameter_shapes(config).items())
    }
