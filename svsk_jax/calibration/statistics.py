"""Second moments of the linears' inputs, one decoder layer at a time, over a mesh of devices.

Chunks are divided over all devices of the mesh. For the moments the devices of a `model` group exchange what
they saw, and each adds up its own block of rows of Σ x xᵀ. The sums stay where they are until a layer's last
batch, and are then added up over `data`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float32

from svsk_jax.calibration.experts import INPUTS, PLACES, Routed
from svsk_jax.model.decoder import DecoderLayer
from svsk_jax.model.norm import RMSNorm
from svsk_jax.model.parameters import HEAD_INPUT, LINEAR_INPUTS
from svsk_jax.parallel import MODEL, sharding
from svsk_jax.parallel.distributed import is_lead
from svsk_jax.parallel.placement import put, readable
from svsk_jax.quant.half_moment import StoredMoment, halved
from svsk_jax.quant.types import InputMoment

Moments = dict[str, InputMoment]
"""The moment of each activation that linears read, by name (`parameters.linear_inputs`; of experts while a
layer is walked, see `calibration.experts`)."""

StoredMoments = Mapping[str, StoredMoment]
"""By name, as `Moments`."""

MomentSums = dict[str, InputMoment]
"""Moments that are still to be added up: `total` [data, rows, K], rows padded to a multiple of `model`, or of
diagonals [data, model, K]; `tokens` [data, model]. Of experts each device has its own chunks', [data, model,
experts, …]. Divided over both axes of the mesh."""


def device_moment(
    x: Float[Array, "b t k"], weights: Float32[Array, "b t"], full: bool, model: int, is_mask: bool = False
) -> InputMoment:
    """What one device adds to Σ w x xᵀ, or to its diagonal, within `shard_map` over a mesh with `model`
    devices in a group: its rows for its group's chunks, [1, rows, K], or the whole diagonal for its own
    chunks, [1, 1, K]. `tokens` [1, 1] counts its own tokens of non-zero weight.

    Weights of 0 and 1 (`is_mask`) leave x exact in bf16 and f16, as are the products of two such numbers in
    f32: then the sums are products of tensor cores.
    """
    tokens = jnp.sum(weights > 0, dtype=jnp.int32)[None, None]
    if full and model > 1:
        x, weights = (jax.lax.all_gather(each, MODEL, tiled=True) for each in (x, weights))
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if is_mask and full else rows.astype(jnp.float32)
    weighted = rows * weights.reshape(-1, 1).astype(rows.dtype)
    if not full:
        return InputMoment(total=jnp.sum(weighted * rows, axis=0)[None, None], tokens=tokens)
    if model > 1:
        height = -(-rows.shape[1] // model)
        padded = jnp.pad(weighted, ((0, 0), (0, height * model - rows.shape[1])))
        weighted = jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(MODEL) * height, height, axis=1)
    total = jnp.matmul(
        weighted.T, rows, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return InputMoment(total=total[None], tokens=tokens)


def own(sums: Any) -> Any:
    """What one device has of sums of its own chunks, within `shard_map`: two axes in front."""
    return jax.tree.map(lambda each: each[None, None], sums)


def partial_sums(mesh: Mesh) -> NamedSharding:
    """How sums are divided that each device makes of its own chunks or rows, in their first two axes."""
    return sharding(mesh, "group_sums", "moment_rows")


def _measured(
    layer: DecoderLayer, x: jax.Array, mask: jax.Array, mesh: Mesh, full: bool
) -> tuple[jax.Array, MomentSums]:
    def local(layer, x, mask):
        seen: MomentSums = {}
        inputs, places = set(LINEAR_INPUTS.values()), {}
        weights = jnp.broadcast_to(mask[:, None], x.shape[:2])

        def tap(name: str, value: jax.Array) -> jax.Array:
            if name in inputs:
                seen[name] = device_moment(value, weights, full, mesh.shape[MODEL], is_mask=True)
            elif name in PLACES:
                places[name] = value
            elif name in INPUTS:
                routed = Routed(layer, places)
                seen[name] = own(routed.moments(value, routed.rows_of_chunks(mask, x.shape[1]), full))
            return value

        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        y, _ = layer(x, positions, tap=tap)
        return y, seen

    whole, chunks = sharding(mesh).spec, sharding(mesh, "chunks").spec
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, chunks, chunks),
        out_specs=(chunks, partial_sums(mesh).spec),
        check_vma=False,
    )(layer, x, mask)


@partial(jax.jit, static_argnames=("mesh", "full"))
def no_moments(
    layer: DecoderLayer, x: Float[Array, "b t d"], mask: Float32[Array, "b"], mesh: Mesh, full: bool
) -> MomentSums:
    """The sums before a layer's first batch; arguments as of `layer_moments`."""
    # Only shapes are taken from it, and XLA drops what nobody reads.
    _, like = _measured(layer, x, mask, mesh, full)
    return no_sums(like, mesh)


def no_sums(like: Any, mesh: Mesh) -> Any:
    """Zeros of these shapes, divided like `partial_sums`; within jit."""
    zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), like)
    return jax.lax.with_sharding_constraint(zeros, partial_sums(mesh))


@partial(jax.jit, static_argnames=("mesh", "full"), donate_argnames=("x", "sums"))
def layer_moments(
    layer: DecoderLayer,
    x: Float[Array, "b t d"],
    mask: Float32[Array, "b"],
    sums: MomentSums,
    mesh: Mesh,
    full: bool,
) -> tuple[Float[Array, "b t d"], MomentSums]:
    """Run one layer on a batch of residual streams and measure what its linears read.

    Args:
        layer: the unquantized layer, replicated over the mesh.
        x: residual stream [B, T, hidden] before the layer, B divided over all devices of the mesh.
        mask: 1 for a chunk that counts, 0 for padding, [B].
        sums: what earlier batches gave; first `no_moments`.
        mesh: `data` × `model` devices.
        full: keep [K, K] matrices rather than diagonals.

    Returns:
        The stream after the layer, divided like x, and the sums with this batch's share, f32. Each activation
        that several linears share is measured once.
    """
    y, found = _measured(layer, x, mask, mesh, full)
    return y, jax.tree.map(jnp.add, sums, found)


@partial(jax.jit, static_argnames=("mesh", "full"), donate_argnames="sums")
def head_moments(
    norm: RMSNorm,
    x: Float[Array, "b t d"],
    mask: Float32[Array, "b"],
    sums: MomentSums | None,
    mesh: Mesh,
    full: bool,
) -> MomentSums:
    """What earlier batches gave, first None, and what the head reads of a batch; arguments as of
    `layer_moments`.

    Args:
        norm: the final one.
        x: residual stream after the last layer.
    """

    def local(norm, x, mask):
        weights = jnp.broadcast_to(mask[:, None], x.shape[:2])
        return {HEAD_INPUT: device_moment(norm(x), weights, full, mesh.shape[MODEL], is_mask=True)}

    whole, chunks = sharding(mesh).spec, sharding(mesh, "chunks").spec
    found = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, chunks, chunks),
        out_specs=partial_sums(mesh).spec,
        check_vma=False,
    )(norm, x, mask)
    return found if sums is None else jax.tree.map(jnp.add, sums, found)


@partial(jax.jit, static_argnames=("mesh", "full"))
def add_up(sums: MomentSums, mesh: Mesh, full: bool) -> Moments:
    """The moments of all batches: rows of full ones divided over all devices where they divide, else over
    `model`; the rest, and those of experts, replicated."""

    def total(name: str, each: InputMoment) -> InputMoment:
        if name in INPUTS:
            summed = jax.tree.map(lambda value: jnp.sum(value, axis=(0, 1)), each)
            return jax.lax.with_sharding_constraint(summed, sharding(mesh))
        value = jnp.sum(each.total, axis=0)
        value = value[: value.shape[1]] if full else jnp.sum(value, axis=0)
        place = sharding(mesh)
        for axis, devices in (("moment_rows", mesh.shape[MODEL]), ("summed_rows", mesh.size)):
            if full and len(value) % devices == 0:
                place = sharding(mesh, axis, None)
        return InputMoment(
            total=jax.lax.with_sharding_constraint(value, place),
            tokens=jax.lax.with_sharding_constraint(jnp.sum(each.tokens), sharding(mesh)),
        )

    return {name: total(name, each) for name, each in sums.items()}


def to_store(moments: Moments, full: bool) -> StoredMoments:
    """Moments in the form in which they are stored. All processes of a mesh call it together; full ones, of
    which it makes lower halves, only the lead gets."""
    if not full:
        return moments
    whole = {name: readable(moment) for name, moment in moments.items()}
    return {name: halved(moment) for name, moment in whole.items()} if is_lead() else {}


def chunks_of_batch(chunks: int, length: int, batch_tokens: int, mesh: Mesh) -> int:
    """Chunks of a batch on all devices of a mesh, each of which takes at most `batch_tokens` tokens, and a
    chunk at least."""
    return mesh.size * min(max(1, batch_tokens // length), -(-chunks // mesh.size))


def embed_batches(
    embedding: Float[np.ndarray, "v d"], ids: np.ndarray, batch_tokens: int, mesh: Mesh
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The residual stream before the first layer, and the mask, of each of equal batches, which are divided
    over the mesh and made one at a time.

    Args:
        embedding: token embedding [vocabulary, hidden] on the host.
        ids: chunks of tokens, int32 [chunks, length].
        batch_tokens: tokens that one device takes at once; at least one chunk.
        mesh: `data` × `model` devices.

    Raises:
        ValueError: a token that the embedding has no row for.
    """
    if ids.min() < 0 or ids.max() >= len(embedding):
        raise ValueError(
            f"the tokenizer gives tokens {ids.min()} to {ids.max()}, the embedding has {len(embedding)} "
            "rows: tokenizer and weights are not of the same model"
        )
    size = chunks_of_batch(len(ids), ids.shape[1], batch_tokens, mesh)

    def rows_of(batch: np.ndarray) -> jax.Array:
        rows = np.zeros((size, ids.shape[1], embedding.shape[1]), embedding.dtype)
        rows[: len(batch)] = embedding[batch]
        return put(rows, sharding(mesh, "chunks"))

    starts = range(0, len(ids), size)
    counted = masks(len(ids), size, mesh)
    return ((rows_of(ids[start : start + size]), mask) for start, mask in zip(starts, counted, strict=True))


def masks(chunks: int, size: int, mesh: Mesh) -> list[jax.Array]:
    """1 for each of `chunks` chunks, 0 for the padding of the last batch, in batches of `size`."""
    counts = np.pad(np.ones(chunks, np.float32), (0, -chunks % size)).reshape(-1, size)
    return [put(mask, sharding(mesh, "chunks")) for mask in counts]
