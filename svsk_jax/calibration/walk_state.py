"""How far a walk over a model's layers has come, and its residual streams or gradients there, on disk: from
there it goes on as if it had not been cut short.

The state is written at most as often as keeps this to a tenth of the time: where a layer takes a second,
writing what lies between two layers may take as long. Each process writes its own rows; a state counts once
those of all are there.
"""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from svsk_jax.calibration.streams import Streams
from svsk_jax.parallel.distributed import agree, barrier
from svsk_jax.storage.durable import durable_file

SHARE = 0.1
"""Of the time, that writing states may take."""
DIGEST_BYTES = hashlib.sha256().digest_size
BLOCK = 1 << 24


class Place(NamedTuple):
    """Where a walk is: `streams` before layer number `layer` on its way forwards, or `gradients` there on its
    way back."""

    kind: Literal["streams", "gradients"]
    layer: int


START = Place("streams", 0)


class WalkState:
    """The newest state of a walk, in a folder.

    Args:
        folder: all processes see it.
        process: this one's number.
        processes: how many there are.
    """

    def __init__(self, folder: Path, process: int = 0, processes: int = 1):
        self.folder, self._process, self._processes = folder, process, processes
        self._ended, self._took = -np.inf, 0.0

    def _file(self, place: Place, process: int) -> Path:
        return self.folder / f"{place.kind}-{place.layer:05d}.{process}.bin"

    def place(self) -> Place:
        """How far the walk has come."""
        found = {Place("streams", 0)}
        for path in self.folder.glob("*-*.0.bin"):
            kind, _, rest = path.name.partition("-")
            place = Place("gradients" if kind == "gradients" else "streams", int(rest.split(".")[0]))
            if all(self._file(place, process).is_file() for process in range(self._processes)):
                found.add(place)
        # Back comes after forwards, and there the lowest layer last.
        return max(
            found, key=lambda at: (at.kind == "gradients", -at.layer if at.kind == "gradients" else at.layer)
        )

    @property
    def is_due(self) -> bool:
        """Whether enough time has gone by for a new one."""
        return agree(lambda: bool(SHARE * (time.monotonic() - self._ended) >= self._took))

    def write(self, place: Place, streams: Streams) -> None:
        """Put a state in place of the one before; a batch at a time is in memory."""
        begun, digest = time.monotonic(), hashlib.sha256()
        with durable_file(self._file(place, self._process)) as partial, partial.open("wb") as file:
            for rows in streams.rows():
                data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
                digest.update(data)
                file.write(data)
            file.write(digest.digest())
        barrier()
        for path in self.folder.glob(f"*-*.{self._process}.bin"):
            if path != self._file(place, self._process):
                path.unlink()
        self._ended = time.monotonic()
        self._took = self._ended - begun

    def read(self, place: Place, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[np.ndarray]:
        """This process's rows of each batch, all of one shape.

        Raises:
            ValueError: damaged.
        """
        path = self._file(place, self._process)
        size = path.stat().st_size - DIGEST_BYTES
        count, rest = divmod(size, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        if rest or count < 1 or not _is_whole(path, size):
            raise ValueError(
                f"{path}: damaged, so that calibration cannot go on from there; remove this file, to go on "
                "from the start"
            )
        with path.open("rb") as file:
            for _ in range(count):
                yield np.fromfile(file, dtype, int(np.prod(shape))).reshape(shape)


def _is_whole(path: Path, size: int) -> bool:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, size, BLOCK):
            digest.update(file.read(min(BLOCK, size - start)))
        return file.read() == digest.digest()
