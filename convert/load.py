"""Any `ModelSource` onto devices, one tensor at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from svsk_jax.model.decoder import Decoder
from svsk_jax.model.source import ModelSource


def load_parameters(source: ModelSource, dtype: DTypeLike, mesh: Mesh | None = None) -> dict[str, Any]:
    """Every parameter by full path, on the default device or over `mesh`.

    Over a mesh, matrices (also those inside a packed weight) are split by rows over the first axis where it
    divides them; everything else is replicated. Host copies are let go of as each tensor arrives.
    """
    parameters = _place(source.outer(dtype), "", mesh)
    for index in range(source.config.num_layers):
        parameters |= _place(source.layer(index, dtype), f"layers.{index}.", mesh)
    return parameters


def load_decoder(source: ModelSource, dtype: DTypeLike, mesh: Mesh | None = None) -> Decoder:
    """The decoder over `load_parameters`, with activations in `dtype`."""
    return Decoder(source.config, load_parameters(source, dtype, mesh), jnp.dtype(dtype))


def _place(values: dict[str, Any], prefix: str, mesh: Mesh | None) -> dict[str, Any]:
    placed = {}
    for path in list(values):
        value = values.pop(path)
        value = jax.tree.map(lambda leaf: jax.device_put(leaf, _sharding(leaf, mesh)), value)
        # A transfer under way keeps its host copy: wait, so that no more than one is alive.
        placed[prefix + path] = jax.block_until_ready(value)
    return placed


def _sharding(leaf: Any, mesh: Mesh | None) -> NamedSharding | None:
    if mesh is None:
        return None
    axis = mesh.axis_names[0]
    split = leaf.ndim == 2 and leaf.shape[0] % mesh.shape[axis] == 0
    return NamedSharding(mesh, PartitionSpec(axis) if split else PartitionSpec())
