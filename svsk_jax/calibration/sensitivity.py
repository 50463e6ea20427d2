"""The Fisher pass: how strongly the model's output feels each linear's output, walked backwards layer by
layer."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from svsk_jax.calibration.experts import OUTPUTS, PLACES, Routed
from svsk_jax.calibration.statistics import MomentSums, device_moment, no_sums, own, partial_sums
from svsk_jax.model.decoder import DecoderLayer, Tail
from svsk_jax.model.parameters import LINEAR_INPUTS
from svsk_jax.parallel import DATA, MODEL, sharding
from svsk_jax.quant.types import SENSITIVITY_TILE, OutputSensitivity

WEIGHT_CLIP = 10.0
"""Largest weight of a token, as a multiple of the mean weight."""
HEAD_TOKENS = 128
"""Tokens whose logits are differentiated together."""

Sensitivities = dict[str, OutputSensitivity]
"""The output sensitivity of each linear of a layer, by path within it (of experts while a layer is walked,
see `calibration.experts`)."""
TOKENS = ".tokens"
"""Ending of the counts of experts' tokens, beside their sums of blocks."""
READS = LINEAR_INPUTS | OUTPUTS
"""What each linear whose output is tapped reads."""

Blocks = dict[str, jax.Array]
"""Σ g gᵀ of each linear in diagonal blocks, f32 [tiles, m, m]; before they are added up, each device's own,
[data, model, tiles, m, m]."""


def _blocks(g: Float[Array, "b t n"]) -> Float[Array, "tiles m m"]:
    rows = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    height = min(SENSITIVITY_TILE, rows.shape[1])
    whole = rows.shape[1] // height * height
    tiles = rows[:, :whole].reshape(len(rows), -1, height)
    blocks = jnp.einsum("tia,tib->iab", tiles, tiles, precision=jax.lax.Precision.HIGHEST)
    if whole == rows.shape[1]:
        return blocks
    # The ragged last tile by itself: padded, it would cost as much as a whole one.
    rest = jnp.matmul(rows[:, whole:].T, rows[:, whole:], precision=jax.lax.Precision.HIGHEST)
    padding = height - rest.shape[0]
    return jnp.concatenate([blocks, jnp.pad(rest, ((0, padding), (0, padding)))[None]])


@partial(jax.jit, static_argnames="mesh")
def head_gradient(
    tail: Tail,
    x: Float[Array, "b t d"],
    mask: Float[Array, "b"],
    seed: int | jax.Array,
    first: int | jax.Array,
    mesh: Mesh,
) -> Float[Array, "b t d"]:
    """∂/∂x of Σ -log p(yₜ | x), with each label yₜ sampled from the model's own p; zero for padding.

    Args:
        tail: final norm and head.
        x: residual stream after the last layer, divided over the mesh.
        mask: 1 for a chunk that counts.
        seed: of the sampling. Each chunk has a key of its own, which hangs on its number alone.
        first: number of the first chunk.
        mesh: `data` × `model` devices.
    """

    def local(tail, x, mask, seed, first):
        def loss(x, noise, row_mask):
            log_p = jax.nn.log_softmax(tail.logits(x))
            # `jax.random.categorical`, with the noise of the whole chunk.
            labels = jnp.argmax(jax.lax.stop_gradient(log_p) + noise, axis=-1)
            picked = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
            return -jnp.sum(picked) * row_mask

        def of_chunk(x, row_mask, key):
            length, width = x.shape
            size = min(HEAD_TOKENS, length)
            padding = ((0, -length % size), (0, 0))
            noise = jnp.pad(jax.random.gumbel(key, (length, vocabulary), jnp.float32), padding)
            pieces = (jnp.pad(x, padding).reshape(-1, size, width), noise.reshape(-1, size, vocabulary))
            found = jax.lax.map(lambda piece: jax.grad(loss)(*piece, row_mask), pieces)
            return found.reshape(-1, width)[:length]

        vocabulary = tail.head.weight.get_value().shape[0]

        numbers = first + jax.lax.axis_index((DATA, MODEL)) * len(x) + jnp.arange(len(x), dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers)
        # Piece by piece: logits are the largest array of the whole run.
        return jax.lax.map(lambda chunk: of_chunk(*chunk), (x, mask, keys))

    whole, chunks = sharding(mesh).spec, sharding(mesh, "chunks").spec
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, chunks, chunks, whole, whole),
        out_specs=chunks,
        check_vma=False,
    )(tail, x, mask, seed, first)


@partial(jax.jit, static_argnames="mesh")
def no_blocks(layer: DecoderLayer, x: Float[Array, "b t d"], mesh: Mesh) -> Blocks:
    """The sums of `layer_sensitivity` before a layer's first batch."""
    # Only shapes are taken from it, and XLA drops what nobody reads.
    _, like, _ = _felt(layer, x, x, mesh)
    return no_sums(like, mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames=("upstream", "sums"))
def layer_sensitivity(
    layer: DecoderLayer,
    x: Float[Array, "b t d"],
    upstream: Float[Array, "b t d"],
    sums: Blocks,
    mesh: Mesh,
) -> tuple[Float[Array, "b t d"], Blocks, dict[str, Float[Array, "b t *slots"]]]:
    """One layer of the backward walk: a vjp from the layer's input and the gradient at its output.

    Args:
        layer: the unquantized layer, replicated over the mesh.
        x: its input, divided over all devices of the mesh.
        upstream: the gradient at its output, likewise; zero for padding.
        sums: what earlier batches gave; first `no_blocks`.
        mesh: `data` × `model` devices.

    Returns:
        The gradient at the layer's input, divided like x; Σ g gᵀ of each linear in diagonal blocks, each
        device's own sum, with this batch's share; and mean(g²) of each token, replicated. f32. Of experts
        the blocks have an axis of experts in front, the weights one of a token's slots behind, and
        `<linear>.tokens` counts each expert's tokens.
    """

    below, blocks, weights = _felt(layer, x, upstream, mesh)
    return below, {name: sums[name] + blocks[name] for name in sums}, weights


def _felt(
    layer: DecoderLayer, x: jax.Array, upstream: jax.Array, mesh: Mesh
) -> tuple[jax.Array, Blocks, dict[str, jax.Array]]:
    def local(layer, x, upstream):
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)

        def run(x, probes):
            places = {}

            def tap(name, value):
                if name in PLACES:
                    places[name] = value
                return value + probes[name] if name in probes else value

            return layer(x, positions, tap=tap)[0], places

        outputs = jax.eval_shape(lambda x: _linear_outputs(layer, x, positions), x)
        probes = {name: jnp.zeros(like.shape, like.dtype) for name, like in outputs.items()}
        _, pull, places = jax.vjp(run, x, probes, has_aux=True)
        below, gradients = pull(upstream)
        blocks = {name: _blocks(g) for name, g in gradients.items() if name not in OUTPUTS}
        weights = {
            name: jnp.mean(jnp.square(g.astype(jnp.float32)), axis=-1) for name, g in gradients.items()
        }
        if places:
            routed = Routed(layer, places)
            for name in OUTPUTS:
                height = min(SENSITIVITY_TILE, gradients[name].shape[-1])
                blocks[name] = routed.blocks(gradients[name], height)
                blocks[f"{name}{TOKENS}"] = routed.counts(weights[name])
                weights[name] = routed.pairs(weights[name], (x.shape[0], x.shape[1]))
        return below, own(blocks), jax.lax.all_gather(weights, (DATA, MODEL), tiled=True)

    whole, chunks = sharding(mesh).spec, sharding(mesh, "chunks").spec
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, chunks, chunks),
        out_specs=(chunks, partial_sums(mesh).spec, whole),
        check_vma=False,
    )(layer, x, upstream)


@partial(jax.jit, static_argnames="mesh")
def add_up_blocks(sums: Blocks, mesh: Mesh) -> Blocks:
    """The blocks summed over devices, [tiles, m, m], replicated."""
    return {
        name: jax.lax.with_sharding_constraint(jnp.sum(each, axis=(0, 1)), sharding(mesh))
        for name, each in sums.items()
    }


def _linear_outputs(layer: DecoderLayer, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
    seen = {}

    def tap(name, value):
        if name in READS:
            seen[name] = value
        return value

    layer(x, positions, tap=tap)
    return seen


def token_weights(sensitivities: Sensitivities) -> dict[str, Float[Array, "chunks t *slots"]]:
    """For each activation that linears read, the weight of each of its tokens: the mean over those linears of
    mean(g²), each scaled to a mean of 1, clipped at 10. A mixture's experts are scaled together."""
    weights: dict[str, list[jax.Array]] = {}
    for linear, sensitivity in sensitivities.items():
        tokens = jnp.sum(sensitivity.tokens).astype(jnp.float32)
        mean = jnp.sum(sensitivity.weights) / jnp.maximum(tokens, 1.0)
        scaled = jnp.asarray(sensitivity.weights) / jnp.where(mean > 0, mean, 1.0)
        weights.setdefault(READS[linear], []).append(scaled)
    return {name: jnp.minimum(sum(parts) / len(parts), WEIGHT_CLIP) for name, parts in weights.items()}


def _weighted(layer: DecoderLayer, x: jax.Array, weights: dict[str, jax.Array], mesh: Mesh) -> MomentSums:
    def local(layer, x, weights):
        seen: MomentSums = {}
        places = {}

        def tap(name, value):
            if name in PLACES:
                places[name] = value
            elif name in weights and name not in LINEAR_INPUTS.values():
                routed = Routed(layer, places)
                seen[name] = own(routed.moments(value, routed.rows(weights[name].reshape(-1)), True))
            elif name in weights:
                seen[name] = device_moment(value, weights[name], True, mesh.shape[MODEL])
            return value

        layer(x, jnp.arange(x.shape[1], dtype=jnp.int32), tap=tap)
        return seen

    whole, chunks = sharding(mesh).spec, sharding(mesh, "chunks").spec
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, chunks, chunks),
        out_specs=partial_sums(mesh).spec,
        check_vma=False,
    )(layer, x, weights)


@partial(jax.jit, static_argnames="mesh", donate_argnames="sums")
def weighted_moments(
    layer: DecoderLayer,
    x: Float[Array, "b t d"],
    weights: dict[str, Float[Array, "b t *slots"]],
    sums: MomentSums,
    mesh: Mesh,
) -> MomentSums:
    """The sums of `statistics.layer_moments`, `no_moments` at first, with this batch's Σ w x xᵀ of each
    activation that linears read; `tokens` counts those of non-zero weight."""
    return jax.tree.map(jnp.add, sums, _weighted(layer, x, weights, mesh))
