"""Residual streams off the devices, in the host's memory or, past a limit, on disk: those that the Fisher
pass walks back through, and all of them where they do not fit the devices."""

import tempfile
from collections.abc import Hashable
from pathlib import Path

import numpy as np

SPILL = ".block-inputs-"
"""How the names of temporary folders begin."""


class BlockInputs:
    """Host copies of batches of residual streams, all of one shape. A context manager: what went to disk is
    removed at its end.

    Args:
        memory: bytes kept in memory; batches that come while it is full go to a temporary folder.
        folder: where to make that folder; None for the system's place.
    """

    def __init__(self, memory: int, folder: Path | None = None):
        self._left, self._folder = memory, folder
        self._held: dict[tuple[Hashable, int], np.ndarray | Path] = {}
        self._files = 0
        self._spill: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "BlockInputs":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._spill is not None:
            self._spill.cleanup()

    def put(self, what: Hashable, batch: int, value: np.ndarray) -> None:
        """Keep one batch of a layer's input, or of whatever else `what` names."""
        if value.nbytes <= self._left:
            self._left -= value.nbytes
            self._held[what, batch] = value
            return
        if self._spill is None:
            self._spill = tempfile.TemporaryDirectory(prefix=SPILL, dir=self._folder)
        path = Path(self._spill.name) / f"{self._files}.bin"
        self._files += 1
        value.tofile(path)
        self._held[what, batch] = path
        # All batches are alike; numpy's own file format does not know bfloat16.
        self._like = value.shape, value.dtype

    def get(self, what: Hashable, batch: int) -> np.ndarray:
        """One batch, which stays."""
        value = self._held[what, batch]
        if isinstance(value, Path):
            shape, dtype = self._like
            return np.fromfile(value, dtype).reshape(shape)
        return value

    def pop(self, what: Hashable, batch: int) -> np.ndarray:
        """Take one batch out."""
        found = self.get(what, batch)
        value = self._held.pop((what, batch))
        if isinstance(value, Path):
            value.unlink()
        else:
            self._left += value.nbytes
        return found
