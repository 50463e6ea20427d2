"""Time of kernels on a GPU, by its profiler."""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def kernel_times(run: Callable[[], Any]) -> dict[str, list[float]]:
    """Microseconds that each kernel launched by `run` took on the device, by name, in order of launch.

    `run` is called once inside the trace; warm it up before.

    Raises:
        RuntimeError: the trace shows no kernel, as on a machine without a GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [path] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [
            (event.start_ns, event.name, event.duration_ns)
            for plane in data.planes
            if "GPU" in plane.name
            for line in plane.lines
            if "Stream" in line.name
            for event in line.events
        ]
    if not events:
        raise RuntimeError("the profiler saw no kernel on a GPU; is there one?")
    times: dict[str, list[float]] = defaultdict(list)
    for _, name, duration in sorted(events):
        times[name].append(duration / 1e3)
    return dict(times)
