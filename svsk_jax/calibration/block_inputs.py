"""The residual streams that the Fisher pass walks back through, in memory or, past a limit, on disk."""

import tempfile
from pathlib import Path

import numpy as np


class BlockInputs:
    """Host copies of each layer's input batches. A context manager: what went to disk is removed at its end.

    Args:
        memory: bytes kept in memory; batches beyond go to a temporary folder.
        folder: where to make that folder; None for the system's place.
    """

    def __init__(self, memory: int, folder: Path | None = None):
        self._left, self._folder = memory, folder
        self._held: dict[tuple[int, int], np.ndarray | Path] = {}
        self._spill: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "BlockInputs":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._spill is not None:
            self._spill.cleanup()

    def put(self, layer: int, batch: int, value: np.ndarray) -> None:
        """Keep one batch of a layer's input."""
        if value.nbytes <= self._left:
            self._left -= value.nbytes
            self._held[layer, batch] = value
            return
        if self._spill is None:
            self._spill = tempfile.TemporaryDirectory(prefix=".block-inputs-", dir=self._folder)
        path = Path(self._spill.name) / f"{layer}-{batch}.bin"
        value.tofile(path)
        self._held[layer, batch] = path
        # All batches are alike; numpy's own file format does not know bfloat16.
        self._like = value.shape, value.dtype

    def pop(self, layer: int, batch: int) -> np.ndarray:
        """Take one batch out."""
        value = self._held.pop((layer, batch))
        if isinstance(value, Path):
            shape, dtype = self._like
            path, value = value, np.fromfile(value, dtype).reshape(shape)
            path.unlink()
        return value
