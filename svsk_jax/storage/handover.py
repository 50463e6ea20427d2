"""Layers on their way from the process that quantized them to the one that stores the model: orbax writes
what all processes hold together, or what the first one holds, and nothing else."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from svsk_jax.storage.checkpoint import StoredLayer
from svsk_jax.storage.durable import durable_file
from svsk_jax.storage.packing import abstract, describe


class Handover:
    """Layers in a folder, one file each, durable once written."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether layer `index` is there."""
        return self._file(index).is_file()

    def put(self, index: int, layer: StoredLayer) -> None:
        """Leave a layer for the other process."""
        header = {
            "tensors": {name: describe(value) for name, value in layer.parameters.items()},
            "errors": layer.errors,
            "predicted_nats": layer.predicted_nats,
        }
        leaves = jax.tree.leaves(layer.parameters)
        arrays = {str(at): np.ascontiguousarray(leaf) for at, leaf in enumerate(leaves)}
        with durable_file(self._file(index)) as partial:
            save_file(arrays, partial, metadata={"layer": json.dumps(header)})

    def take(self, index: int) -> StoredLayer | None:
        """A layer that was left here; None where there is none, or where it is damaged."""
        if not self.has(index):
            return None
        try:
            with safe_open(self._file(index), framework="numpy") as file:
                header: dict[str, Any] = json.loads(file.metadata()["layer"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return None
        like = {name: abstract(each) for name, each in header["tensors"].items()}
        leaves = [jnp.asarray(arrays[str(at)]) for at in range(len(arrays))]
        return StoredLayer(
            parameters=jax.tree.unflatten(jax.tree.structure(like), leaves),
            errors=header["errors"],
            predicted_nats=header["predicted_nats"],
        )

    def remove(self, index: int) -> None:
        """Remove a layer that is stored by now."""
        self._file(index).unlink(missing_ok=True)
