"""An open checkpoint: a `ModelSource` whose values are read and converted one tensor at a time."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from convert.names import Source, undo_permutation
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import layer_shapes, outer_shapes

SAMPLE_BYTES = 4096
SAMPLES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk, by parameter path; a `ModelSource`. `sources` has every path of the config."""

    description: str
    path: Path
    files: tuple[Path, ...]
    config: ModelConfig
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    sources: Mapping[str, Source]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]

    def parameter(self, path: str, dtype: DTypeLike) -> np.ndarray:
        """The values of one parameter, by full path, checked finite.

        Raises:
            ValueError: no such parameter, or values that are not floats, not finite or too large for `dtype`.
        """
        source = self.sources.get(path)
        if source is None:
            raise ValueError(
                f"{self.description}: no parameter {path!r}; known are {', '.join(self.sources)}"
            )
        try:
            value = source.tensor.to_numpy(dtype)
        except ValueError as error:
            raise ValueError(f"{self.description}: {error}") from error
        return value if source.heads is None else undo_permutation(value, source.heads)

    def outer(self, dtype: DTypeLike) -> dict[str, np.ndarray]:
        """Parameters outside the layers, by full path."""
        return {path: self.parameter(path, dtype) for path in outer_shapes(self.config)}

    def layer(self, index: int, dtype: DTypeLike) -> dict[str, np.ndarray]:
        """Parameters of decoder layer `index`, by path within the layer."""
        if not 0 <= index < self.config.num_layers:
            raise ValueError(f"{self.description}: no layer {index}; it has {self.config.num_layers}")
        return {
            path: self.parameter(f"layers.{index}.{path}", dtype) for path in layer_shapes(self.config, index)
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with chat template. Raises ValueError when there is none."""
        return self.load_tokenizer()

    def fingerprint(self) -> str:
        """SHA-256 over configuration, tensors' paths, shapes and types, and spaced samples of each file."""
        digest = hashlib.sha256()
        layout = {path: (source.tensor.shape, source.tensor.dtype) for path, source in self.sources.items()}
        digest.update(json.dumps([self.config.to_dict(), layout], sort_keys=True).encode())
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                for offset in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                    stream.seek(offset)
                    digest.update(stream.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def local_path(self) -> Path:
        """The folder or file that is read."""
        return self.path
