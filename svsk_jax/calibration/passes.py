"""The two walks over a model: forwards for second moments, backwards for sensitivities, a layer at a time."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from svsk_jax.calibration.block_inputs import BlockInputs
from svsk_jax.calibration.sensitivity import (
    Sensitivities,
    head_gradient,
    layer_sensitivity,
    token_weights,
    weighted_moments,
)
from svsk_jax.calibration.statistics import Moments, data_mesh, embed_batches, layer_moments
from svsk_jax.model.decoder import Decoder, DecoderLayer
from svsk_jax.model.source import ModelSource


class Walk:
    """Batches of residual streams on their way through a model's layers.

    Args:
        source: the unquantized model.
        outer: its parameters outside the layers.
        ids: chunks of tokens, int32 [chunks, length].
        batch_tokens: tokens that one device takes at once.
        dtype: of the activations.
    """

    def __init__(
        self,
        source: ModelSource,
        outer: dict[str, Any],
        ids: np.ndarray,
        batch_tokens: int,
        dtype: DTypeLike,
    ):
        self.source, self.outer, self.dtype = source, outer, dtype
        self.mesh: Mesh = data_mesh()
        embedding = np.asarray(outer["embedding.weight"]).astype(jnp.dtype(dtype))
        self.streams, self.masks = embed_batches(embedding, ids, batch_tokens, self.mesh)
        self.batch_chunks = len(self.masks[0])
        self.kept = 0
        self.chunks = len(ids)

    @property
    def kept_chunks(self) -> int:
        """Chunks whose layer inputs `forwards` put aside."""
        return min(self.kept * self.batch_chunks, self.chunks)

    def _replicated(self, module: Any) -> Any:
        return jax.device_put(module, NamedSharding(self.mesh, P()))

    def _layer(self, index: int) -> DecoderLayer:
        parameters = self.source.layer(index, self.dtype)
        layer = DecoderLayer(
            self.source.config, {path: jnp.asarray(value) for path, value in parameters.items()}
        )
        return self._replicated(layer)

    def _on_one_device(self, tree: Any) -> Any:
        # What is computed from a replicated array would be computed once for each device.
        return jax.device_put(tree, self.mesh.devices.flat[0])

    def forwards(
        self, full: bool, keep: BlockInputs | None = None, keep_chunks: int = 0
    ) -> Iterator[tuple[int, Moments]]:
        """(index, moments) of each layer; the streams end up after the last one.

        Args:
            full: whole second moments rather than their diagonals.
            keep: where to put the layers' inputs for `backwards`.
            keep_chunks: how many chunks of them, rounded up to whole batches.
        """
        if keep is not None:
            self.kept = min(-(-keep_chunks // self.batch_chunks), len(self.masks))
        for index in range(self.source.config.num_layers):
            layer = self._layer(index)
            total: Moments | None = None
            for batch, mask in enumerate(self.masks):
                if keep is not None and batch < self.kept:
                    keep.put(index, batch, self.streams[batch])
                self.streams[batch], moments = layer_moments(
                    layer, self.streams[batch], mask, self.mesh, full
                )
                total = moments if total is None else {name: total[name] + moments[name] for name in moments}
            assert total is not None
            yield index, jax.block_until_ready(self._on_one_device(total))

    def backwards(self, kept: BlockInputs, seed: int) -> Iterator[tuple[int, Sensitivities, Moments]]:
        """(index, sensitivities, weighted moments) of each layer, from the last to the first.

        Args:
            kept: the layers' inputs that `forwards` put there.
            seed: of the labels sampled at the head.
        """
        sharding = NamedSharding(self.mesh, P("data"))
        tail = self._replicated(_tail(self.source, self.outer, self.dtype))
        keys = jax.random.split(jax.random.key(seed), self.kept)
        upstream = [
            head_gradient(tail, self.streams[batch], self.masks[batch], keys[batch], self.mesh)
            for batch in range(self.kept)
        ]
        del tail
        for index in reversed(range(self.source.config.num_layers)):
            layer = self._layer(index)
            inputs = [kept.pop(index, batch) for batch in range(self.kept)]
            total: Sensitivities | None = None
            for batch, x in enumerate(inputs):
                placed = jax.device_put(x, sharding)
                upstream[batch], found = layer_sensitivity(
                    layer, placed, upstream[batch], self.masks[batch], self.mesh
                )
                # Sums over arrays that lie on several devices would each wait for all of them.
                found = self._on_one_device(found)
                total = found if total is None else {name: total[name] + found[name] for name in found}
            assert total is not None
            weights = token_weights(total)
            moments: Moments | None = None
            for batch, x in enumerate(inputs):
                rows = slice(batch * self.batch_chunks, (batch + 1) * self.batch_chunks)
                part = {name: jax.device_put(value[rows], sharding) for name, value in weights.items()}
                found = weighted_moments(layer, jax.device_put(x, sharding), part, self.mesh)
                moments = found if moments is None else {name: moments[name] + found[name] for name in found}
            assert moments is not None
            yield index, *jax.block_until_ready(self._on_one_device((total, moments)))


def _tail(source: ModelSource, outer: dict[str, Any], dtype: DTypeLike) -> Decoder:
    """A decoder without layers: what is left is final norm and head."""
    parameters = {path: jnp.asarray(value).astype(jnp.dtype(dtype)) for path, value in outer.items()}
    return Decoder(source.config, parameters, dtype, num_layers=0)
