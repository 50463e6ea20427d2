"""Our saved models: a folder with config.json, tokenizer files, and one orbax checkpoint for each decoder
layer and for what is outside them.

out/config.json, generation_config.json, tokenizer.json, …
out/svsk/outer            embedding, final norm, head; its custom metadata describe the whole model
out/svsk/layer_00000      one decoder layer; its custom metadata describe its tensors
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from svsk_jax.config_limits import check_config
from svsk_jax.json_data import from_json, read_json_object
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import layer_shapes, outer_shapes
from svsk_jax.model.source import ModelSource
from svsk_jax.storage import arrays
from svsk_jax.storage.atomic import output_folder, write_json
from svsk_jax.storage.described import check_described
from svsk_jax.tokenizer_files import load_tokenizer

FORMAT = 1
ARRAYS = "svsk"
OUTER = "outer"
AGAIN = "the model is damaged, make it again"
MARKER = f"{ARRAYS}/{OUTER}/_CHECKPOINT_METADATA"


def is_saved_model(path: Path) -> bool:
    """Whether `path` is a folder that `ModelWriter` finished."""
    return (path / MARKER).is_file()


def checkpoint_paths(folder: Path, layers: int) -> dict[str, Path]:
    """The checkpoints of a model in `folder`, by the prefix that their tensors' names have in the model."""
    names = {"": OUTER} | {f"layers.{index}.": layer_name(index) for index in range(layers)}
    return {prefix: folder / ARRAYS / name for prefix, name in names.items()}


def layer_name(index: int) -> str:
    """The folder of a decoder layer's checkpoint."""
    return f"layer_{index:05d}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """A decoder layer as it is stored."""

    parameters: dict[str, Any]
    """By path within the layer."""
    errors: dict[str, float]
    """Layer error of each of its linears; empty where none was quantized."""
    predicted_nats: float = 0.0
    """Predicted KL divergence per token of these errors together; 0 where it was not predicted."""


class ModelWriter:
    """Writes a model piece by piece into a folder. Each piece is on the disk, whole, once it is written."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()

    def layer(
        self,
        index: int,
        parameters: Mapping[str, Any],
        errors: Mapping[str, float] | None = None,
        predicted_nats: float = 0.0,
    ) -> None:
        """Store one decoder layer, its parameters named by path within the layer, with the layer errors of
        its linears and the KL divergence per token that is predicted of them together."""
        metadata = {"errors": dict(errors or {}), "predicted_nats": predicted_nats}
        arrays.save(self._path(index), parameters, metadata)

    def has(self, index: int) -> bool:
        """Whether layer `index` is there, be it damaged."""
        return self._path(index).is_dir()

    def read(self, index: int) -> StoredLayer | None:
        """A layer that was stored before; None where there is none, or where it is damaged."""
        path = self._path(index)
        if not self.has(index):
            return None
        try:
            metadata = arrays.read_metadata(path)
            layer = StoredLayer(
                parameters=arrays.restore(path, metadata),
                errors=metadata["errors"],
                predicted_nats=metadata["predicted_nats"],
            )
        except (ValueError, KeyError):
            return None
        return None if arrays.differing(layer.parameters, metadata) else layer

    def layers(self) -> int:
        """How many layers were stored."""
        return len(list((self.folder / ARRAYS).glob("layer_*")))

    def clear(self) -> None:
        """Remove all layers."""
        shutil.rmtree(self.folder / ARRAYS, ignore_errors=True)

    def outer(self, parameters: Mapping[str, Any], source: ModelSource, metadata: Mapping[str, Any]) -> None:
        """Store config.json, generation_config.json, the tokenizer, and last, since it makes the folder a
        model, what is outside the layers with the model's metadata."""
        write_json(self.folder / "config.json", source.hf_config)
        if source.generation_config:
            write_json(self.folder / "generation_config.json", source.generation_config)
        source.tokenizer().save_pretrained(str(self.folder))
        header = {"format": FORMAT, "model_config": source.config.to_dict(), **metadata}
        arrays.save(self.folder / ARRAYS / OUTER, parameters, header)

    def _path(self, index: int) -> Path:
        return self.folder / ARRAYS / layer_name(index)


@contextmanager
def writing(output: Path, *, overwrite: bool) -> Iterator[ModelWriter]:
    """A writer whose model appears under `output` when the block ends well, and nothing otherwise.

    Raises:
        FileExistsError: `output` exists and is not to be overwritten, or another run is writing to it.
    """
    with output_folder(output, overwrite=overwrite, marker=MARKER) as partial:
        yield ModelWriter(partial)


class SavedModel:
    """A model that `writing` wrote, as a `ModelSource`; packed matrices come as they are stored.

    Args:
        folder: the model's folder.
        mesh: restore onto these devices, divided as `parallel.parameters.leaf_sharding` says, however many
            it was saved from; default one device.

    Raises:
        ValueError: the folder holds no saved model, or one of another format.
    """

    def __init__(self, folder: Path, mesh: Mesh | None = None):
        folder = folder.absolute()
        if not is_saved_model(folder):
            raise ValueError(f"{folder}: not a model that svsk saved (no {MARKER})")
        self.folder, self.mesh = folder, mesh
        self.metadata = self._metadata(OUTER)
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
        return self._described(layer_name(index), layer_shapes(self.config, index))

    def outer(self, dtype: DTypeLike) -> dict[str, Any]:
        """Parameters outside the layers, by full path; dense ones in `dtype`."""
        return self._restore(OUTER, outer_shapes(self.config), dtype)

    def layer(self, index: int, dtype: DTypeLike) -> dict[str, Any]:
        """Parameters of one decoder layer, by path within it; dense ones in `dtype`."""
        return self._restore(layer_name(index), layer_shapes(self.config, index), dtype)

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
        return arrays.read_metadata(self.folder / ARRAYS / name)

    def _described(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The metadata of one checkpoint, checked against the model's shapes."""
        metadata = self._metadata(name)
        check_described(metadata, shapes, self.folder / ARRAYS / name)
        return metadata

    def _restore(self, name: str, shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike) -> dict[str, Any]:
        values = arrays.restore(self.folder / ARRAYS / name, self._described(name, shapes), mesh=self.mesh)
        return {
            path: value.astype(jnp.dtype(dtype)) if isinstance(value, jax.Array) else value
            for path, value in values.items()
        }
