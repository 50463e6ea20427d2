"""The two walks over a model: forwards for second moments, backwards for sensitivities, a layer at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from svsk_jax.calibration.block_inputs import BlockInputs
from svsk_jax.calibration.experts import OUTPUTS
from svsk_jax.calibration.sensitivity import (
    TOKENS,
    Sensitivities,
    add_up_blocks,
    head_gradient,
    layer_sensitivity,
    no_blocks,
    token_weights,
    weighted_moments,
)
from svsk_jax.calibration.statistics import (
    Moments,
    add_up,
    embed_batches,
    layer_moments,
    masks,
    no_moments,
)
from svsk_jax.model.decoder import Decoder, DecoderLayer
from svsk_jax.model.source import ModelSource
from svsk_jax.parallel import make_mesh, sharding
from svsk_jax.parallel.placement import from_local_rows, local_rows, one_copy, put
from svsk_jax.parallel.read_ahead import ReadAhead
from svsk_jax.quant.types import OutputSensitivity


class Walk:
    """Batches of residual streams on their way through a model's layers.

    Args:
        source: the unquantized model.
        outer: its parameters outside the layers.
        ids: chunks of tokens, int32 [chunks, length].
        batch_tokens: tokens that one device takes at once.
        dtype: of the activations.
        mesh: `data` × `model` devices; default all, along `data`. Every process of it walks along.
    """

    def __init__(
        self,
        source: ModelSource,
        outer: dict[str, Any],
        ids: np.ndarray,
        batch_tokens: int,
        dtype: DTypeLike,
        mesh: Mesh | None = None,
    ):
        self.source, self.outer, self.dtype = source, outer, dtype
        self.mesh = make_mesh() if mesh is None else mesh
        embedding = np.asarray(outer["embedding.weight"]).astype(jnp.dtype(dtype))
        self.streams, self.masks = embed_batches(embedding, ids, batch_tokens, self.mesh)
        self.batch_chunks = len(self.masks[0])
        self.chunks, self.length = ids.shape
        self.kept_chunks = 0
        """Chunks that `backwards` goes on with."""

    def _layers(self, indices: Sequence[int]) -> Iterator[tuple[int, DecoderLayer]]:
        """Each layer on all devices; the next one is read meanwhile."""
        with ReadAhead(lambda index: self.source.layer(index, self.dtype), indices) as ahead:
            for index in indices:
                parameters = {path: jnp.asarray(value) for path, value in ahead.take(index).items()}
                layer = DecoderLayer(self.source.config, parameters)
                yield index, put(layer, sharding(self.mesh))

    @property
    def _kept_batches(self) -> int:
        return -(-self.kept_chunks // self.batch_chunks)

    def forwards(
        self, full: bool, keep: BlockInputs | None = None, keep_chunks: int = 0
    ) -> Iterator[tuple[int, Moments]]:
        """(index, moments) of each layer, which may still be being computed; the streams end up after the
        last one.

        Args:
            full: whole second moments rather than their diagonals.
            keep: where to put the layers' inputs for `backwards`.
            keep_chunks: for how many chunks.
        """
        if keep is not None:
            self.kept_chunks = min(keep_chunks, self.chunks)
        last = None
        for index, layer in self._layers(range(self.source.config.num_layers)):
            sums = no_moments(layer, self.streams[0], self.masks[0], self.mesh, full)
            for batch, mask in enumerate(self.masks):
                if keep is not None and batch < self._kept_batches:
                    keep.put(index, batch, local_rows(self.streams[batch]))
                self.streams[batch], sums = layer_moments(
                    layer, self.streams[batch], mask, sums, self.mesh, full
                )
            moments = add_up(sums, self.mesh, full)
            last = _wait_for(last, moments)
            yield index, moments

    def backwards(self, kept: BlockInputs, seed: int) -> Iterator[tuple[int, Sensitivities, Moments]]:
        """(index, sensitivities, weighted moments) of each layer, from the last to the first; they may still
        be being computed.

        Args:
            kept: the layers' inputs that `forwards` put there.
            seed: of the labels sampled at the head.
        """
        chunks = sharding(self.mesh, "chunks")
        tail = put(_tail(self.source, self.outer, self.dtype), sharding(self.mesh))
        counted = masks(self.kept_chunks, self.batch_chunks, self.mesh)
        upstream = [
            head_gradient(tail, self.streams[batch], mask, seed, batch * self.batch_chunks, self.mesh)
            for batch, mask in enumerate(counted)
        ]
        del tail
        last = None
        for index, layer in self._layers(range(self.source.config.num_layers)[::-1]):
            inputs = [kept.pop(index, batch) for batch in range(len(counted))]
            blocks = no_blocks(layer, self.streams[0], self.mesh)
            weights = []
            for batch, x in enumerate(inputs):
                upstream[batch], blocks, found = layer_sensitivity(
                    layer, from_local_rows(x, chunks), upstream[batch], blocks, self.mesh
                )
                weights.append(one_copy(found))
            sensitivities = self._sensitivities(one_copy(add_up_blocks(blocks, self.mesh)), weights)
            by_token = token_weights(sensitivities)
            sums = no_moments(layer, self.streams[0], self.masks[0], self.mesh, True)
            for batch, x in enumerate(inputs):
                part = {name: put(self._batch(value, batch), chunks) for name, value in by_token.items()}
                sums = weighted_moments(layer, from_local_rows(x, chunks), part, sums, self.mesh)
            moments = add_up(sums, self.mesh, True)
            last = _wait_for(last, moments)
            yield index, sensitivities, moments

    def _sensitivities(
        self, blocks: dict[str, jax.Array], weights: list[dict[str, jax.Array]]
    ) -> Sensitivities:
        tokens = jnp.int32(self.kept_chunks * self.length)
        return {
            name: OutputSensitivity(
                blocks=blocks[name],
                weights=jnp.concatenate([batch[name] for batch in weights])[: self.kept_chunks],
                tokens=blocks[f"{name}{TOKENS}"] if name in OUTPUTS else tokens,
            )
            for name in weights[0]
        }

    def _batch(self, by_chunk: jax.Array, batch: int) -> jax.Array:
        """One batch's rows, zeros for its padding."""
        start = batch * self.batch_chunks
        rows = by_chunk[start : start + self.batch_chunks]
        missing = self.batch_chunks - len(rows)
        return jnp.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1)))


def _wait_for(last: Any, moments: Moments) -> Any:
    """Wait for the last layer, so that no more than two are in memory; what to wait for next time."""
    jax.block_until_ready(last)
    return [moment.tokens for moment in moments.values()]


def _tail(source: ModelSource, outer: dict[str, Any], dtype: DTypeLike) -> Decoder:
    """A decoder without layers: what is left is final norm and head."""
    parameters = {path: jnp.asarray(value).astype(jnp.dtype(dtype)) for path, value in outer.items()}
    return Decoder(source.config, parameters, dtype, num_layers=0)
