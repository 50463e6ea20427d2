"""Calibrate and quantize the first layers of a large model on this machine, and estimate the whole.

    python -m benchmarks.speed.block [--model Qwen3-8B] [--layers 6] [--chunks 128] [--json results.json]

A checkpoint of `--layers` layers of the model's shapes, with random weights, is written to a temporary folder
(safetensors, bf16, as the hub has them) and goes through `svsk calibrate` and `svsk quantize` as they are;
the text is random tokens. Stages as in quantize.py. The first layers of a stage compile, or wait for what is
compiled meanwhile; the whole model is estimated as all of these layers and as many as are left of the later
half's mean, besides what is done once. (A layer may end while the next one is booked. The last of a stage
waits for the files of those before it too, and counts once.)
Memory is the accelerator's peak by the end of each stage, where it keeps count, beside what the memory plan
(`svsk plan`) predicts for the stage, and what of the whole run's peak lies beyond one layer's weights. A peak
is never forgotten: a stage that needed less than one before it shows that one's.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.speed.quantize import device_peak_mb, peak_mb
from convert.names import source_names
from svsk_jax import CalibrationConfig, Statistics, calibrate, open_model, quantize, recipe
from svsk_jax.calibration.mixture import Chunks
from svsk_jax.known_models import KNOWN
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import layer_shapes, parameter_shapes
from svsk_jax.pipeline.memory import Machine, plan_run
from svsk_jax.pipeline.progress import Progress
from svsk_jax.storage.atomic import write_json
from svsk_jax.xla_flags import take_library_products

LENGTH = 512
"""Tokens of a chunk."""


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """A checkpoint folder of random weights ~ N(0, 1/in), norms of 1, and a tokenizer of one token."""
    names = source_names(config, "hf")
    rng = np.random.default_rng(0)
    tensors = {}
    for path, shape in parameter_shapes(config).items():
        value = np.ones(shape, np.float32)
        if len(shape) == 2:
            value = rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
        tensors[names[path].hf] = value.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config.to_hf())
    tokenizer = Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(str(folder))


class Laps:
    """Wall time that each layer of each stage took, and the device's peak memory by the end of each stage."""

    def __init__(self):
        self.done: dict[str, list[float]] = {}
        self.peaks: dict[str, float | None] = {}
        self._mark = time.perf_counter()

    def __call__(self, event: Progress) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.done.setdefault(event.stage, []).append(now - self._mark)
        self._mark = now
        self.peaks[event.stage] = device_peak_mb()
        print(f"  {event.stage:<12} layer {event.layer}: {self.done[event.stage][-1]:7.2f} s", flush=True)


def whole(stages: dict[str, list[float]], layers: int) -> dict[str, float]:
    """Seconds of each stage for a model of so many layers."""
    return {
        stage: sum(each) + (layers - len(each)) * statistics.fmean(each[len(each) // 2 : -1] or each[-1:])
        for stage, each in stages.items()
    }


def highest(peaks: dict[str, float | None]) -> str | None:
    """The stage that made the peak: the first by whose end it was reached."""
    known = {stage: peak for stage, peak in peaks.items() if peak is not None}
    return max(known, key=lambda stage: known[stage], default=None)


def predicted_peaks_mb(config: ModelConfig, chunks: int) -> dict[str, float]:
    """What the memory plan says of each stage, on the devices that there are."""
    calibration, machine = CalibrationConfig(chunks=chunks, chunk_length=LENGTH), Machine.of()
    peaks = plan_run(config, calibration, machine, has_text=True).peaks
    return {stage: peak / 1e6 for stage, peak in peaks.items()}


def measure(config: ModelConfig, name: str, layers: int, chunks: int, work: Path) -> dict[str, Any]:
    """Run the stages; prints as it goes."""
    few = dataclasses.replace(config, num_layers=layers)
    model, measured = work / "model", work / "statistics"
    model.mkdir()
    write_checkpoint(model, few)
    ids = np.random.default_rng(1).integers(0, few.vocab_size, (chunks, LENGTH), np.int32)
    text = Chunks(ids=ids, counts={"random tokens": chunks})
    source, laps = open_model(str(model)), Laps()
    manifest = calibrate(source, measured, CalibrationConfig(), chunks=text, on_progress=laps)
    result = quantize(
        source,
        work / "out",
        recipe(name),
        recipe=name,
        statistics=Statistics.open(measured),
        on_progress=laps,
    )
    block = 2 * sum(int(np.prod(shape)) for shape in layer_shapes(few, 0).values()) / 1e6
    once = {
        "load": manifest["seconds"].get("load", 0.0) + result.seconds.get("load", 0.0),
        "write": result.seconds.get("write", 0.0),
    }
    estimate = whole(laps.done, config.num_layers)
    peak = device_peak_mb()
    predicted = predicted_peaks_mb(few, chunks)
    ratios = {stage: found / predicted[stage] for stage, found in laps.peaks.items() if found is not None}
    return {
        "seconds_by_layer": laps.done,
        "seconds_in_all": {"calibrate": manifest["seconds"], "quantize": result.seconds},
        "once_or_overlapped": once,
        "estimate_seconds": {**estimate, "total": sum(estimate.values())},
        "device_peak_mb": peak,
        "device_peak_mb_by_the_end_of": laps.peaks,
        "predicted_peak_mb": predicted,
        "device_peak_to_predicted": ratios,
        "stage_of_the_peak": highest(laps.peaks),
        "device_peak_mb_beyond_a_layer": None if peak is None else peak - block,
        "host_peak_mb": peak_mb(),
        "linear_bits_per_weight": result.budget.linear_bits,
        "layer_errors": result.errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.block",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="Qwen3-8B", choices=sorted(KNOWN))
    parser.add_argument("--recipe", default="svsk-r16")
    parser.add_argument("--layers", type=int, default=6, help="2 or more")
    parser.add_argument("--chunks", type=int, default=128)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.layers < 2:
        parser.error(f"--layers {arguments.layers}: expected 2 or more, since the first one compiles")
    take_library_products()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        "model": arguments.model,
        "recipe": arguments.recipe,
        "tokens": arguments.chunks * LENGTH,
    }
    print(f"{arguments.recipe}, {arguments.model}, on {report['machine']}, {report['date']}")
    with tempfile.TemporaryDirectory() as folder:
        report |= measure(
            KNOWN[arguments.model], arguments.recipe, arguments.layers, arguments.chunks, Path(folder)
        )
    for stage, seconds in report["estimate_seconds"].items():
        print(f"  {arguments.model}, estimated: {stage:<12} {seconds:8.1f} s")
    for stage, ratio in report["device_peak_to_predicted"].items():
        found, predicted = report["device_peak_mb_by_the_end_of"][stage], report["predicted_peak_mb"][stage]
        print(f"  peak by the end of {stage:<12} {found:8.0f} MB, predicted {predicted:8.0f} MB, {ratio:.2f}")
    for what in ("device_peak_mb", "stage_of_the_peak", "device_peak_mb_beyond_a_layer", "host_peak_mb"):
        print(f"  {what}: {report[what]}")
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
