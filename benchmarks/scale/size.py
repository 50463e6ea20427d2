"""Seconds and peak memory of calibrating and quantizing, against the size of the model and the number of
devices, beside what the memory plan predicts.

    python -m benchmarks.scale.size [--widths 128 256 384 512] [--devices 1 2 4 8] [--json results.json]
        [--threads 4] [--plot size.svg]
    python -m benchmarks.scale.size --model MODEL [--chunks 16] [--length 512] [--max-memory GB]

Models of four layers and growing width, with random weights, are written to a temporary folder (safetensors,
bf16), calibrated on random tokens and quantized with the default recipe, on a CPU, each in a process of its
own. The second of them is also calibrated over several devices: fake ones, which share cores and memory, so
that copies count and time does not fall. Seconds of a layer are the median of a stage's layers but the first,
which compiles most of the programs, though not all. Memory is the process's largest resident set in a stage
(VmHWM, begun anew with each layer; Linux), beyond what it is after importing everything and one small
computation. With --model it is one run of that model. --threads keeps all of it to some of the cores, so that
others' work on the rest disturbs times less.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.scale.meter import Meter
from benchmarks.scale.pinned import pin
from benchmarks.scale.size_report import markdown, plot
from benchmarks.speed.block import write_checkpoint
from svsk_jax import CalibrationConfig, Statistics, calibrate, open_model, quantize, recipe
from svsk_jax.calibration.mixture import Chunks
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import layer_shapes, parameter_shapes
from svsk_jax.pipeline.memory import Machine, MemoryPlan, gigabytes, plan_run
from svsk_jax.storage.atomic import write_json
from svsk_jax.xla_flags import take_library_products

RECIPE = "svsk-r16"
WIDTHS = (128, 256, 384, 512)
DEVICES = (1, 2, 4, 8)
LENGTH = 256
"""Tokens of a chunk."""


def config_of(width: int, layers: int = 4) -> ModelConfig:
    """A Llama of this width."""
    return ModelConfig(
        architecture="llama",
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def calibration_of(chunks: int, length: int) -> CalibrationConfig:
    """What is measured on so many chunks."""
    return CalibrationConfig(chunks=chunks, chunk_length=length, fisher_chunks=chunks // 2)


def measure(model: str, chunks: int, length: int, limit: int | None, quantizes: bool) -> dict[str, Any]:
    """Calibrate on random tokens, with all devices of this process along `data`, and quantize."""
    source = open_model(model)
    jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    gc.collect()
    meter = Meter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = np.random.default_rng(1).integers(0, source.config.vocab_size, (chunks, length), np.int32)
        calibrate(
            source,
            folder / "statistics",
            calibration_of(chunks, length),
            chunks=Chunks(ids=ids, counts={"random tokens": chunks}),
            max_memory=limit,
            on_progress=meter,
        )
        if quantizes:
            quantize(
                source,
                folder / "out",
                recipe(RECIPE),
                recipe=RECIPE,
                statistics=Statistics.open(folder / "statistics"),
                max_memory=limit,
                on_progress=meter,
            )
    return {"devices": jax.device_count(), **meter.found()}


def predicted(config: ModelConfig, devices: int, chunks: int, length: int, limit: int | None) -> MemoryPlan:
    """The plan that such a run on a CPU follows, with the peaks of all its stages."""
    machine = Machine(
        platform="cpu", devices=devices, model=1, copies=devices, itemsize=np.dtype(np.float32).itemsize
    )
    return plan_run(config, calibration_of(chunks, length), machine, limit, has_text=True)


def run(arguments: argparse.Namespace, model: str, devices: int, quantizes: bool) -> dict[str, Any]:
    """One model in a process of its own, beside its prediction."""
    limit = gigabytes(arguments.max_memory)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        settings = [
            model,
            arguments.chunks,
            arguments.length,
            "" if limit is None else limit,
            quantizes,
            found,
        ]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.scale.size", "--within", *map(str, settings)],
            check=True,
            env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        )
        row = json.loads(found.read_text(encoding="utf-8"))
    config = open_model(model).config
    plan = predicted(config, devices, arguments.chunks, arguments.length, limit)
    row |= {
        "parameters": sum(int(np.prod(shape)) for shape in parameter_shapes(config).values()),
        "layer_parameters": sum(int(np.prod(shape)) for shape in layer_shapes(config, 0).values()),
        "memory_plan": dataclasses.asdict(plan),
    }
    print(json.dumps({key: row[key] for key in ("parameters", "devices", "peak_bytes")}), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--devices", type=int, nargs="*", default=DEVICES, help="may be none")
    parser.add_argument("--model", default=None, help="one run of this model instead")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a chunk")
    parser.add_argument("--threads", type=int, default=None, help="CPU cores that are used; default all")
    parser.add_argument("--max-memory", type=float, default=None, help="as of `svsk quantize`")
    parser.add_argument("--note", default=None, help="what else the machine was doing")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="SVG to draw")
    parser.add_argument("--within", nargs=6, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.within:
        model, chunks, length, limit, quantizes, found = arguments.within
        take_library_products()
        row = measure(model, int(chunks), int(length), int(limit) if limit else None, quantizes == "True")
        write_json(Path(found), row)
        return
    pin(arguments.threads)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, cpu",
        "versions": {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        "recipe": RECIPE,
        "tokens": arguments.chunks * arguments.length,
        "note": arguments.note,
    }
    report["sizes"] = []
    if arguments.model:
        report |= {"model": Path(arguments.model).name}
        report["sizes"].append(run(arguments, arguments.model, 1, True))
    else:
        for width in arguments.widths:
            report["sizes"].append(synthetic(arguments, width, 1, True))
            keep(report, arguments.json)
        for count in arguments.devices:
            found = synthetic(arguments, arguments.widths[:2][-1], count, False)
            report.setdefault("by_devices", []).append(found)
            keep(report, arguments.json)
    keep(report, arguments.json)
    print(markdown(report))
    if arguments.plot:
        plot(report, arguments.plot)


def keep(report: dict[str, Any], path: Path | None) -> None:
    """Write what there is by now: the machine's time may end before the benchmark does."""
    if path:
        write_json(path, report)


def synthetic(arguments: argparse.Namespace, width: int, devices: int, quantizes: bool) -> dict[str, Any]:
    """A run of a random model of this width."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config_of(width))
        return run(arguments, folder, devices, quantizes)


if __name__ == "__main__":
    main()
