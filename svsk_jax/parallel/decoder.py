"""A decoder whose parameters are divided over the devices of a mesh's `model` axis."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from svsk_jax.model.config import ModelConfig
from svsk_jax.model.decoder import Decoder
from svsk_jax.model.experts import stack_experts
from svsk_jax.model.laid_out import lay_out_for_device
from svsk_jax.model.linear import restore
from svsk_jax.model.source import ParameterSource
from svsk_jax.parallel.mesh import DATA, MODEL
from svsk_jax.parallel.parameters import config_of_share, cut_parameter

LayOut = Callable[[dict[str, Any], DTypeLike], dict[str, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelDecoder:
    """A decoder over a mesh: q, k, v, gate and up divided by rows, o and down by columns, embedding and head
    by rows of the vocabulary, norms whole everywhere (Shoeybi et al., "Megatron-LM", 2019).

    `shares` is what a device holds, with an axis before those of every leaf that is divided over `model`: its
    entry i is what the devices with index i hold. It runs by `on_mesh` alone.
    """

    shares: Decoder
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    """Of the whole model."""

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits, f32, of the token after each position; b is divided over `data` where it divides."""
        batch = DATA if tokens.shape[0] % self.mesh.shape[DATA] == 0 else None
        run = on_mesh(self.mesh, lambda model, tokens: model(tokens), (P(batch),), P(batch))
        return run(self.shares, tokens)


def on_mesh(mesh: Mesh, work: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any) -> Any:
    """`work(model, *arguments)` on every device, as a function of the `ParallelDecoder.shares` (or a list of
    its leaves) and the arguments.

    Args:
        mesh: of the `ParallelDecoder`.
        work: takes what one device holds.
        in_specs: how the arguments are divided over the mesh.
        out_specs: how the results are; one that is not divided over an axis is the same along it.
    """

    def local(shares: Any, *arguments: Any) -> Any:
        model = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), shares)
        return work(model, *arguments)

    # Kernels don't say over which axes their results vary.
    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(MODEL), *in_specs), out_specs=out_specs, check_vma=False
    )


def load_parallel(
    source: ParameterSource,
    dtype: DTypeLike,
    mesh: Mesh,
    *,
    dense: bool = False,
    lay_out: LayOut = lay_out_for_device,
) -> ParallelDecoder:
    """The decoder over a mesh, read and divided layer by layer, each share laid out for its device.

    Args:
        source: of the whole model.
        dtype: of activations and dense weights.
        mesh: from `make_mesh`; devices along `data` hold copies.
        dense: restore packed matrices.
        lay_out: makes of a share's parameters and `dtype` what its device runs on.

    Raises:
        ValueError: heads, hidden units or a matrix do not divide over `model`; names the parameter and the
            largest `model` that works.
    """
    config = config_of_share(source.config, mesh.shape[MODEL])

    def spread(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        shares = _cut(values, prefix, source.config, mesh.shape[MODEL], dtype if dense else None)
        return {prefix + path: value for path, value in _placed(shares, mesh, dtype, lay_out).items()}

    parameters = spread(source.outer(dtype), "")
    for index in range(config.num_layers):
        parameters |= spread(source.layer(index, dtype), f"layers.{index}.")
    shares = Decoder(config, parameters, dtype, axis=MODEL)
    return ParallelDecoder(shares=shares, mesh=mesh, config=source.config)


def _cut(
    values: dict[str, Any], prefix: str, config: ModelConfig, parts: int, dense: DTypeLike | None
) -> list[dict[str, Any]]:
    """The parameters of each share, on the host, taken out of `values` on the way."""
    shares: list[dict[str, Any]] = [{} for _ in range(parts)]
    for path in list(values):
        value = values.pop(path)
        if dense is not None and not isinstance(value, jax.Array | np.ndarray):
            value = restore(value, dtype=dense)
        whole = jax.tree.map(np.asarray, value)
        for share, part in zip(shares, cut_parameter(path, whole, config, parts, prefix), strict=True):
            share[path] = part
    # Before a leaf gets its axis of shares, which comes first.
    return [dict(stack_experts(share)) for share in shares]


def _placed(shares: list[dict[str, Any]], mesh: Mesh, dtype: DTypeLike, lay_out: LayOut) -> dict[str, Any]:
    """The shares on their devices, laid out, as the one tree that `ParallelDecoder` describes."""
    here = jax.process_index()
    copies = [[device for device in column if device.process_index == here] for column in mesh.devices.T]
    laid_out = [
        lay_out(jax.device_put(share, devices[0]), dtype)
        for share, devices in zip(shares, copies, strict=True)
        if devices
    ]
    copies = [devices for devices in copies if devices]
    divided = NamedSharding(mesh, P(MODEL))

    def joined(*leaves: jax.Array) -> jax.Array:
        pieces = [
            jax.device_put(leaf[None], device)
            for leaf, devices in zip(leaves, copies, strict=True)
            for device in devices
        ]
        shape = (len(shares), *leaves[0].shape)
        return jax.make_array_from_single_device_arrays(shape, divided, pieces)

    # A transfer under way keeps the arrays that it reads: wait before the next layer's come.
    return jax.block_until_ready(jax.tree.map(joined, *laid_out))
