"""Seconds and memory of the stages of a run, as its progress is told."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from svsk_jax.pipeline.progress import Progress

CLEAR_PEAK = Path("/proc/self/clear_refs")


class Meter:
    """Seconds and memory of each layer of each stage: the largest resident set of the process in bytes beyond
    its `baseline` (`peaks`), and by the end of each stage the most that the first device has held, where it
    keeps count (`device_peaks`).

    The resident set's peak (VmHWM) begins anew with each layer, where the system lets it (`begins_anew`);
    elsewhere, and always on a device, it is the most since the process began.

    Args:
        on_layer: called with the meter after each layer.
    """

    def __init__(self, on_layer: Callable[["Meter"], None] | None = None):
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, list[int]] = {}
        self.device_peaks: dict[str, int] = {}
        self._on_layer = on_layer
        self.begins_anew = self._clear()
        self.baseline = host_peak()
        self._mark = time.perf_counter()

    def __call__(self, event: Progress) -> None:
        """Book what was used since the last event."""
        now = time.perf_counter()
        self.seconds.setdefault(event.stage, []).append(now - self._mark)
        self.peaks.setdefault(event.stage, []).append(host_peak() - self.baseline)
        on_device = device_peak()
        if on_device is not None:
            self.device_peaks[event.stage] = on_device
        if self.begins_anew:
            self._clear()
        if self._on_layer:
            self._on_layer(self)
        self._mark = time.perf_counter()

    def found(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "baseline_bytes": self.baseline,
            "begins_anew": self.begins_anew,
            "seconds_by_layer": self.seconds,
            "peak_bytes_by_layer": self.peaks,
            "peak_bytes": {stage: max(peaks) for stage, peaks in self.peaks.items()},
            "device_peak_bytes": self.device_peaks,
        }

    @staticmethod
    def _clear() -> bool:
        """Let VmHWM begin anew from what is resident; whether the system does that."""
        try:
            CLEAR_PEAK.write_text("5", encoding="ascii")
        except OSError:
            return False
        return True


def host_peak() -> int:
    """Largest resident set of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_peak() -> int | None:
    """Most bytes that the first device has held; None where it keeps no count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
