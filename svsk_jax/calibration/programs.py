"""What takes long to compile of a walk over a model, by the shapes that it will have: so that it can be
compiled before there is anything to run it on.

A call later finds what was compiled here, as long as it has the same shapes, types and places; a test keeps
it so.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from svsk_jax.calibration.sensitivity import (
    READS,
    head_gradient,
    layer_sensitivity,
    no_blocks,
    weighted_moments,
)
from svsk_jax.calibration.statistics import head_moments, layer_moments, no_moments, partial_sums
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.decoder import DecoderLayer, Tail
from svsk_jax.model.norm import RMSNorm
from svsk_jax.model.parameters import layer_kinds, layer_shapes, outer_shapes
from svsk_jax.parallel import sharding
from svsk_jax.quant.programs import Program


def of_walk(
    model: ModelConfig,
    mesh: Mesh,
    dtype: DTypeLike,
    batch: tuple[int, int],
    full: bool,
    sensitive: bool,
    seed: int,
) -> Iterator[Program]:
    """What `Walk` runs.

    Args:
        model: its configuration.
        mesh: `data` × `model` devices.
        dtype: of the activations and of the model's parameters.
        batch: chunks of a batch on all devices, and their tokens.
        full: whole second moments rather than their diagonals.
        sensitive: whether it walks backwards too.
        seed: of the labels sampled at the head.
    """
    whole, chunks, sums_place = sharding(mesh), sharding(mesh, "chunks"), partial_sums(mesh)
    x = jax.ShapeDtypeStruct((*batch, model.hidden_size), dtype, sharding=chunks)
    mask = jax.ShapeDtypeStruct(batch[:1], jnp.float32, sharding=chunks)
    layers = [_module(DecoderLayer, model, layer_shapes(model, i), dtype, whole) for i in layer_kinds(model)]
    moments = []
    for layer in layers:
        moments.append(
            _placed(jax.eval_shape(partial(no_moments, mesh=mesh, full=full), layer, x, mask), sums_place)
        )
        yield Program(layer_moments, (layer, x, mask, moments[-1], mesh, full))
    norm = _placed(
        jax.eval_shape(lambda: RMSNorm(jnp.zeros(model.hidden_size, dtype), model.rms_norm_eps)), whole
    )
    first = (norm, x, mask, None)
    yield Program(head_moments, (*first, mesh, full))
    sums = _placed(jax.eval_shape(partial(head_moments, mesh=mesh, full=full), *first), sums_place)
    yield Program(head_moments, (norm, x, mask, sums, mesh, full))
    if not sensitive:
        return
    for layer, sums in zip(layers, moments, strict=True):
        blocks = _placed(jax.eval_shape(partial(no_blocks, mesh=mesh), layer, x), sums_place)
        yield Program(layer_sensitivity, (layer, x, x, blocks, mesh))
        _, _, felt = jax.eval_shape(partial(layer_sensitivity, mesh=mesh), layer, x, x, blocks)
        weights = _placed({READS[linear]: each for linear, each in felt.items()}, chunks)
        yield Program(weighted_moments, (layer, x, weights, sums, mesh))
    shapes = outer_shapes(model)
    if not model.tie_word_embeddings:
        del shapes["embedding.weight"]
    yield Program(head_gradient, (_module(Tail, model, shapes, dtype, whole), x, mask, seed, 0, mesh))


def _module(
    kind: type[Any],
    model: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    dtype: DTypeLike,
    place: NamedSharding,
) -> Any:
    """A module of parameters that are not there."""
    return _placed(
        jax.eval_shape(
            lambda: kind(model, {path: jnp.zeros(shape, dtype) for path, shape in shapes.items()})
        ),
        place,
    )


def _placed(tree: Any, place: NamedSharding) -> Any:
    return jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=place), tree)
