"""Sums between GPUs, with the residual kernel behind them: by XLA under several of its options, and by that
kernel, which writes into their memories."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.clock import median_seconds
from benchmarks.scale.sizes import counts, machine
from pallas_kernels.decode_step import Boxes, Product, finish_residual
from pallas_kernels.svsk_matmul import lay_out
from pallas_kernels.svsk_matmul.synthetic import random_weight
from svsk_jax.model.fused_step import SMALL_SUM
from svsk_jax.parallel import MODEL, make_mesh
from svsk_jax.parallel.boxes import SPECS, PeerBoxes, why_no_boxes

SUMS = 72
"""Of a token of Qwen3-8B, two in each layer."""
COLUMNS = 4096
PARTS = 4
ROWS = (1, 16)
"""Texts of a batch."""
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one stream": {"xla_gpu_disable_async_collectives": "ALLREDUCE,ALLGATHER"},
}
"""Options of XLA, by what they do to sums between GPUs."""
BOXES = "boxes"


def exchanges(tiny: bool, report: Callable[..., None]) -> dict[str, float]:
    """Microseconds of a sum over two devices, by each way that worked; boxes come last."""
    report(**machine())
    found: dict[str, float] = {}
    for devices in counts(tiny)[1:]:
        mesh = make_mesh(1, devices, jax.devices()[:devices])
        for label, options in OPTIONS.items():
            for rows in ROWS:
                try:
                    us = by_xla(mesh, rows, {} if tiny else options, interpret=tiny)
                except jax.errors.JaxRuntimeError as error:
                    report(devices=devices, way=label, failed=str(error)[:500])
                    break
                report(devices=devices, way=label, rows=rows, us_of_a_sum=us)
                if devices == 2 and rows == ROWS[0]:
                    found[label] = us
    for devices in counts(tiny)[1:]:
        mesh = make_mesh(1, devices, jax.devices()[:devices])
        if (reason := why_no_boxes(mesh)) is not None:
            report(devices=devices, way=BOXES, impossible=reason)
            continue
        for rows in ROWS:
            us, error = by_boxes(mesh, rows)
            report(devices=devices, way=BOXES, rows=rows, us_of_a_sum=us, largest_error=error)
            if devices == 2 and rows == ROWS[0]:
                found[BOXES] = us
    return found


def by_xla(mesh: Mesh, rows: int, options: dict[str, Any], *, interpret: bool) -> float:
    """Microseconds of a sum and the residual kernel behind it, in a chain in which each is of the one
    before."""

    def local(stream: jax.Array, product: Product) -> jax.Array:
        for _ in range(SUMS):
            # So that one sum does not serve for all.
            parts, stream = jax.lax.optimization_barrier((product.parts, stream))
            # As the step does.
            parts = jnp.sum(parts, axis=0, keepdims=True) if parts.nbytes > SMALL_SUM else parts
            parts = jax.lax.psum(parts, MODEL)
            stream = _next(stream, dataclasses.replace(product, parts=parts), None, interpret)[0]
        return stream[None]

    run = _on_mesh(mesh, local, (P(), P()), options)
    stream, product = _operands(rows)
    return 1e6 * median_seconds(lambda: run(stream, product)) / SUMS


def by_boxes(mesh: Mesh, rows: int) -> tuple[float, float]:
    """Likewise by the residual kernel alone, and the largest relative error of many chains."""
    boxes = PeerBoxes(mesh)

    def local(stream: jax.Array, product: Product, held: Boxes | None) -> jax.Array:
        for _ in range(SUMS):
            stream, held = _next(stream, product, held)
        return stream[None]

    run = _on_mesh(mesh, local, (P(), P(), SPECS), {})
    stream, product = _operands(rows)
    jax.block_until_ready(run(stream, product, boxes.take(SUMS, wait=False)))
    us = 1e6 * median_seconds(lambda: run(stream, product, boxes.take(SUMS))) / SUMS
    expected = jax.jit(lambda stream, y: _summed(stream, y, mesh.shape[MODEL]))
    error = 0.0
    for index in range(20):
        start = stream + index
        found = run(start, product, boxes.take(SUMS))
        y = jnp.sum(product.parts, axis=0)[:, :COLUMNS]
        wrong = jnp.max(jnp.abs(jax.device_get(found) - jax.device_get(expected(start, y))))
        # A sum that a device waited for in vain is not a number, which `max` would drop.
        error = float(np.maximum(error, wrong / jnp.max(jnp.abs(found))))
    return us, error


def _operands(rows: int) -> tuple[jax.Array, Product]:
    """A residual stream, and a product without sidecar whose parts are the same on all devices."""
    weight = lay_out(random_weight(jax.random.key(0), COLUMNS, COLUMNS, rank=0))
    shape = (PARTS, rows, weight.padded_rows)
    parts = jax.random.normal(jax.random.key(1), shape)
    return jax.random.normal(jax.random.key(2), (rows, COLUMNS)), Product(parts=parts, weight=weight)


def _next(
    stream: jax.Array, product: Product, boxes: Boxes | None, interpret: bool = False
) -> tuple[jax.Array, Boxes | None]:
    after, boxes = finish_residual(
        stream, product, jnp.ones(COLUMNS, jnp.bfloat16), boxes=boxes, interpret=interpret
    )
    # What the next sum adds depends on this one.
    return after.x * jnp.float32(0.5), boxes


def _summed(stream: jax.Array, y: jax.Array, devices: int) -> jax.Array:
    for _ in range(SUMS):
        stream = (stream + devices * y) * jnp.float32(0.5)
    return stream


def _on_mesh(
    mesh: Mesh, local: Callable[..., jax.Array], specs: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(MODEL), check_vma=False)
    return jax.jit(spread, compiler_options=options)
