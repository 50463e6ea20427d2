"""Which parameters of a decoder are divided over `model`, and how."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.types import PackedWeight, row_leaves
from svsk_jax.model.config import ModelConfig
from svsk_jax.parallel.cut import alike, cut, why_not_cut
from svsk_jax.parallel.mesh import MESH_AXIS, MODEL

LOGICAL_AXES: dict[str, tuple[str, int]] = {
    "embedding.weight": ("vocabulary", 0),
    "head.weight": ("vocabulary", 0),
    "attention.q.weight": ("heads", 0),
    "attention.k.weight": ("heads", 0),
    "attention.v.weight": ("heads", 0),
    "attention.q.bias": ("heads", 0),
    "attention.k.bias": ("heads", 0),
    "attention.v.bias": ("heads", 0),
    "attention.o.weight": ("heads", 1),
    "mlp.gate.weight": ("mlp", 0),
    "mlp.up.weight": ("mlp", 0),
    "mlp.gate.bias": ("mlp", 0),
    "mlp.up.bias": ("mlp", 0),
    "mlp.down.weight": ("mlp", 1),
}
"""The axis of each parameter, by its path within the layer, that has a logical axis which is divided, and its
name in `mesh.MESH_AXIS`. Others are whole on every device: norms, and biases of what is summed over it."""


def divided_axis(path: str) -> int | None:
    """Which axis of a parameter, named by path within its layer, is divided over `model`; None if none is."""
    logical, axis = LOGICAL_AXES.get(path, ("hidden", 0))
    return axis if MESH_AXIS[logical] == MODEL else None


def leaf_sharding(mesh: Mesh, path: str, leaf: Any) -> NamedSharding:
    """How an array of a parameter, whole, lies over a mesh while it is read or converted.

    Matrices, those of packed weights too, and biases are divided over `model` as in a `ParallelDecoder`,
    where they divide. Everything else is on every device: sidecars are flat, their parts no equal ranges.

    Args:
        mesh: with or without an axis `model`.
        path: of the parameter, within its layer.
        leaf: one of its arrays.
    """
    axis = divided_axis(path) if leaf.ndim == (1 if path.endswith(".bias") else 2) else None
    if axis is None or MODEL not in mesh.shape or leaf.shape[axis] % mesh.shape[MODEL]:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, MODEL))


def config_of_share(config: ModelConfig, parts: int) -> ModelConfig:
    """The configuration of what one of `parts` devices holds: its heads and hidden units, and the whole
    vocabulary.

    Raises:
        ValueError: heads or hidden units do not divide.
    """
    for path, count, what in (
        ("attention.k.weight", config.num_kv_heads, "key heads"),
        ("mlp.gate.weight", config.intermediate_size, "hidden units"),
    ):
        if count % parts:
            raise _does_not_divide(path, f"{count} {what} do not divide by {parts}", config, parts)
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // parts,
        num_kv_heads=config.num_kv_heads // parts,
        intermediate_size=config.intermediate_size // parts,
    )


def cut_parameter(path: str, value: Any, config: ModelConfig, parts: int, prefix: str = "") -> list[Any]:
    """What each of `parts` devices holds of a parameter; all have the same shapes and static fields.

    A vocabulary that does not divide is filled with rows of zeros.

    Args:
        path: within the layer.
        value: dense or packed.
        config: of the whole model.
        parts: devices along `model`.
        prefix: of the path, for errors.

    Raises:
        ValueError: it does not divide; names the parameter and the largest `model` that works.
    """
    axis = divided_axis(path)
    if axis is None:
        return [value] * parts
    if LOGICAL_AXES[path][0] == "vocabulary":
        value = _filled(value, parts)
    reason = why_not_cut(value, parts, axis)
    if reason is not None:
        raise _does_not_divide(
            prefix + path, reason, config, parts, lambda fewer: why_not_cut(value, fewer, axis) is None
        )
    return alike(cut(value, parts, axis))


def _does_not_divide(
    path: str, reason: str, config: ModelConfig, parts: int, fits: Any = lambda parts: True
) -> ValueError:
    works = (
        fewer
        for fewer in range(parts - 1, 0, -1)
        if config.num_kv_heads % fewer == 0 and config.intermediate_size % fewer == 0 and fits(fewer)
    )
    return ValueError(
        f"--mesh model={parts}: {path}: {reason}; the largest model= that works for it is {next(works)}"
    )


def _filled(value: Any, parts: int) -> Any:
    """An embedding or head with rows of zeros up to a multiple of `parts`."""
    rows = parts * ceil_div(value.shape[0], parts)

    def pad(leaf: Any) -> Any:
        xp = np if isinstance(leaf, np.ndarray) else jnp
        return xp.pad(leaf, ((0, rows - leaf.shape[0]), (0, 0)))

    if rows == value.shape[0]:
        return value
    if isinstance(value, PackedWeight):
        filled = {name: pad(leaf) for name, leaf in row_leaves(value).items()}
        return dataclasses.replace(value, **filled, shape=(rows, value.shape[1]))
    return pad(value)
