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
    MomentSums,
    StoredMoments,
    add_up,
    embed_batches,
    head_moments,
    layer_moments,
    masks,
    no_moments,
    to_store,
)
from svsk_jax.calibration.streams import Streams
from svsk_jax.model.decoder import DecoderLayer, Tail
from svsk_jax.model.norm import RMSNorm
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
        store: where streams lie between layers; None leaves them on the devices.
    """

    def __init__(
        self,
        source: ModelSource,
        outer: dict[str, Any],
        ids: np.ndarray,
        batch_tokens: int,
        dtype: DTypeLike,
        mesh: Mesh | None = None,
        store: BlockInputs | None = None,
    ):
        self.source, self.dtype = source, dtype
        self.mesh = make_mesh() if mesh is None else mesh
        embedding = np.asarray(outer["embedding.weight"]).astype(jnp.dtype(dtype), copy=False)
        norm = RMSNorm(jnp.asarray(outer["final_norm.scale"]), source.config.rms_norm_eps)
        self._final_norm = put(norm, sharding(self.mesh))
        self._place = sharding(self.mesh, "chunks")
        self.streams = Streams("streams", self._place, store)
        self.masks = []
        for batch, (rows, mask) in enumerate(embed_batches(embedding, ids, batch_tokens, self.mesh)):
            self.streams.put(batch, rows)
            self.masks.append(mask)
        self.batch_chunks = len(self.masks[0])
        self.chunks, self.length = ids.shape
        self.kept_chunks = 0
        """Chunks that `backwards` goes on with."""
        self.gradients = Streams("gradients", self._place, store)
        """Of these, on the way back."""

    def _layers(self, indices: Sequence[int]) -> Iterator[tuple[int, DecoderLayer]]:
        """Each layer on all devices; the next one is read meanwhile."""
        with ReadAhead(lambda index: self.source.layer(index, self.dtype), indices) as ahead:
            for index in indices:
                parameters = jax.device_put(dict(ahead.take(index)))
                layer = put(DecoderLayer(self.source.config, parameters), sharding(self.mesh))
                del parameters
                yield index, layer
                del layer

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Of this process's rows of a batch of streams or gradients."""
        here = self.batch_chunks // jax.process_count()
        return here, self.length, self.source.config.hidden_size

    @property
    def _num_layers(self) -> int:
        return self.source.config.num_layers

    @property
    def _kept_batches(self) -> int:
        return -(-self.kept_chunks // self.batch_chunks)

    def forwards(
        self, full: bool, keep: BlockInputs | None = None, keep_chunks: int = 0, first: int = 0
    ) -> Iterator[tuple[int, StoredMoments]]:
        """(index, moments) of each layer, as of `to_store`; they may still be being computed. `streams` are
        those after the layer, and end up after the last one.

        Args:
            full: whole second moments rather than their diagonals.
            keep: where to put the layers' inputs for `backwards`.
            keep_chunks: for how many chunks.
            first: the layer that `streams` are before.
        """
        if keep is not None:
            self.kept_chunks = min(keep_chunks, self.chunks)
        last = None
        for index, sums in self._forwards(range(first, self._num_layers), self.masks, full, keep):
            moments = add_up(sums, self.mesh, full)
            del sums
            last = _wait_for(last, moments)
            moments = to_store(moments, full)
            yield index, moments

    def replay(self, layers: int, full: bool, keep: BlockInputs, keep_chunks: int) -> Iterator[int]:
        """The index of each of the first `layers` layers, whose inputs are put into `keep` as by `forwards`
        and by the same functions: others might round otherwise. `streams`, which are those before the first
        layer, are used up."""
        self.kept_chunks = min(keep_chunks, self.chunks)
        last = None
        kept = self.masks[: self._kept_batches]
        for index, sums in self._forwards(range(layers), kept, full, keep):
            last = _wait_for(last, sums)
            del sums
            yield index
        self.streams.restore(())

    def _forwards(
        self, layers: Sequence[int], masks: Sequence[jax.Array], full: bool, keep: BlockInputs | None
    ) -> Iterator[tuple[int, MomentSums]]:
        for index, layer in self._layers(layers):
            sums = None
            for batch, mask in enumerate(masks):
                x = self.streams.take(batch)
                if sums is None:
                    sums = no_moments(layer, x, mask, self.mesh, full)
                if keep is not None and batch < self._kept_batches:
                    keep.put(index, batch, local_rows(x))
                y, sums = layer_moments(layer, x, mask, sums, self.mesh, full)
                self.streams.put(batch, y)
            assert sums is not None
            yield index, sums

    def head(self, full: bool) -> StoredMoments:
        """The moment of what the head reads of `streams`, which are those after the last layer and stay; as
        of `to_store`.

        Args:
            full: the whole second moment rather than its diagonal.
        """
        sums = None
        for batch, mask in enumerate(self.masks):
            x = self.streams.take(batch)
            sums = head_moments(self._final_norm, x, mask, sums, self.mesh, full)
            self.streams.put(batch, x)
        assert sums is not None
        return to_store(add_up(sums, self.mesh, full), full)

    def start_backwards(self, seed: int) -> None:
        """Make `gradients` after the last layer of `streams`, which are used up.

        Args:
            seed: of the labels sampled at the head.
        """
        tail = put(_tail(self.source, self.dtype), sharding(self.mesh))
        counted = masks(self.kept_chunks, self.batch_chunks, self.mesh)
        for batch in range(len(self.masks)):
            x = self.streams.take(batch)
            if batch < len(counted):
                first = batch * self.batch_chunks
                self.gradients.put(batch, head_gradient(tail, x, counted[batch], seed, first, self.mesh))

    def backwards(self, kept: BlockInputs, layers: int) -> Iterator[tuple[int, Sensitivities, StoredMoments]]:
        """(index, sensitivities, weighted moments as of `to_store`) of each of the first `layers` layers, the
        last one first; they may still be being computed. `gradients`, which are those behind these layers, go
        along.

        Args:
            kept: the layers' inputs that `forwards` or `replay` put there.
            layers: how many are left.
        """
        upstream, batches = self.gradients, range(self._kept_batches)
        last = None
        for index, layer in self._layers(range(layers)[::-1]):
            blocks = sums = None
            weights = []
            for batch in batches:
                x = from_local_rows(kept.get(index, batch), self._place)
                if blocks is None:
                    blocks = no_blocks(layer, x, self.mesh)
                below, blocks, found = layer_sensitivity(layer, x, upstream.take(batch), blocks, self.mesh)
                upstream.put(batch, below)
                weights.append(one_copy(found))
            assert blocks is not None
            sensitivities = self._sensitivities(one_copy(add_up_blocks(blocks, self.mesh)), weights)
            by_token = token_weights(sensitivities)
            del blocks
            for batch in batches:
                x = from_local_rows(kept.pop(index, batch), self._place)
                if sums is None:
                    sums = no_moments(layer, x, self.masks[0], self.mesh, True)
                part = {name: put(self._batch(value, batch), self._place) for name, value in by_token.items()}
                sums = weighted_moments(layer, x, part, sums, self.mesh)
            assert sums is not None
            moments = add_up(sums, self.mesh, True)
            del sums
            last = _wait_for(last, moments)
            moments = to_store(moments, True)
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


def _wait_for(last: Any, moments: Moments | MomentSums) -> Any:
    """Wait for the last layer, so that no more than two are in memory; what to wait for next time."""
    jax.block_until_ready(last)
    return [moment.tokens for moment in moments.values()]


def _tail(source: ModelSource, dtype: DTypeLike) -> Tail:
    """Final norm and head. Read here, so that nothing holds them while layers are walked."""
    parameters = source.outer(dtype)
    if not source.config.tie_word_embeddings:
        del parameters["embedding.weight"]
    return Tail(source.config, jax.device_put(parameters))
