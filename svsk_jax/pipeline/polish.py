"""Train what is continuous in a quantized model's linears until its predictions are as near to the original's
as they get."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from svsk_jax.model.config import ModelConfig
from svsk_jax.model.decoder import DecoderLayer, Tail
from svsk_jax.model.parameters import QUANTIZED_LINEARS
from svsk_jax.model.source import ModelSource
from svsk_jax.pipeline.progress import OnProgress, Progress
from svsk_jax.quant.polish import Deviation, restore, store

BATCH_TOKENS = 4096
"""Tokens of a step."""
LEARNING_RATE = 3e-4
"""Of Adam, on deviations relative to the stored numbers; warmed up over a twentieth, then falling to zero."""
HELD_OUT = 16
"""One chunk in so many chooses among the iterates and is not trained on."""
CHECKS = 8
"""How often it is asked."""
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
"""Adam but for the learning rate, which is an argument of a step: steps of any rate are compiled once."""

Layer = dict[str, Any]
"""Stored parameters of a decoder layer by path within it."""
Deviations = list[dict[str, Deviation]]
"""Of each layer, by linear."""


def polish(
    source: ModelSource,
    layers: Sequence[Layer],
    ids: np.ndarray,
    steps: int,
    dtype: DTypeLike,
    on_progress: OnProgress | None = None,
) -> list[Layer]:
    """Minimise KL(p‖q), p the predictions of the original and q those of the quantized model, in the
    super-scales, codebook coefficients and sidecars of its linears; codes and int6 scales stay. Everything
    outside the linears is the original's.

    The best iterate on held-out chunks, as it is stored, is kept; the start is one of them. The whole
    quantized model is in memory, and its layers are restored one at a time, forwards and backwards.

    Args:
        source: the original.
        layers: the quantized layers, with two-level scales.
        ids: chunks of tokens, int32 [chunks, length], from calibration.
        steps: of Adam, on 4096 tokens each.
        dtype: of the activations.
        on_progress: called after each check; the layers it counts are steps.

    Returns:
        The layers, of the same bytes.

    Raises:
        ValueError: flat scales, or a single chunk.

    Source: knowledge distillation (Hinton et al., 2015) into the step sizes of a quantized model, as in
    EfficientQAT's second phase (Chen et al., 2024).
    """
    if len(ids) < 2:
        raise ValueError(f"polish: expected at least 2 chunks of calibration text, got {len(ids)}")
    outer = {path: jnp.asarray(value) for path, value in source.outer(dtype).items()}
    tail = Tail(source.config, outer)
    streams = np.asarray(outer["embedding.weight"])[ids]
    targets = _final_streams(source, streams, dtype)
    held = np.arange(len(ids)) % HELD_OUT == min(HELD_OUT, len(ids)) - 1
    fixed = [dict(layer) for layer in layers]
    current = [
        {name: Deviation.none(layer[f"{name}.weight"]) for name in QUANTIZED_LINEARS} for layer in layers
    ]
    best = jax.tree.map(jnp.copy, current)
    warmup = steps // 20
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, max(steps, warmup + 1))
    # optax mixes dtypes, here and in a step.
    with jax.numpy_dtype_promotion("standard"):
        rates = jnp.asarray(schedule(jnp.arange(steps)))
    state = OPTIMIZER.init(current)
    batch = max(1, min(BATCH_TOKENS // ids.shape[1], int(np.sum(~held))))

    def check(deviations: Deviations) -> float:
        values = [
            _divergence(source.config, deviations, fixed, tail, streams[[i]], targets[[i]], True)
            for i in np.flatnonzero(held)
        ]
        return float(np.mean(jax.device_get(values)))

    least = check(best)
    every = max(1, math.ceil(steps / CHECKS))
    for step, rows in enumerate(_batches(np.flatnonzero(~held), batch, steps), start=1):
        current, state = _step(
            source.config, current, state, rates[step - 1], fixed, tail, streams[rows], targets[rows]
        )
        if step % every == 0 or step == steps:
            found = check(current)
            if found < least:
                best, least = jax.tree.map(jnp.copy, current), found
            if on_progress:
                on_progress(Progress(stage="polish", layer=step, layers=steps))
    return [
        layer | {f"{name}.weight": store(layer[f"{name}.weight"], moved[name]) for name in QUANTIZED_LINEARS}
        for layer, moved in zip(layers, best, strict=True)
    ]


def _batches(rows: np.ndarray, size: int, steps: int) -> Iterator[np.ndarray]:
    """`steps` draws without replacement, shuffled again whenever too few are left; seeded."""
    rng, left = np.random.default_rng(0), np.zeros(0, np.int64)
    for _ in range(steps):
        if len(left) < size:
            left = rng.permutation(rows)
        yield left[:size]
        left = left[size:]


def _final_streams(source: ModelSource, streams: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """The original's residual stream after its last layer, chunk by chunk."""
    streams = streams.copy()
    for index in range(source.config.num_layers):
        parameters = {path: jnp.asarray(value) for path, value in source.layer(index, dtype).items()}
        layer = DecoderLayer(source.config, parameters)
        for row in range(len(streams)):
            streams[row] = np.asarray(_through(layer, streams[row][None]))[0]
    return streams


@jax.jit
def _through(layer: DecoderLayer, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    return layer(x, jnp.arange(x.shape[1], dtype=jnp.int32))[0]


@partial(jax.checkpoint, static_argnums=(0, 4))
def _restored_layer(
    config: ModelConfig, moved: dict[str, Deviation], layer: Layer, x: Float[Array, "b t d"], rounded: bool
) -> Float[Array, "b t d"]:
    """A layer on its dense weights, which live as long as it does."""
    dense = {path: value.astype(x.dtype) for path, value in layer.items() if isinstance(value, jax.Array)}
    for name in moved:
        path = f"{name}.weight"
        dense[path] = restore(layer[path], moved[name], rounded).astype(x.dtype)
    return DecoderLayer(config, dense)(x, jnp.arange(x.shape[1], dtype=jnp.int32))[0]


def _mean_divergence(
    config: ModelConfig,
    deviations: Deviations,
    fixed: Sequence[Layer],
    tail: Tail,
    x: Float[Array, "b t d"],
    target: Float[Array, "b t d"],
    rounded: bool,
) -> Float[Array, ""]:
    """KL(p‖q) per token, in nats, of streams x [b, t, d] before the first layer; `target`: the original's
    after the last one."""
    for layer, moved in zip(fixed, deviations, strict=True):
        x = _restored_layer(config, moved, layer, x, rounded)

    def of_chunk(streams: tuple[jax.Array, jax.Array]) -> jax.Array:
        log_p, log_q = (jax.nn.log_softmax(tail.logits(each)) for each in streams)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    # A chunk's logits at a time.
    return jnp.sum(jax.lax.map(jax.checkpoint(of_chunk), (target, x))) / (x.shape[0] * x.shape[1])


_divergence = jax.jit(_mean_divergence, static_argnums=(0, 6))


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(
    config: ModelConfig,
    deviations: Deviations,
    state: Any,
    rate: Float[Array, ""],
    fixed: Sequence[Layer],
    tail: Tail,
    x: Float[Array, "b t d"],
    target: Float[Array, "b t d"],
) -> tuple[Deviations, Any]:
    gradient = jax.grad(_mean_divergence, argnums=1)(config, deviations, fixed, tail, x, target, False)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = OPTIMIZER.update(gradient, state, deviations)
    moved: Any = optax.apply_updates(deviations, jax.tree.map(lambda by: -rate * by, updates))
    return moved, state
