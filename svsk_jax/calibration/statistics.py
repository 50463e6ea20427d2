"""Second moments of the linears' inputs, one decoder layer at a time, data-parallel over devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from svsk_jax.calibration.experts import INPUTS, PLACES, Routed
from svsk_jax.model.decoder import DecoderLayer
from svsk_jax.model.parameters import LINEAR_INPUTS
from svsk_jax.quant.types import InputMoment

Moments = dict[str, InputMoment]
"""The moment of each activation that linears read, by name (`parameters.linear_inputs`; of experts while a
layer is walked, see `calibration.experts`)."""


def data_mesh() -> Mesh:
    """All local devices along one axis, `data`."""
    return jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def _moment(x: Float[Array, "b t k"], mask: Float32[Array, "b"], full: bool) -> InputMoment:
    wide = x.astype(jnp.float32) * mask[:, None, None]
    rows = wide.reshape(-1, x.shape[-1])
    if full:
        total = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    else:
        total = jnp.sum(rows * rows, axis=0)
    return InputMoment(total=total, tokens=jnp.sum(mask).astype(jnp.int32) * x.shape[1])


@partial(jax.jit, static_argnames=("mesh", "full"), donate_argnames="x")
def layer_moments(
    layer: DecoderLayer, x: Float[Array, "b t d"], mask: Float32[Array, "b"], mesh: Mesh, full: bool
) -> tuple[Float[Array, "b t d"], Moments]:
    """Run one layer on a batch of residual streams and measure what its linears read.

    Args:
        layer: the unquantized layer, replicated over the mesh.
        x: residual stream [B, T, hidden] before the layer, B divided over the mesh's `data` axis.
        mask: 1 for a chunk that counts, 0 for padding, [B].
        mesh: from `data_mesh`.
        full: keep [K, K] matrices rather than diagonals.

    Returns:
        The stream after the layer, divided like x, and the moments, f32, summed over all devices. Each
        activation that several linears share is measured once.
    """

    def local(layer, x, mask):
        seen: Moments = {}
        inputs, places = set(LINEAR_INPUTS.values()), {}

        def tap(name: str, value: jax.Array) -> jax.Array:
            if name in inputs:
                seen[name] = _moment(value, mask, full)
            elif name in PLACES:
                places[name] = value
            elif name in INPUTS:
                routed = Routed(layer, places)
                seen[name] = routed.moments(value, routed.rows_of_chunks(mask, x.shape[1]), full)
            return value

        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        y, _ = layer(x, positions, tap=tap)
        return y, jax.lax.psum(seen, "data")

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), P()),
        check_vma=False,
    )
    return sharded(layer, x, mask)


def embed_batches(
    embedding: Float[np.ndarray, "v d"], ids: np.ndarray, batch_tokens: int, mesh: Mesh
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The residual stream before the first layer, in equal batches divided over the mesh, and each batch's
    mask.

    Args:
        embedding: token embedding [vocabulary, hidden] on the host.
        ids: chunks of tokens, int32 [chunks, length].
        batch_tokens: tokens that one device takes at once; at least one chunk.
        mesh: from `data_mesh`.

    Raises:
        ValueError: a token that the embedding has no row for.
    """
    if ids.min() < 0 or ids.max() >= len(embedding):
        raise ValueError(
            f"the tokenizer gives tokens {ids.min()} to {ids.max()}, the embedding has {len(embedding)} "
            "rows: tokenizer and weights are not of the same model"
        )
    per_device = max(1, batch_tokens // ids.shape[1])
    size = mesh.size * min(per_device, -(-len(ids) // mesh.size))
    sharding = NamedSharding(mesh, P("data"))
    streams, masks = [], []
    for start in range(0, len(ids), size):
        batch = ids[start : start + size]
        mask = np.zeros(size, np.float32)
        mask[: len(batch)] = 1
        rows = np.zeros((size, ids.shape[1], embedding.shape[1]), embedding.dtype)
        rows[: len(batch)] = embedding[batch]
        streams.append(jax.device_put(rows, sharding))
        masks.append(jax.device_put(mask, sharding))
    return streams, masks
