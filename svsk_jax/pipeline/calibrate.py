"""Measure a model on calibration text."""

import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from svsk_jax.calibration import store
from svsk_jax.calibration.block_inputs import SPILL, BlockInputs
from svsk_jax.calibration.chunks import calibration_chunks
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.experts import describe_starved
from svsk_jax.calibration.mixture import Chunks, check_chunks
from svsk_jax.calibration.passes import Walk
from svsk_jax.calibration.programs import of_walk
from svsk_jax.calibration.statistics import chunks_of_batch
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import input_widths, layer_kinds, layer_linears
from svsk_jax.model.source import ModelSource
from svsk_jax.parallel import make_mesh
from svsk_jax.parallel.distributed import agree, barrier, is_lead
from svsk_jax.pipeline.allocator import give_back_freed_arrays
from svsk_jax.pipeline.checks import default_dtype, files_bytes, refuse_packed, require_space
from svsk_jax.pipeline.compile_ahead import together
from svsk_jax.pipeline.identity import calibration_identity
from svsk_jax.pipeline.measuring import Measuring
from svsk_jax.pipeline.memory import Machine, MemoryPlan, chunk_length, plan_calibration
from svsk_jax.pipeline.progress import OnProgress, Stopwatch
from svsk_jax.pipeline.run import CalibrationRun, discard, unfinished_run
from svsk_jax.pipeline.working_sets import WRITTEN_AT_ONCE
from svsk_jax.quant.half_moment import half_size
from svsk_jax.quant.types import SENSITIVITY_TILE
from svsk_jax.storage.atomic import recover
from svsk_jax.storage.behind import Behind
from svsk_jax.storage.durable import make_folder
from svsk_jax.storage.lock import locked


def calibrate(
    source: ModelSource,
    output: Path,
    calibration: CalibrationConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    dtype: DTypeLike | None = None,
    chunks: Chunks | None = None,
    mesh: Mesh | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure the second moments of every linear's input and the model's sensitivity to its output, and store
    them under `output` for `quantize`.

    The text, every finished layer's statistics and, as often as it costs a tenth of the time at most, what is
    needed to go on from there are on the disk, beside `output` (`pipeline.run`). When the run ends early, in
    whatever way, it can be taken up with `resume`: the statistics are the same bytes.

    Args:
        source: the unquantized model.
        output: folder to make; it appears only when whole.
        calibration: the text, and what is measured on it.
        overwrite: replace statistics that svsk wrote, or an unfinished run; with `resume`, only one of
            something else.
        resume: go on with an unfinished run of the same model, text, settings, devices and versions, if there
            is one. A finished one is left as it is.
        dtype: of the activations; default f32 on CPU, bf16 elsewhere.
        chunks: tokens to measure on, in place of the text, number and length that `calibration` names.
        mesh: `data` × `model` devices to work on; default all, along `data`.
        max_memory: bytes that may be held (`pipeline.memory`); batches are then no larger than fits, and
            residual streams go where there is room.
        on_progress: called after each layer of each pass.

    Returns:
        The manifest: model, text, chunks, wall time by stage (of the part since a resume), and by layer the
        experts that had too few tokens for statistics of their own (`calibration.experts`), of which a
        warning tells too.

    Raises:
        ValueError: text too short, chunks that are no tokens, model already quantized, an unfinished run of
            something else or a damaged one, more memory needed than `max_memory`.
        FileExistsError: `output` exists, an unfinished run for it does, or another run is writing to it.
        OSError: too little disk space.
    """
    watch = Stopwatch()
    give_back_freed_arrays()
    dtype = default_dtype() if dtype is None else dtype
    mesh = make_mesh() if mesh is None else mesh
    if chunks is not None:
        check_chunks(chunks)
        count, length = chunks.ids.shape
        calibration = dataclasses.replace(
            calibration,
            chunks=count,
            chunk_length=length,
            fisher_chunks=min(calibration.fisher_chunks, count),
        )
    run = CalibrationRun(output)
    has_text = chunks is not None or run.text.is_file()
    machine = Machine.of(mesh, dtype)
    memory = plan_calibration(source.config, calibration, machine, max_memory, has_text=has_text)
    calibration = dataclasses.replace(calibration, batch_tokens=memory.batch_tokens)
    identity = calibration_identity(source, calibration, chunks, mesh, dtype=dtype)
    with locked(output) if is_lead() else nullcontext():
        if is_lead():
            recover(run.output)
        if not (resume and agree(lambda: _finished(run, identity))):
            with unfinished_run(run, identity, overwrite=overwrite, resume=resume):
                if is_lead():
                    _clear_up(run)
                    states = 2 * streams_bytes(source.config, calibration, dtype)
                    needed = statistics_bytes(source.config, calibration) + states
                    require_space(output, needed - files_bytes(run.folder))
                with ExitStack() as beside:
                    manifest = _measure(
                        run, source, calibration, dtype, chunks, mesh, memory, watch, on_progress, beside
                    )
                if is_lead():
                    store.finish(run.made, {**manifest, "run": identity})
                    run.finish()
                barrier()
    return dict(store.Statistics.open(output).manifest)


def _measure(
    run: CalibrationRun,
    source: ModelSource,
    calibration: CalibrationConfig,
    dtype: DTypeLike,
    given: Chunks | None,
    mesh: Mesh,
    memory: MemoryPlan,
    watch: Stopwatch,
    on_progress: OnProgress | None,
    beside: ExitStack,
) -> dict[str, Any]:
    """Measure what is not yet measured; what the manifest says of it. What goes on meanwhile is left to
    `beside`."""
    ahead = _compile_ahead(source.config, calibration, dtype, mesh)
    has_text = given is not None or run.text.is_file()
    if has_text:
        beside.enter_context(ahead)
    outer = source.outer(dtype)
    refuse_packed(source, outer)
    watch.lap("load")

    def make_text() -> dict[str, int]:
        chunks = store.kept_chunks(run.text, lambda: given or calibration_chunks(source, calibration, dtype))
        store.write_tokens(run.made, chunks.ids)
        return dict(chunks.counts)

    counts = agree(make_text)
    ids = store.read_tokens(run.made)
    watch.lap("text")
    if not has_text:
        # Not before: a model that writes its own text takes most of the memory.
        beside.enter_context(ahead)
    with Behind(WRITTEN_AT_ONCE) as writer, BlockInputs(memory.store_bytes, run.folder) as kept:
        streams = kept if memory.streams == "store" else None
        walk = Walk(source, outer, ids, memory.batch_tokens, dtype, mesh, streams)
        del outer
        starved = Measuring(run, walk, calibration, kept, writer, watch, on_progress).all()
    text = {
        "calib": {_public_name(name): count for name, count in counts.items()},
        "chunks": ids.shape[0],
        "chunk_length": ids.shape[1],
        "moments": calibration.moments,
        "fisher_chunks": walk.kept_chunks,
        "seed": calibration.seed,
    }
    if starved:
        assert source.config.mixture is not None
        warnings.warn(describe_starved(starved, source.config.mixture.num_experts), stacklevel=3)
        text["pooled_experts"] = starved
    return {
        "model": source.description,
        "fingerprint": source.fingerprint(),
        "text": text,
        "seconds": watch.seconds,
    }


def _compile_ahead(
    model: ModelConfig, calibration: CalibrationConfig, dtype: DTypeLike, mesh: Mesh
) -> AbstractContextManager[None]:
    """What compiles the walk's programs while embedding, head and first layer are read. Not on a CPU, which
    has no core free for it."""
    if mesh.devices.flat[0].platform == "cpu":
        return nullcontext()
    length = chunk_length(model, calibration)
    size = chunks_of_batch(calibration.chunks, length, calibration.batch_tokens, mesh)
    return together(
        of_walk(
            model,
            mesh,
            dtype,
            (size, length),
            calibration.moments == "full",
            calibration.measures_sensitivity,
            calibration.seed,
        )
    )


def _finished(run: CalibrationRun, identity: Mapping[str, Any]) -> bool:
    """Whether this very run had finished; what its end left to remove is removed."""
    try:
        manifest = store.Statistics.open(run.output).manifest
    except ValueError:
        return False
    if manifest.get("run") != identity:
        return False
    discard(run.folder)
    return True


def _clear_up(run: CalibrationRun) -> None:
    """Make a run's folder for statistics, and remove what a process that was killed left half done."""
    make_folder(run.made)
    partial = run.walk.glob("*.partial")
    for left in [*run.folder.glob(f"{SPILL}*"), *run.made.glob(f".{store.MANIFEST}*"), *partial]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _public_name(name: str) -> str:
    """A source's name, or the last part of a path."""
    return Path(name).name


def streams_bytes(model: ModelConfig, calibration: CalibrationConfig, dtype: DTypeLike) -> int:
    """Bytes of the residual streams of all chunks."""
    tokens = calibration.chunks * chunk_length(model, calibration)
    return tokens * model.hidden_size * jnp.dtype(dtype).itemsize


def statistics_bytes(model: ModelConfig, calibration: CalibrationConfig) -> int:
    """Bytes that the statistics of a model take on disk."""
    width = model.hidden_size
    head = 4 * (half_size(width) if calibration.moments == "full" else width)
    layers = layer_kinds(model).items()
    return head + sum(count * _layer_bytes(model, index, calibration) for index, count in layers)


def _layer_bytes(model: ModelConfig, index: int, calibration: CalibrationConfig) -> int:
    widths = input_widths(model, index).values()
    if calibration.moments == "diagonal":
        return 4 * sum(widths)
    moments = sum(half_size(width) for width in widths)
    blocks = 0
    if calibration.measures_sensitivity:
        heights = [n for n, _ in layer_linears(model, index).values()]
        blocks = sum(int(np.ceil(n / SENSITIVITY_TILE)) * min(n, SENSITIVITY_TILE) ** 2 for n in heights)
        moments *= 2
    return 4 * (moments + blocks)
