"""Second moments of one decoder block, texts over devices."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.scale.sizes import config_of, counts, machine, relative
from benchmarks.speed.models import dense_parameters
from svsk_jax.calibration.statistics import Moments, add_up, layer_moments, no_moments
from svsk_jax.model.decoder import DecoderLayer
from svsk_jax.model.parameters import layer_parameters
from svsk_jax.parallel import make_mesh, sharding

CHUNKS, LENGTH, PER_DEVICE = 64, 2048, 4
"""Chunks in all, tokens of each, and chunks that a device takes at once."""
REPEATS = 3
TOLERANCE = 1e-5
"""Of H: sums in f32, in another order."""


def calibration(tiny: bool, report: Callable[..., None]) -> None:
    report(**machine())
    config = dataclasses.replace(config_of(tiny), num_layers=1)
    chunks, length, per_device = (8, 32, 1) if tiny else (CHUNKS, LENGTH, PER_DEVICE)
    parameters = dense_parameters(
        dataclasses.replace(config, vocab_size=1, tie_word_embeddings=True), jax.random.key(0), jnp.bfloat16
    )
    layer = DecoderLayer(config, layer_parameters(parameters, 0))
    streams = jax.random.normal(jax.random.key(1), (chunks, length, config.hidden_size), jnp.bfloat16)
    alone: tuple[float, Moments] | None = None
    for devices in counts(tiny):
        mesh = make_mesh(devices, 1, jax.devices()[:devices])
        found, seconds = measured(layer, streams, mesh, per_device * devices)
        rate = chunks * length / seconds
        one = jax.device_put(found, jax.devices()[0])
        if alone is None:
            alone = rate, one
            report(devices=1, seconds=seconds, tokens_per_second=rate)
            continue
        totals = {name: jnp.asarray(alone[1][name].total) for name in one}
        errors = {name: relative(one[name].total, total) for name, total in totals.items()}
        report(
            devices=devices,
            seconds=seconds,
            tokens_per_second=rate,
            efficiency=rate / alone[0] / devices,
            H_errors=errors,
            H_equal=max(errors.values()) < TOLERANCE,
            tokens_equal=all(int(one[name].tokens) == chunks * length for name in one),
        )


def measured(layer: DecoderLayer, streams: jax.Array, mesh: Mesh, batch: int) -> tuple[Moments, float]:
    """Moments over all chunks, and the seconds of another pass over them."""
    placed = jax.device_put(layer, sharding(mesh))
    mask = jax.device_put(jnp.ones(batch, jnp.float32), sharding(mesh, "chunks"))

    def one_pass() -> tuple[Any, float]:
        # Streams are donated.
        batches = [
            jax.device_put(streams[start : start + batch], sharding(mesh, "chunks"))
            for start in range(0, len(streams), batch)
        ]
        jax.block_until_ready(batches)
        start = time.perf_counter()
        sums = no_moments(placed, batches[0], mask, mesh, True)
        for x in batches:
            _, sums = layer_moments(placed, x, mask, sums, mesh, True)
        moments = jax.block_until_ready(add_up(sums, mesh, True))
        return moments, time.perf_counter() - start

    moments, _ = one_pass()
    return moments, statistics.median(one_pass()[1] for _ in range(REPEATS))
