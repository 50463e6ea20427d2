"""Layers saved from one mesh and restored onto others."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.scale.sizes import RandomSource, config_of, counts, machine
from svsk_jax.parallel import make_mesh
from svsk_jax.parallel.parameters import leaf_sharding
from svsk_jax.storage import arrays

LAYERS = 2


def restore(tiny: bool, report: Callable[..., None]) -> None:
    report(**machine())
    devices = counts(tiny)[-1]
    source = RandomSource(config_of(tiny, LAYERS))
    whole = [source.layer(index, jnp.bfloat16) for index in range(source.config.num_layers)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    half = max(1, devices // 2)
    meshes = dict.fromkeys([(1, devices), (devices, 1), (devices // half, half), (1, 1)])
    with tempfile.TemporaryDirectory() as folder:
        held: list[dict[str, Any]] = whole
        for turn, (data, model) in enumerate(meshes):
            paths = [Path(folder) / f"from-{turn}-{index}" for index in range(len(held))]
            start = time.perf_counter()
            for path, layer in zip(paths, held, strict=True):
                arrays.save(path, layer, {})
            saved = time.perf_counter() - start
            mesh = make_mesh(data, model, jax.devices()[: data * model])
            start, read = time.perf_counter(), bytes_read()
            metadata = [arrays.read_metadata(path) for path in paths]
            held = [arrays.restore(path, each, mesh=mesh) for path, each in zip(paths, metadata, strict=True)]
            jax.block_until_ready(held)
            seconds, read = time.perf_counter() - start, bytes_read() - read
            report(
                data=data,
                model=model,
                megabytes=size / 1e6,
                save_seconds=saved,
                restore_seconds=seconds,
                megabytes_read=read / 1e6,
                largest_share=largest_share(held),
                placed_as_asked=all(_as_asked(mesh, layer) for layer in held),
                bytes_equal=not any(
                    arrays.differing(layer, each) for layer, each in zip(held, metadata, strict=True)
                )
                and all(
                    arrays.sha256(layer[name]) == arrays.sha256(value)
                    for layer, first in zip(held, whole, strict=True)
                    for name, value in first.items()
                ),
            )


def bytes_read() -> int:
    """By this process so far, from the disk or the system's cache."""
    return int(Path("/proc/self/io").read_text(encoding="utf-8").split()[1])


def largest_share(layers: list[dict[str, Any]]) -> float:
    """Of the bytes, that one device holds."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(layers):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in jax.tree.leaves(layers))


def _as_asked(mesh: jax.sharding.Mesh, layer: dict[str, Any]) -> bool:
    return all(
        leaf.sharding.is_equivalent_to(leaf_sharding(mesh, name, leaf), leaf.ndim)
        for name, value in layer.items()
        for leaf in jax.tree.leaves(value)
    )
