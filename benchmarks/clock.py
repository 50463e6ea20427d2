"""Times by the clock of the host."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

REPEATS, CALLS = 5, 4


def median_seconds(call: Callable[[], Any], repeats: int = REPEATS, calls: int = CALLS) -> float:
    """Of a call, after a first one, among so many one after another, as in generating, where the host runs
    ahead: the median of some repeats."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)][-1])
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)
