"""The table of the benchmark of stages: memory beyond the baseline in MB, `host` of the worst layer."""

from collections.abc import Iterator, Mapping
from typing import Any

HEADER = [
    "stage",
    "layers",
    "s",
    "host, MB",
    "its last layer",
    "device, MB",
    "predicted, MB",
    "measured / predicted",
]


def stages(processes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each stage of each process: its layers, seconds, peaks, and what was predicted for the memory that the
    plan is about: an accelerator's, or the process's.

    A peak that does not begin anew with a stage is held against the largest prediction so far.
    """
    for found in processes.values():
        largest = 0
        for stage, seconds in found.get("seconds_by_layer", {}).items():
            on_device = found["device_peak_bytes"].get(stage)
            largest = max(largest, found["predicted_bytes"][stage])
            anew = found["begins_anew"] and on_device is None
            bound = found["predicted_bytes"][stage] if anew else largest
            measured = found["peak_bytes"][stage] if on_device is None else on_device
            yield {
                "stage": stage,
                "layers": len(seconds),
                "seconds": sum(seconds),
                "host": found["peak_bytes"][stage],
                "last": found["peak_bytes_by_layer"][stage][-1],
                "device": on_device,
                "predicted": bound,
                "ratio": measured / bound,
            }


def markdown(report: Mapping[str, Any]) -> str:
    """The table; `report` as `benchmarks.scale.stages` writes it to JSON."""
    lines = [HEADER, ["---:"] * len(HEADER)]
    for row in stages(report["processes"]):
        device = "" if row["device"] is None else f"{row['device'] / 1e6:.0f}"
        lines.append(
            [
                row["stage"],
                f"{row['layers']} of {report['layers']}",
                f"{row['seconds']:.0f}",
                f"{row['host'] / 1e6:.0f}",
                f"{row['last'] / 1e6:.0f}",
                device,
                f"{row['predicted'] / 1e6:.0f}",
                f"{row['ratio']:.2f}",
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    failed = [
        f"{name}: {found['error']}\n" for name, found in report["processes"].items() if "error" in found
    ]
    return f"{report['parameters']:,} parameters\n\n{table}\n" + "".join(failed)
