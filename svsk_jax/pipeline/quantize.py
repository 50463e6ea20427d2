"""Quantize a model."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.model.parameters import linear_inputs, parameter_shapes, quantized_paths
from svsk_jax.model.source import ModelSource
from svsk_jax.parallel.distributed import agree, barrier, is_lead
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.pipeline.allocator import give_back_freed_arrays
from svsk_jax.pipeline.calibrate import calibrate
from svsk_jax.pipeline.checks import (
    default_dtype,
    files_bytes,
    refuse_packed,
    refuse_polish,
    require_space,
)
from svsk_jax.pipeline.compile_ahead import compile_ahead
from svsk_jax.pipeline.identity import run_identity
from svsk_jax.pipeline.layer_statistics import statistics_ahead
from svsk_jax.pipeline.layers import LayerTotals, named, nbytes, on_first_device, quantize_layers
from svsk_jax.pipeline.memory import Machine, plan_quantization, plan_run
from svsk_jax.pipeline.metadata import origin
from svsk_jax.pipeline.outer import store_outer
from svsk_jax.pipeline.plan import Plan, drafted, is_measured, layers_ahead, plan_model
from svsk_jax.pipeline.polish import polish
from svsk_jax.pipeline.progress import OnProgress, Progress, Stopwatch, geometric_mean
from svsk_jax.pipeline.quantize_layer import layer_errors, quantize_layer
from svsk_jax.pipeline.run import Run, discard, run_folder, unfinished_run
from svsk_jax.quant.budget import Budget, predict
from svsk_jax.quant.row_parts import Devices
from svsk_jax.quant.types import QuantConfig
from svsk_jax.storage.atomic import recover
from svsk_jax.storage.checkpoint import ModelWriter, SavedModel, StoredLayer, is_saved_model
from svsk_jax.storage.lock import locked


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What a quantization run made."""

    output: Path
    budget: Budget
    errors: dict[str, float]
    """Layer error of each decoder linear by path."""
    predicted_nats: float | None
    """Predicted KL divergence per token of the decoder linears' errors together, where sensitivities are
    known; before any polish."""
    seconds: dict[str, float]
    """Wall time of each stage."""

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "output": str(self.output),
            "linear_bits_per_weight": self.budget.linear_bits,
            "file_bits_per_weight": self.budget.total_bits,
            "bytes": self.budget.total_bytes,
            "layer_errors": self.errors,
            "geometric_mean_layer_error": geometric_mean(list(self.errors.values())),
            "predicted_nats": self.predicted_nats,
            "seconds": self.seconds,
        }


def quantize(
    source: ModelSource,
    output: Path,
    config: QuantConfig | Plan,
    *,
    recipe: str,
    calibration: CalibrationConfig | None = None,
    statistics: Statistics | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress | None = None,
) -> QuantizeResult:
    """Quantize a model into the folder `output`, layer by layer.

    Every finished layer is on the disk, beside `output` (`pipeline.run`), before the next one is begun. When
    the run ends early, in whatever way, it can be taken up with `resume`: the result is the same bytes.
    Finished are then the text, each layer's statistics, its options, and each layer; polish is done again.

    Args:
        source: the unquantized model.
        output: folder to make; it appears only when whole.
        config: the recipe's configuration, or the whole plan of an earlier `autotune`.
        recipe: its name, for the metadata.
        calibration: text to calibrate on, unless `statistics` of an earlier run are given.
        statistics: from `calibrate` on the same model.
        overwrite: replace a model that svsk wrote, or an unfinished run; with `resume`, only one of something
            else.
        resume: go on with an unfinished run of the same model, text, recipe and versions, if there is one. A
            finished one is left as it is.
        dtype: of the calibration passes; default f32 on CPU, bf16 elsewhere.
        mesh: `data` × `model` devices. Layers are divided over `data`, and of each its linears' rows over
            `model`; that changes no byte, but for products that a GPU may round otherwise. Default:
            calibrates on all devices along `data`, quantizes as `DeviceGroups.of` has it.
        max_memory: bytes that may be held (`pipeline.memory`); calibration keeps within it.
        on_progress: called after each layer of each stage.

    Raises:
        ValueError: text too short, statistics of another model or too poor for the recipe, model already
            quantized, bad weights, an unfinished run of something else, more memory needed than `max_memory`.
        NotImplementedError: a recipe with polish for a mixture of experts.
        FileExistsError: `output` exists, an unfinished run for it does, or another run is writing to it.
        OSError: too little disk space.
    """
    watch = Stopwatch()
    give_back_freed_arrays()
    dtype = default_dtype() if dtype is None else dtype
    settings = config.config if isinstance(config, Plan) else config
    if isinstance(config, Plan):
        config.check_model(source.config)
    refuse_polish(recipe, settings, source.config)
    calibration = (calibration or CalibrationConfig()).needed_by(settings)
    machine = Machine.of(mesh, dtype)
    if statistics is not None:
        plan_quantization(source.config, machine, max_memory)
        statistics.check_model(source.fingerprint(), source.description)
    else:
        has_text = Run(output).calibration.text.is_file()
        fits = plan_run(source.config, calibration, machine, max_memory, has_text=has_text)
        calibration = dataclasses.replace(calibration, batch_tokens=fits.batch_tokens)
    identity = run_identity(source, config, statistics or calibration, recipe=recipe, dtype=dtype)
    budget = predict(parameter_shapes(source.config), quantized_paths(source.config), settings)
    groups = DeviceGroups.of(mesh)
    with locked(output) if is_lead() else nullcontext():
        if is_lead():
            recover(output)
        if resume and agree(lambda: _finished(output, identity, budget) is not None):
            return _result(output, budget)
        with unfinished_run(Run(output), identity, overwrite=overwrite, resume=resume) as run:
            if is_lead():
                require_space(output, budget.total_bytes - files_bytes(run.model.folder))
            if statistics is None:
                if not agree(lambda: run.has_statistics):
                    watch.seconds |= _calibrate(
                        run, source, calibration, dtype, mesh, max_memory, on_progress
                    )
                    watch.restart()
                statistics = Statistics.open(run.statistics)
            statistics.check_layers(source.config)
            settings = within(settings, statistics)
            strong, own = settings.scales == "two_level", groups.own(source.config.num_layers)
            measures = strong and not (isinstance(config, Plan) or is_measured(run.options, own))
            quantizes = strong and not run.is_quantized(own, settings.polish > 0)
            with compile_ahead(
                source.config, settings if quantizes else None, drafted(settings) if measures else None
            ):
                outer = source.outer(dtype)
                refuse_packed(source, outer)
                watch.lap("load")
                stored_outer = store_outer(outer, source.config, settings, statistics) if is_lead() else {}
                del outer
                watch.lap("quantize")
            if isinstance(config, Plan):
                plan = config
            else:
                plan = plan_model(
                    source,
                    statistics,
                    settings,
                    recipe=recipe,
                    dtype=dtype,
                    work=run.options,
                    groups=groups,
                    on_progress=on_progress,
                )
            watch.lap("plan")
            totals, drafts = _quantize_layers(run, source, statistics, plan, groups, dtype, on_progress)
            watch.lap("quantize")
            if is_lead():
                errors = {name: error for each in totals for name, error in each.errors.items()}
                if settings.polish:
                    errors |= _polished_errors(
                        run.model, source, drafts, statistics, settings.polish, dtype, on_progress
                    )
                    watch.lap("polish")
                actual = dataclasses.replace(
                    budget,
                    linear_bytes=sum(each.linear_bytes for each in totals),
                    total_bytes=nbytes(stored_outer) + sum(each.total_bytes for each in totals),
                )
                predicted = sum(each.predicted_nats for each in totals)
                metadata = _metadata(settings, statistics, actual, predicted)
                run.model.outer(
                    stored_outer, source, {"recipe": recipe, **metadata, "run": identity, **origin(source)}
                )
                run.finish()
                watch.lap("write")
            barrier()
    return dataclasses.replace(_result(output, budget), seconds=watch.seconds)


def _quantize_layers(
    run: Run,
    source: ModelSource,
    statistics: Statistics,
    plan: Plan,
    groups: DeviceGroups,
    dtype: DTypeLike,
    on_progress: OnProgress | None,
) -> tuple[list[LayerTotals], list[dict[str, Any]]]:
    """Quantize and write the layers that the run has not; in order, what the metadata tell of each layer and,
    in the process that polishes, if any does, each one's parameters."""
    polishes, layers = plan.config.polish > 0, source.config.num_layers
    writer = run.drafts if polishes else run.model
    totals: dict[int, LayerTotals] = {}
    drafts: dict[int, dict[str, Any]] = {}

    def layer_of(index: int, devices: Devices) -> StoredLayer:
        reads = linear_inputs(source.config, index)
        return quantize_layer(weights.take(index), ahead, index, reads, plan, devices)

    with (
        layers_ahead(source, dtype, groups) as weights,
        statistics_ahead(statistics, source.config, plan.config, groups) as ahead,
    ):
        for index, layer in quantize_layers(writer, run.handover, layers, layer_of, groups):
            totals[index] = LayerTotals.of(index, layer)
            if polishes and is_lead():
                drafts[index] = on_first_device(layer.parameters)
            if on_progress:
                so_far = [error for each in totals.values() for error in each.errors.values()]
                mean = geometric_mean(so_far)
                on_progress(Progress(stage="quantize", layer=len(totals), layers=layers, error=mean))
    return [totals[index] for index in sorted(totals)], [drafts[index] for index in sorted(drafts)]


def _calibrate(
    run: Run,
    source: ModelSource,
    calibration: CalibrationConfig,
    dtype: DTypeLike,
    mesh: Mesh | None,
    max_memory: int | None,
    on_progress: OnProgress | None,
) -> dict[str, float]:
    """Measure what the run has no statistics of yet; the wall seconds of each stage."""
    manifest = calibrate(
        source,
        run.statistics,
        calibration,
        # Over other devices than an unfinished calibration, it starts over.
        overwrite=True,
        resume=True,
        dtype=dtype,
        mesh=mesh,
        max_memory=max_memory,
        on_progress=on_progress,
    )
    return manifest["seconds"]


def _metadata(
    settings: QuantConfig, statistics: Statistics, made: Budget, predicted_nats: float
) -> dict[str, Any]:
    """What is told of how a model was made and of what came out."""
    known = statistics.has_sensitivity and settings.needs_sensitivity
    return {
        "quant_config": dataclasses.asdict(settings),
        "calibration": dict(statistics.manifest["text"]),
        "bits": {"decoder_linears": made.linear_bits, "whole_file": made.total_bits},
        "bytes": {"decoder_linears": made.linear_bytes, "whole_file": made.total_bytes},
        "predicted_nats": predicted_nats if known else None,
    }


def _finished(output: Path, identity: Mapping[str, Any], budget: Budget) -> QuantizeResult | None:
    """The result of this very run, if it had finished; what its end left to remove is removed."""
    if not is_saved_model(output) or SavedModel(output).metadata.get("run") != identity:
        return None
    discard(run_folder(output))
    return _result(output, budget)


def _result(output: Path, budget: Budget) -> QuantizeResult:
    """What a finished run's metadata say."""
    saved = SavedModel(output)
    errors: dict[str, float] = {}
    for index in range(saved.config.num_layers):
        errors |= named(index, saved.layer_metadata(index)["errors"])
    stored = saved.metadata["bytes"]
    return QuantizeResult(
        output=output,
        budget=dataclasses.replace(
            budget, linear_bytes=stored["decoder_linears"], total_bytes=stored["whole_file"]
        ),
        errors=errors,
        predicted_nats=saved.metadata["predicted_nats"],
        seconds={},
    )


def _polished_errors(
    writer: ModelWriter,
    source: ModelSource,
    drafts: Sequence[dict[str, Any]],
    statistics: Statistics,
    steps: int,
    dtype: DTypeLike,
    on_progress: OnProgress | None,
) -> dict[str, float]:
    """Polish the layers and store them, unless all are stored; their layer errors by full path."""
    stored = [writer.read(index) for index in range(len(drafts))]
    errors: dict[str, float] = {}
    if all(stored):
        for index, layer in enumerate(stored):
            assert layer is not None
            errors |= named(index, layer.errors)
        return errors
    # Two polishes of one model may differ in their last bits: all layers come from the same one.
    writer.clear()
    for index, layer in enumerate(polish(source, drafts, statistics.tokens(), steps, dtype, on_progress)):
        reads = linear_inputs(source.config, index)
        found = layer_errors(source.layer(index, dtype), layer, statistics.layer(index), reads)
        errors |= named(index, found)
        writer.layer(index, layer, found)
    return errors


def within(config: QuantConfig, statistics: Statistics) -> QuantConfig:
    """The recipe as these statistics allow it."""
    if config.needs_full_moments and not statistics.has_full_moments:
        raise ValueError(
            f"--calib-stats {statistics.folder}: holds diagonals only, this recipe needs full second "
            "moments; run `svsk calibrate --moments full`"
        )
    if config.needs_sensitivity and not statistics.has_sensitivity:
        warnings.warn(
            "quantizing without the Fisher pass, in the plain metric: on SmolLM2-135M that costs a quarter "
            "more KL divergence; leave out --fisher off to have it",
            stacklevel=2,
        )
        return config.without_sensitivity()
    return config
