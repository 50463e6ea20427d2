"""Arrays onto the devices of a mesh and back, whether one process or several hold them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays, which every process has whole, divided as `sharding` says."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(value: Any) -> jax.Array:
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree)


def readable(tree: Any) -> Any:
    """The tree with its arrays in a form that each process can read with `np.asarray`, other leaves as they
    are. All processes of a mesh call it together."""

    def whole(value: Any) -> Any:
        if not isinstance(value, jax.Array) or value.is_fully_addressable:
            return value
        if not value.is_fully_replicated:
            assert isinstance(value.sharding, NamedSharding)
            value = jax.jit(_same, out_shardings=NamedSharding(value.sharding.mesh, PartitionSpec()))(value)
        return value.addressable_data(0)

    return jax.tree.map(whole, tree)


def _same(value: jax.Array) -> jax.Array:
    return value


def one_copy(tree: Any) -> Any:
    """Replicated arrays on one device of this process: what is computed from them is then computed once, not
    on each device."""
    return jax.tree.map(lambda value: value.addressable_data(0), tree)


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that is divided along its first axis alone, in host memory."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def from_local_rows(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`local_rows` undone, by all processes together."""
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    return jax.make_array_from_process_local_data(sharding, rows)
