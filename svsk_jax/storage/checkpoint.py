"""Our saved models: a folder with config.json, tokenizer files, and one orbax checkpoint for each decoder
layer and for what is outside them.

out/config.json, generation_config.json, tokenizer.json, …
out/svsk/outer            embedding, final norm, head; its custom metadata describe the whole model
out/svsk/layer_00000      one decoder layer; its custom metadata describe its tensors
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from svsk_jax.config_limits import check_config
from svsk_jax.json_data import from_json, read_json_object
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import layer_shapes, outer_shapes
from svsk_jax.model.source import ModelSource
from svsk_jax.storage.atomic import output_folder, write_json
from svsk_jax.storage.described import check_described
from svsk_jax.storage.packing import abstract, describe, from_plain, to_plain
from svsk_jax.tokenizer_files import load_tokenizer

FORMAT = 1
ARRAYS = "svsk"
AGAIN = "the model is damaged, make it again"
MARKER = f"{ARRAYS}/outer/_CHECKPOINT_METADATA"


def is_saved_model(path: Path) -> bool:
    """Whether `path` is a folder that `ModelWriter` finished."""
    return (path / MARKER).is_file()


def _layer_name(index: int) -> str:
    return f"layer_{index:05d}"


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


class ModelWriter:
    """Writes a model piece by piece into the folder that `writing` hands it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _save(self, name: str, parameters: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        tensors = {path: describe(value) for path, value in parameters.items()}
        plain = {path: to_plain(value) for path, value in parameters.items()}
        custom_metadata: Any = {"tensors": tensors, **metadata}
        with _checkpointer() as checkpointer:
            checkpointer.save(
                self.folder / ARRAYS / name,
                args=ocp.args.PyTreeSave(plain, custom_metadata=custom_metadata),
            )

    def layer(
        self, index: int, parameters: Mapping[str, Any], errors: Mapping[str, float] | None = None
    ) -> None:
        """Store one decoder layer, its parameters named by path within the layer, with the layer errors of
        its linears."""
        self._save(_layer_name(index), parameters, {"errors": dict(errors or {})})

    def outer(self, parameters: Mapping[str, Any], source: ModelSource, metadata: Mapping[str, Any]) -> None:
        """Store what is outside the layers, the model's metadata, config.json, generation_config.json and
        the tokenizer."""
        header = {"format": FORMAT, "model_config": source.config.to_dict(), **metadata}
        self._save("outer", parameters, header)
        write_json(self.folder / "config.json", source.hf_config)
        if source.generation_config:
            write_json(self.folder / "generation_config.json", source.generation_config)
        source.tokenizer().save_pretrained(str(self.folder))


@contextmanager
def writing(output: Path, *, overwrite: bool) -> Iterator[ModelWriter]:
    """A writer whose model appears under `output` when the block ends well, and nothing otherwise.

    Raises:
        FileExistsError: `output` exists and is not to be overwritten.
    """
    with output_folder(output, overwrite=overwrite, marker=MARKER) as partial:
        yield ModelWriter(partial)


class SavedModel:
    """A model that `writing` wrote, as a `ModelSource`; packed matrices come as they are stored.

    Args:
        folder: the model's folder.
        mesh: restore onto these devices, each array's rows divided over the mesh's first axis where they
            divide; default one device.

    Raises:
        ValueError: the folder holds no saved model, or one of another format.
    """

    def __init__(self, folder: Path, mesh: Mesh | None = None):
        folder = folder.absolute()
        if not is_saved_model(folder):
            raise ValueError(f"{folder}: not a model that svsk saved (no {MARKER})")
        self.folder, self.mesh = folder, mesh
        self.metadata = self._metadata("outer")
        if self.metadata.get("format") != FORMAT:
            raise ValueError(
                f"{folder}: stored in format {self.metadata.get('format')}, this svsk-jax reads "
                f"{FORMAT}; quantize again or upgrade"
            )
        self.description = str(folder)
        self.config = check_config(
            from_json(ModelConfig, self.metadata.get("model_config"), f"{folder}: model_config"), str(folder)
        )
        check_described(self.metadata, outer_shapes(self.config), folder / ARRAYS / "outer")
        self.hf_config = read_json_object(folder / "config.json", AGAIN)
        generation = folder / "generation_config.json"
        self.generation_config = read_json_object(generation, AGAIN) if generation.is_file() else {}

    def layer_metadata(self, index: int) -> dict[str, Any]:
        """Tensor descriptions and layer errors of one decoder layer."""
        return self._described(_layer_name(index))

    def outer(self, dtype: DTypeLike) -> dict[str, Any]:
        """Parameters outside the layers, by full path; dense ones in `dtype`."""
        return self._restore("outer", dtype)

    def layer(self, index: int, dtype: DTypeLike) -> dict[str, Any]:
        """Parameters of one decoder layer, by path within it; dense ones in `dtype`."""
        return self._restore(_layer_name(index), dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The stored tokenizer."""
        return load_tokenizer(self.folder)

    def fingerprint(self) -> str:
        """Digest of all metadata."""
        parts = [self.metadata, *(self.layer_metadata(index) for index in range(self.config.num_layers))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def local_path(self) -> Path:
        """The folder."""
        return self.folder

    def _metadata(self, name: str) -> dict[str, Any]:
        path = self.folder / ARRAYS / name
        try:
            with _checkpointer() as checkpointer:
                metadata = checkpointer.metadata(path).item_metadata.custom_metadata
        except Exception as error:  # orbax raises many kinds on damaged files
            raise ValueError(
                f"{path}: no readable metadata ({error!r}); the model is damaged, make it again"
            ) from error
        if not isinstance(metadata, dict) or "tensors" not in metadata:
            raise ValueError(
                f"{path}: no metadata of svsk in the checkpoint; the model is damaged, make it again"
            )
        return metadata

    def _described(self, name: str) -> dict[str, Any]:
        """The metadata of one checkpoint, checked against the model's shapes."""
        shapes = outer_shapes(self.config) if name == "outer" else layer_shapes(self.config)
        metadata = self._metadata(name)
        check_described(metadata, shapes, self.folder / ARRAYS / name)
        return metadata

    def _sharding(self, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        if self.mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        axis = self.mesh.axis_names[0]
        divides = leaf.ndim == 2 and leaf.shape[0] % self.mesh.shape[axis] == 0
        return NamedSharding(self.mesh, PartitionSpec(axis) if divides else PartitionSpec())

    def _restore(self, name: str, dtype: DTypeLike) -> dict[str, Any]:
        likes = {path: abstract(tensor) for path, tensor in self._described(name)["tensors"].items()}
        plain = {path: to_plain(like) for path, like in likes.items()}
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding(leaf)), plain
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        try:
            with _checkpointer() as checkpointer:
                restored = checkpointer.restore(
                    self.folder / ARRAYS / name,
                    args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args),
                )
        except Exception as error:  # orbax and tensorstore raise many kinds on damaged files
            summary = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self.folder / ARRAYS / name}: cannot be restored ({summary}); the model is damaged, "
                "make it again"
            ) from error
        values = {path: from_plain(restored[path], like) for path, like in likes.items()}
        return {
            path: value.astype(jnp.dtype(dtype)) if isinstance(value, jax.Array) else value
            for path, value in values.items()
        }
