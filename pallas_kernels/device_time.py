"""Time of kernels on a GPU, by its profiler."""

import dataclasses
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MARK = "svsk_mark"
WITHOUT_GRAPHS = "--xla_gpu_enable_command_buffer="
"""An XLA flag that a process which times kernels needs: the profiler does not see into CUDA graphs."""


def without_graphs() -> None:
    """Add `WITHOUT_GRAPHS` to this process's XLA flags; before jax starts its backends."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {WITHOUT_GRAPHS}"


Times = dict[str, float]
"""Microseconds of one call, by kernel."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """A call that makes `length` equal calls one after another, as in a model: kernels find the device busy,
    and in its cache what the others left."""

    run: Callable[[], Any]
    length: int


def chain(function: Callable[..., Any], operands: Sequence[tuple[Any, ...]]) -> Chain:
    """A compiled chain that applies a function to each of several operands."""
    # Traced and lowered once for all.
    once = jax.jit(function)
    compiled = jax.jit(lambda operands: [once(*each) for each in operands]).lower(list(operands)).compile()
    return Chain(lambda: compiled(list(operands)), len(operands))


def call_times(chains: Sequence[Chain], repeats: int = 3) -> list[Times]:
    """For each chain the kernels of one of its calls: medians over all calls, times how often a call runs the
    kernel.

    Raises:
        RuntimeError: there is no GPU, or the trace does not show every chain.
    """
    if jax.default_backend() != "gpu":
        raise RuntimeError(f"kernels are timed on a GPU, this is {jax.default_backend()}")
    mark = jax.jit(_mark).lower(jnp.zeros(16, jnp.float32)).compile()
    zeros = jnp.zeros(16, jnp.float32)

    def run() -> None:
        for each in chains:
            mark(zeros).block_until_ready()
            jax.block_until_ready([each.run() for _ in range(repeats)])

    run()
    found: list[list[tuple[str, float]]] = []
    for name, duration in _traced(run):
        if name == MARK:
            found.append([])
        elif found:
            found[-1].append((name, duration))
    if len(found) != len(chains) or not all(found):
        raise RuntimeError(
            f"the profiler saw {sum(map(bool, found))} of {len(chains)} chains of calls; it sees no kernel "
            f"inside a CUDA graph: set XLA_FLAGS={WITHOUT_GRAPHS} before jax starts"
        )
    return [_of_a_call(each, calls.length * repeats) for each, calls in zip(found, chains, strict=True)]


def _of_a_call(launches: list[tuple[str, float]], calls: int) -> Times:
    durations: dict[str, list[float]] = defaultdict(list)
    for name, duration in launches:
        durations[name].append(duration)
    return {name: statistics.median(all_) * len(all_) / calls for name, all_ in durations.items()}


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
