"""Seconds and peak memory of calibrating and quantizing, against the size of the model and the number of
devices, beside what the memory plan predicts.

    python -m benchmarks.scale.size [--widths 256 448 704 1024] [--devices 1 2 4 8] [--json results.json]
        [--plot size.svg]
    python -m benchmarks.scale.size --model MODEL [--chunks 16] [--max-memory GB]

Models of four layers and growing width, with random weights, are written to a temporary folder (safetensors,
bf16) and go through `svsk quantize` with the default recipe; the text is random tokens. Each run is a process
of its own. The smallest model is also run over several devices: on a CPU these are fake ones, which share its
cores and its memory, so that copies count and time does not fall. Memory is the process's largest resident
set in a stage (VmHWM, reset between stages; Linux), beyond what it is after importing everything and one small
computation. With --model it is one run of that model.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.scale.size_report import markdown, plot
from benchmarks.speed.block import write_checkpoint
from svsk_jax import CalibrationConfig, open_model, quantize, recipe
from svsk_jax.calibration.mixture import Chunks
from svsk_jax.calibration.store import kept_chunks
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import parameter_shapes
from svsk_jax.parallel import make_mesh
from svsk_jax.pipeline.memory import plan_memory
from svsk_jax.pipeline.progress import Progress
from svsk_jax.storage.atomic import write_json
from svsk_jax.xla_flags import take_library_products

RECIPE = "svsk-r16"
WIDTHS = (256, 448, 704, 1024)
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


class StagePeaks:
    """Largest resident set of each stage in bytes; called with each progress event."""

    def __init__(self):
        self.peaks: dict[str, int] = {}
        self._stage: str | None = None
        self.reset()

    @staticmethod
    def reset() -> None:
        """Let VmHWM begin anew from what is resident."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    @staticmethod
    def peak() -> int:
        """VmHWM in bytes."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def __call__(self, event: Progress) -> None:
        """Book the peak since the last event."""
        self.peaks[event.stage] = max(self.peaks.get(event.stage, 0), self.peak())
        self.reset()


def measure(model: str, chunks: int, length: int, max_memory: float | None) -> dict[str, Any]:
    """Calibrate and quantize a model on random tokens, with this process's devices along `data`."""
    source, mesh = open_model(model), make_mesh()
    config, settings = source.config, recipe(RECIPE)
    calibration = CalibrationConfig(chunks=chunks, chunk_length=length, fisher_chunks=chunks // 2)
    limit = None if max_memory is None else int(max_memory * 1e9)
    planned = plan_memory(config, settings, calibration, mesh, limit=limit, writes_text=False)
    jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    peaks = StagePeaks()
    baseline = peaks.peak()
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(1).integers(0, config.vocab_size, (chunks, length), np.int32)
        text = Path(folder) / "text"
        kept_chunks(text, lambda: Chunks(ids=ids, counts={"random tokens": chunks}))
        result = quantize(
            source,
            Path(folder) / "out",
            settings,
            recipe=RECIPE,
            calibration=calibration,
            keep_text=text,
            mesh=mesh,
            max_memory=limit,
            on_progress=peaks,
        )
    measured = {stage: peak - baseline for stage, peak in peaks.peaks.items()}
    predicted = {stage: planned.peaks[stage] for stage in measured}
    return {
        "parameters": sum(int(np.prod(shape)) for shape in parameter_shapes(config).values()),
        "devices": mesh.size,
        "tokens": chunks * length,
        "max_memory_gb": max_memory,
        "memory_plan": dataclasses.asdict(planned),
        "seconds": result.seconds,
        "baseline_bytes": baseline,
        "peak_bytes": measured,
        "predicted_bytes": predicted,
        "measured_over_predicted": max(measured.values()) / max(predicted.values()),
    }
