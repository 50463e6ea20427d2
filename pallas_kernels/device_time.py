"""Time of kernels on a GPU, by its profiler."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MARK = "svsk_mark"
Launch = list[tuple[str, float]]
"""Kernels of one call in order: name and microseconds."""


def call_times(calls: Sequence[Callable[[int], Any]], launches: int) -> list[list[Launch]]:
    """The kernels that each call runs on the device, for each of `launches` times that it is called.

    A call is given the number of the launch, from 0, so that it can take other operands than the last; it
    ends when what it returns is ready. All are warmed up before the trace.

    Raises:
        RuntimeError: the trace shows no kernel, as on a machine without a GPU.
    """
    mark = jax.jit(_mark).lower(jnp.zeros(16, jnp.float32)).compile()
    zeros = jnp.zeros(16, jnp.float32)

    def run(times: int) -> None:
        for call in calls:
            for index in range(times):
                mark(zeros).block_until_ready()
                jax.block_until_ready(call(index))

    run(2)
    found: list[Launch] = []
    for name, duration in _traced(lambda: run(launches)):
        if name == MARK:
            found.append([])
        elif found:
            found[-1].append((name, duration))
    if len(found) != len(calls) * launches:
        raise RuntimeError(f"the profiler saw {len(found)} of {len(calls) * launches} calls; is there a GPU?")
    return [found[index * launches : (index + 1) * launches] for index in range(len(calls))]


def _traced(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Kernels that ran on GPUs meanwhile, in order of start, copies between memories aside."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        [path] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [
            (event.start_ns, event.name, event.duration_ns)
            for plane in data.planes
            if "GPU" in plane.name
            for line in plane.lines
            if "Stream" in line.name
            for event in line.events
            if not event.name.startswith("Memcpy")
        ]
    return [(name, duration / 1e3) for _, name, duration in sorted(events)]


def _mark(x: jax.Array) -> jax.Array:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...]

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        name=MARK,
    )(x)
