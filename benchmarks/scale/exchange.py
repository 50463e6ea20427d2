"""Sums between GPUs: by XLA under several of its options, and by a kernel that writes into their memories."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.scale.sizes import counts, machine, median_seconds
from pallas_kernels.decode_step import Boxes, exchange
from svsk_jax.parallel import MODEL, make_mesh
from svsk_jax.parallel.boxes import SPECS, PeerBoxes, why_no_boxes

SUMS = 72
"""Of a token of Qwen3-8B, two in each layer."""
NUMBERS = (4096, 16 * 4224)
"""What is summed at batch 1 and at batch 16."""
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one stream": {"xla_gpu_disable_async_collectives": "ALLREDUCE,ALLGATHER"},
}
"""Options of XLA, by what they do to sums between GPUs."""
BOXES = "boxes"


def exchanges(tiny: bool, report: Callable[..., None]) -> dict[str, float]:
    """Microseconds of a sum of few numbers over two devices, by each way that worked; boxes come last."""
    report(**machine())
    found: dict[str, float] = {}
    for devices in counts(tiny)[1:]:
        mesh = make_mesh(1, devices, jax.devices()[:devices])
        for label, options in OPTIONS.items():
            for numbers in NUMBERS:
                try:
                    us = by_xla(mesh, numbers, {} if tiny else options)
                except jax.errors.JaxRuntimeError as error:
                    report(devices=devices, way=label, failed=str(error)[:500])
                    break
                report(devices=devices, way=label, numbers=numbers, us_of_a_sum=us)
                if devices == 2 and numbers == NUMBERS[0]:
                    found[label] = us
    for devices in counts(tiny)[1:]:
        mesh = make_mesh(1, devices, jax.devices()[:devices])
        if (reason := why_no_boxes(mesh)) is not None:
            report(devices=devices, way=BOXES, impossible=reason)
            continue
        for numbers in NUMBERS:
            us, error = by_boxes(mesh, numbers)
            report(devices=devices, way=BOXES, numbers=numbers, us_of_a_sum=us, largest_error=error)
            if devices == 2 and numbers == NUMBERS[0]:
                found[BOXES] = us
    return found


def numbers_of(mesh: Mesh, numbers: int) -> jax.Array:
    shape = (mesh.shape[MODEL], 1, 1, numbers)
    make = jax.jit(partial(jax.random.normal, shape=shape), out_shardings=jax.NamedSharding(mesh, P(MODEL)))
    return make(jax.random.key(0))


def by_xla(mesh: Mesh, numbers: int, options: dict[str, Any]) -> float:
    """Microseconds of a sum, in a chain in which each is of the one before."""

    def local(x: jax.Array) -> jax.Array:
        for _ in range(SUMS):
            x = jax.lax.psum(x, MODEL) * jnp.float32(1 / mesh.shape[MODEL])
        return x

    spread = jax.shard_map(local, mesh=mesh, in_specs=P(MODEL), out_specs=P(MODEL), check_vma=False)
    run, x = jax.jit(spread, compiler_options=options), numbers_of(mesh, numbers)
    return 1e6 * median_seconds(lambda: run(x)) / SUMS


def by_boxes(mesh: Mesh, numbers: int) -> tuple[float, float]:
    """Likewise by `exchange`, and the largest error of a sum over many chains."""
    boxes = PeerBoxes(mesh)

    def local(x: jax.Array, held: Boxes) -> jax.Array:
        total = x[0]
        for _ in range(SUMS):
            total, held = exchange(total, held)
            total = total * jnp.float32(1 / mesh.shape[MODEL])
        return total[None]

    run = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P(MODEL), SPECS), out_specs=P(MODEL), check_vma=False)
    )
    x = numbers_of(mesh, numbers)
    jax.block_until_ready(run(x, boxes.take(SUMS, wait=False)))
    us = 1e6 * median_seconds(lambda: run(x, boxes.take(SUMS))) / SUMS
    error = 0.0
    for index in range(20):
        other = x + index
        found = run(other, boxes.take(SUMS))
        error = max(error, float(jnp.max(jnp.abs(found - jnp.mean(other, axis=0)))))
    return us, error
