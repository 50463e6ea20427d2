"""Measure a model on calibration text."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from svsk_jax.calibration import store
from svsk_jax.calibration.block_inputs import BlockInputs
from svsk_jax.calibration.chunks import calibration_chunks
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.experts import (
    Starved,
    describe_starved,
    moments_by_expert,
    sensitivities_by_expert,
)
from svsk_jax.calibration.mixture import Chunks
from svsk_jax.calibration.passes import Walk
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import input_widths, layer_kinds, layer_linears
from svsk_jax.model.source import ModelSource
from svsk_jax.parallel.distributed import agree, barrier, is_lead
from svsk_jax.parallel.placement import readable
from svsk_jax.pipeline.checks import default_dtype, refuse_packed, require_space
from svsk_jax.pipeline.memory import Machine, plan_calibration
from svsk_jax.pipeline.progress import OnProgress, Progress, Stopwatch
from svsk_jax.quant.types import SENSITIVITY_TILE
from svsk_jax.storage.atomic import output_folder, partial_folder
from svsk_jax.storage.behind import OneBehind


def calibrate(
    source: ModelSource,
    output: Path,
    calibration: CalibrationConfig,
    *,
    overwrite: bool = False,
    dtype: DTypeLike | None = None,
    keep_text: Path | None = None,
    mesh: Mesh | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure the second moments of every linear's input and the model's sensitivity to its output, and store
    them under `output` for `quantize`.

    Args:
        source: the unquantized model.
        output: folder to make; it appears only when whole.
        calibration: the text, and what is measured on it.
        overwrite: replace statistics that svsk wrote.
        dtype: of the activations; default f32 on CPU, bf16 elsewhere.
        keep_text: file that keeps the chunks of tokens; those that an earlier run left there are taken as
            they are.
        mesh: `data` × `model` devices to work on; default all, along `data`.
        max_memory: bytes that may be held (`pipeline.memory`); batches are then no larger than fits, and
            residual streams go where there is room.
        on_progress: called after each layer of each pass.

    Returns:
        The manifest: model, text, chunks, wall time by stage, and by layer the experts that had too few
        tokens for statistics of their own (`calibration.experts`), of which a warning tells too.

    Raises:
        ValueError: text too short, model already quantized, more memory needed than `max_memory`.
        FileExistsError: `output` exists, or another run is writing to it.
        OSError: too little disk space.
    """
    watch = Stopwatch()
    dtype = default_dtype() if dtype is None else dtype
    has_text = keep_text is not None and keep_text.is_file()
    machine = Machine.of(mesh, dtype)
    memory = plan_calibration(source.config, calibration, machine, max_memory, has_text=has_text)
    with _shared_folder(output, overwrite) as folder:
        if is_lead():
            require_space(output, statistics_bytes(source.config, calibration))
        outer = source.outer(dtype)
        refuse_packed(source, outer)
        watch.lap("load")

        def make_text() -> dict[str, int]:
            chunks = _chunks(source, calibration, dtype, keep_text)
            store.write_tokens(folder, chunks.ids)
            return dict(chunks.counts)

        counts = agree(make_text)
        ids = store.read_tokens(folder)
        watch.lap("text")
        layers = source.config.num_layers

        def report(stage: str, done: int) -> None:
            watch.lap(stage)
            if on_progress:
                on_progress(Progress(stage=stage, layer=done, layers=layers))

        with OneBehind() as writer, BlockInputs(memory.store_bytes, folder) as kept:
            off_devices = kept if memory.streams == "store" else None
            walk = Walk(source, outer, ids, memory.batch_tokens, dtype, mesh, off_devices)
            del outer

            def write(how: Callable[..., None], index: int, *found: Any) -> None:
                whole = readable(found)
                if is_lead():
                    writer.submit(how, folder, index, *whole)

            sensitive = calibration.measures_sensitivity
            forwards = walk.forwards(
                calibration.moments == "full", kept if sensitive else None, calibration.fisher_chunks
            )
            starved: dict[str, Starved] = {}
            for index, found in forwards:
                moments, few = moments_by_expert(found)
                starved[f"layers.{index}"] = few
                write(store.write_moments, index, moments)
                report("calibrate", index + 1)
            writer.finish()
            watch.lap("calibrate")
            if sensitive:
                for index, of_outputs, of_inputs in walk.backwards(kept, calibration.seed):
                    sensitivities, few = sensitivities_by_expert(of_outputs)
                    weighted, few_weighted = moments_by_expert(of_inputs)
                    write(store.write_sensitivities, index, sensitivities, weighted)
                    starved[f"layers.{index}"] |= few | {
                        f"{store.WEIGHTED}{name}": numbers for name, numbers in few_weighted.items()
                    }
                    report("sensitivity", layers - index)
                writer.finish()
                watch.lap("sensitivity")
        starved = {layer: kinds for layer, kinds in starved.items() if kinds}
        if starved:
            assert source.config.mixture is not None
            warnings.warn(describe_starved(starved, source.config.mixture.num_experts), stacklevel=2)
        text = {
            "calib": {_public_name(name): count for name, count in counts.items()},
            "chunks": ids.shape[0],
            "chunk_length": ids.shape[1],
            "moments": calibration.moments,
            "fisher_chunks": walk.kept_chunks,
            "seed": calibration.seed,
        }
        if starved:
            text["pooled_experts"] = starved
        manifest = {
            "model": source.description,
            "fingerprint": source.fingerprint(),
            "text": text,
            "seconds": watch.seconds,
        }
        if is_lead():
            store.finish(folder, manifest)
    return manifest


@contextmanager
def _shared_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """The lead's `output_folder`, for every process; no process is done before it has its name."""
    if is_lead():
        with output_folder(output, overwrite=overwrite, marker=store.MANIFEST) as folder:
            barrier()
            yield folder
            barrier()
    else:
        barrier()
        yield partial_folder(output)
        barrier()
    barrier()


def _chunks(
    source: ModelSource, calibration: CalibrationConfig, dtype: DTypeLike, keep_text: Path | None
) -> Chunks:
    def make() -> Chunks:
        return calibration_chunks(source, calibration, dtype)

    return make() if keep_text is None else store.kept_chunks(keep_text, make)


def _public_name(name: str) -> str:
    """A source's name, or the last part of a path."""
    return Path(name).name


def statistics_bytes(model: ModelConfig, calibration: CalibrationConfig) -> int:
    """Bytes that the statistics of a model take on disk."""
    return sum(count * _layer_bytes(model, index, calibration) for index, count in layer_kinds(model).items())


def _layer_bytes(model: ModelConfig, index: int, calibration: CalibrationConfig) -> int:
    widths = input_widths(model, index).values()
    if calibration.moments == "diagonal":
        return 4 * sum(widths)
    moments = sum(width * width for width in widths)
    blocks = 0
    if calibration.measures_sensitivity:
        heights = [n for n, _ in layer_linears(model, index).values()]
        blocks = sum(int(np.ceil(n / SENSITIVITY_TILE)) * min(n, SENSITIVITY_TILE) ** 2 for n in heights)
        moments *= 2
    return 4 * (moments + blocks)
