"""What a run tells while it goes on, and where its time goes."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """One finished layer of a stage of a run."""

    stage: str
    """What is being done: calibrate, sensitivity, plan, quantize or convert."""
    layer: int
    layers: int
    error: float | None = None
    """Geometric mean of the layer errors so far."""


OnProgress = Callable[[Progress], None]


class Stopwatch:
    """Wall seconds by stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def restart(self) -> None:
        """Leave out the time since the last lap."""
        self._mark = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._mark
        self._mark = now


def geometric_mean(values: list[float]) -> float | None:
    """exp of the mean logarithm of the positive values; None if there are none."""
    positive = [value for value in values if value > 0]
    return float(np.exp(np.mean(np.log(positive)))) if positive else None
