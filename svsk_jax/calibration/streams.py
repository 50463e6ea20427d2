"""The residual streams, or gradients of their shape, that a walk carries from layer to layer."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from svsk_jax.calibration.block_inputs import BlockInputs
from svsk_jax.parallel.placement import from_local_rows, local_rows


class Streams:
    """An array [B, T, hidden] for each batch: on the devices, or in a store and there only while it is worked
    on. The numbers are the same either way.

    Args:
        name: what they are called in the store.
        sharding: how each is divided.
        store: where they lie between uses; None leaves them on the devices.
    """

    def __init__(self, name: str, sharding: NamedSharding, store: BlockInputs | None = None):
        self._name, self._sharding, self._store = name, sharding, store
        self._here: dict[int, jax.Array] = {}
        self._away: set[int] = set()

    def put(self, batch: int, value: jax.Array) -> None:
        """Keep the array of a batch. The newest stays on the devices, whose work on it is not waited for."""
        if self._store is not None:
            for earlier in list(self._here):
                self._store.put(self._name, earlier, local_rows(self._here.pop(earlier)))
                self._away.add(earlier)
        self._here[batch] = value

    def take(self, batch: int) -> jax.Array:
        """The array of a batch, which is then no longer kept."""
        if batch in self._here:
            return self._here.pop(batch)
        assert self._store is not None
        self._away.remove(batch)
        return from_local_rows(self._store.pop(self._name, batch), self._sharding)

    def _batches(self) -> list[int]:
        return sorted(self._here.keys() | self._away)

    def rows(self) -> Iterator[np.ndarray]:
        """This process's rows of each batch, in order, on the host; they stay."""
        for batch in self._batches():
            if batch in self._here:
                yield local_rows(self._here[batch])
            else:
                assert self._store is not None
                yield self._store.get(self._name, batch)

    def restore(self, rows: Iterable[np.ndarray]) -> None:
        """Keep what `rows` gave, in place of what is kept."""
        for batch in self._batches():
            self.take(batch)
        for batch, value in enumerate(rows):
            self.put(batch, from_local_rows(value, self._sharding))
