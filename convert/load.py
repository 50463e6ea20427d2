"""Any `ModelSource` onto devices, one tensor at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from svsk_jax.model.decoder import Decoder
from svsk_jax.model.experts import stack_experts
from svsk_jax.model.source import ModelSource
from svsk_jax.parallel.parameters import leaf_sharding


def load_parameters(source: ModelSource, dtype: DTypeLike, mesh: Mesh | None = None) -> dict[str, Any]:
    """Every parameter by full path, on the default device or over `mesh`.

    Over a mesh they are divided as `parallel.parameters.leaf_sharding` says. Host copies are let go of as
    each tensor arrives.
    """
    parameters = _place(source.outer(dtype), "", mesh)
    for index in range(source.config.num_layers):
        parameters |= _place(source.layer(index, dtype), f"layers.{index}.", mesh)
    return parameters


def load_decoder(source: ModelSource, dtype: DTypeLike, mesh: Mesh | None = None) -> Decoder:
    """The decoder over `load_parameters`, with activations in `dtype`."""
    # Experts are stacked while nobody else holds them: each is let go of as its stack is made.
    parameters = stack_experts(load_parameters(source, dtype, mesh))
    return Decoder(source.config, parameters, jnp.dtype(dtype))


def _place(values: dict[str, Any], prefix: str, mesh: Mesh | None) -> dict[str, Any]:
    placed = {}
    for path in list(values):
        value = values.pop(path)
        value = jax.tree.map(
            lambda leaf, path=path: jax.device_put(leaf, mesh and leaf_sharding(mesh, path, leaf)), value
        )
        # A transfer under way keeps its host copy: wait, so that no more than one is alive.
        placed[prefix + path] = jax.block_until_ready(value)
    return placed
