"""The model that comparisons are made on: SmolLM2-135M-Instruct, dithered.

    python -m benchmarks.quality.reference [FOLDER]

Its only file within reach is Q4_1, and a model that came from a 4-bit grid is no reference for formats that
can represent that grid. So each decoder weight gets uniform noise as wide as one step of its group's grid,
from a fixed seed, and that model is the reference. Stored in f32 in svsk's own format.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from convert.names import source_names, undo_permutation
from svsk_jax import ModelSource, convert, open_model
from svsk_jax.demo_model import cache_folder, smollm2_gguf
from svsk_jax.model.parameters import QUANTIZED_LINEARS
from svsk_jax.storage.checkpoint import is_saved_model

SEED = 20261124
Q4_1_BLOCK, Q4_1_BYTES = 32, 20


def q4_1_steps(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Step of the grid that each weight lies on, f32 [N, K] in the file's row order.

    A Q4_1 block is an f16 step, an f16 minimum and 32 codes.
    """
    if tensor.tensor_type != gguf.GGMLQuantizationType.Q4_1:
        raise ValueError(f"{tensor.name}: expected type Q4_1, found {tensor.tensor_type.name}")
    blocks = np.asarray(tensor.data).reshape(-1, Q4_1_BYTES)
    steps = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return np.repeat(steps, Q4_1_BLOCK, axis=1).reshape([int(size) for size in tensor.shape[::-1]])


class Dithered:
    """A `ModelSource` that adds the noise to another's decoder linears as they are read."""

    def __init__(self, path: Path):
        self._source = open_model(str(path))
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._names = source_names(self._source.config, "gguf")
        self.description = f"{self._source.description}, dithered with seed {SEED}"
        self.config = self._source.config
        self.hf_config = self._source.hf_config
        self.generation_config = self._source.generation_config

    def outer(self, dtype: Any) -> dict[str, Any]:
        """As they are."""
        return self._source.outer(dtype)

    def layer(self, index: int, dtype: Any) -> dict[str, Any]:
        """A layer, its linears dithered."""
        parameters = self._source.layer(index, np.float32)
        for linear in QUANTIZED_LINEARS:
            name = self._names[f"layers.{index}.{linear}.weight"]
            digest = hashlib.sha256(f"{SEED} {name.gguf}".encode()).digest()
            noise = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            step = q4_1_steps(self._tensors[name.gguf])
            added = step * noise.uniform(-0.5, 0.5, step.shape).astype(np.float32)
            if name.heads is not None:
                added = undo_permutation(added, getattr(self.config, name.heads))
            parameters[f"{linear}.weight"] = parameters[f"{linear}.weight"] + added
        return {path: value.astype(dtype) for path, value in parameters.items()}

    def tokenizer(self) -> Any:
        """The model's."""
        return self._source.tokenizer()

    def fingerprint(self) -> str:
        """Of the source and the seed."""
        return hashlib.sha256(f"{SEED} {self._source.fingerprint()}".encode()).hexdigest()

    def local_path(self) -> Path:
        """The undithered file."""
        return self._source.local_path()


def dithered_smollm2(folder: Path | None = None) -> ModelSource:
    """The reference, made on first use in `folder` (default: the cache)."""
    folder = cache_folder() / "SmolLM2-135M-dithered" if folder is None else folder
    if not is_saved_model(folder):
        convert(Dithered(smollm2_gguf()), folder, dtype=np.float32)
    return open_model(str(folder))


if __name__ == "__main__":
    print(dithered_smollm2(Path(sys.argv[1]) if len(sys.argv) > 1 else None).local_path())
