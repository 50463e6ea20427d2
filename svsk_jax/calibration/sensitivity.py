"""The Fisher pass: how strongly the model's output feels each linear's output, walked backwards layer by
layer."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from svsk_jax.calibration.experts import OUTPUTS, PLACES, Routed
from svsk_jax.calibration.statistics import Moments
from svsk_jax.model.decoder import Decoder, DecoderLayer
from svsk_jax.model.parameters import LINEAR_INPUTS
from svsk_jax.quant.types import SENSITIVITY_TILE, InputMoment, OutputSensitivity

WEIGHT_CLIP = 10.0
"""Largest weight of a token, as a multiple of the mean weight."""

Sensitivities = dict[str, OutputSensitivity]
"""The output sensitivity of each linear of a layer, by path within it (of experts while a layer is walked,
see `calibration.experts`)."""
READS = LINEAR_INPUTS | OUTPUTS
"""What each linear whose output is tapped reads."""


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
    tail: Decoder, x: Float[Array, "b t d"], mask: Float32[Array, "b"], key: jax.Array, mesh: Mesh
) -> Float[Array, "b t d"]:
    """∂/∂x of Σ -log p(yₜ | x), with each label yₜ sampled from the model's own p; zero for padding.

    Args:
        tail: a model of which only final norm and head are used.
        x: residual stream after the last layer, divided over the mesh.
        mask: 1 for a chunk that counts.
        key: of the sampling; each device folds its place in.
        mesh: from `statistics.data_mesh`.
    """

    def local(tail, x, mask, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))

        def loss(x, row_mask, key):
            log_p = jax.nn.log_softmax(tail.logits(x))
            labels = jax.random.categorical(key, jax.lax.stop_gradient(log_p))
            picked = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
            return -jnp.sum(picked) * row_mask

        # A chunk at a time: logits are the largest array of the whole run.
        keys = jax.random.split(key, len(x))
        return jax.lax.map(lambda row: jax.grad(loss)(*row), (x, mask, keys))

    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data"), P("data"), P()), out_specs=P("data"), check_vma=False
    )(tail, x, mask, key)


@partial(jax.jit, static_argnames="mesh", donate_argnames="upstream")
def layer_sensitivity(
    layer: DecoderLayer,
    x: Float[Array, "b t d"],
    upstream: Float[Array, "b t d"],
    mask: Float32[Array, "b"],
    mesh: Mesh,
) -> tuple[Float[Array, "b t d"], Sensitivities]:
    """One layer of the backward walk: a vjp from the layer's input and the gradient at its output.

    Returns:
        The gradient at the layer's input, divided over the mesh like x, and each linear's sensitivity:
        Σ g gᵀ in diagonal blocks, summed over devices, and mean(g²) of each token, f32, zero for padding;
        for experts with leading axes of experts and last axes of a token's slots.
    """

    def local(layer, x, upstream, mask):
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
        tokens = dict.fromkeys(gradients, jnp.sum(mask).astype(jnp.int32) * x.shape[1])
        blocks = {name: _blocks(g) for name, g in gradients.items() if name not in OUTPUTS}
        weights = {
            name: jnp.mean(jnp.square(g.astype(jnp.float32)), axis=-1) for name, g in gradients.items()
        }
        if places:
            routed = Routed(layer, places)
            for name in OUTPUTS:
                height = min(SENSITIVITY_TILE, gradients[name].shape[-1])
                blocks[name] = routed.blocks(gradients[name], height)
                weights[name] = routed.pairs(weights[name], (x.shape[0], x.shape[1]))
                tokens[name] = routed.counts(routed.rows_of_chunks(mask, x.shape[1]))
        return below, *jax.lax.psum((blocks, tokens), "data"), weights

    below, blocks, tokens, weights = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data"), P("data")),
        out_specs=(P("data"), P(), P(), P("data")),
        check_vma=False,
    )(layer, x, upstream, mask)
    return below, {
        name: OutputSensitivity(blocks=blocks[name], weights=weights[name], tokens=tokens[name])
        for name in READS
        if name in blocks
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


@partial(jax.jit, static_argnames="mesh")
def weighted_moments(
    layer: DecoderLayer,
    x: Float[Array, "b t d"],
    weights: dict[str, Float[Array, "b t *slots"]],
    mesh: Mesh,
) -> Moments:
    """Σ w x xᵀ of each activation that linears read, f32, summed over devices; `tokens` counts those of
    non-zero weight."""

    def local(layer, x, weights):
        seen, places = {}, {}

        def tap(name, value):
            if name in PLACES:
                places[name] = value
            elif name in weights and name not in LINEAR_INPUTS.values():
                routed = Routed(layer, places)
                seen[name] = routed.moments(value, routed.rows(weights[name].reshape(-1)), True)
            elif name in weights:
                rows = value.astype(jnp.float32).reshape(-1, value.shape[-1])
                w = weights[name].reshape(-1, 1)
                total = jnp.matmul((rows * w).T, rows, precision=jax.lax.Precision.HIGHEST)
                seen[name] = InputMoment(total=total, tokens=jnp.sum(w > 0))
            return value

        layer(x, jnp.arange(x.shape[1], dtype=jnp.int32), tap=tap)
        return jax.lax.psum(seen, "data")

    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=False
    )(layer, x, weights)
