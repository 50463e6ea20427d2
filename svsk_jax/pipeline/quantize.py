"""Quantize a model."""

import dataclasses
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.svsk_matmul import Int8Weight
from pallas_kernels.svsk_matmul.reference import dequantize
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.statistics import Moments
from svsk_jax.calibration.store import Statistics
from svsk_jax.model.parameters import LINEAR_INPUTS, QUANTIZED_LINEARS, parameter_shapes
from svsk_jax.model.source import ModelSource
from svsk_jax.pipeline.calibrate import calibrate
from svsk_jax.pipeline.checks import check_weight, default_dtype, refuse_packed, require_space
from svsk_jax.pipeline.metadata import origin
from svsk_jax.pipeline.plan import Plan, layer_metrics, plan_model
from svsk_jax.pipeline.polish import polish
from svsk_jax.pipeline.progress import OnProgress, Progress, Stopwatch, geometric_mean
from svsk_jax.quant.budget import Budget, predict
from svsk_jax.quant.error import layer_error
from svsk_jax.quant.int8 import quantize_int8
from svsk_jax.quant.joint import quantize_joint
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.types import QuantConfig
from svsk_jax.storage.atomic import check_output
from svsk_jax.storage.checkpoint import MARKER, writing

EMBEDDING_SLAB = 16384
"""Rows of an embedding that are quantized at once."""


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
    dtype: DTypeLike | None = None,
    on_progress: OnProgress | None = None,
) -> QuantizeResult:
    """Quantize a model into the folder `output`, layer by layer.

    Args:
        source: the unquantized model.
        output: folder to make; it appears only when whole.
        config: the recipe's configuration, or the whole plan of an earlier `autotune`.
        recipe: its name, for the metadata.
        calibration: text to calibrate on, unless `statistics` of an earlier run are given.
        statistics: from `calibrate` on the same model.
        overwrite: replace a model that svsk wrote.
        dtype: of the calibration passes; default f32 on CPU, bf16 elsewhere.
        on_progress: called after each layer of each stage.

    Raises:
        ValueError: text too short, statistics of another model or too poor for the recipe, model already
            quantized, bad weights.
        FileExistsError: `output` exists.
        OSError: too little disk space.
    """
    watch = Stopwatch()
    dtype = default_dtype() if dtype is None else dtype
    check_output(output, overwrite, MARKER)
    settings = config.config if isinstance(config, Plan) else config
    if isinstance(config, Plan):
        config.check_model(source.config)
    budget = predict(parameter_shapes(source.config), QUANTIZED_LINEARS, settings)
    require_space(output, budget.total_bytes)
    with tempfile.TemporaryDirectory(prefix=".statistics-", dir=_existing_parent(output)) as scratch:
        if statistics is None:
            calibration = _only_what_is_needed(calibration or CalibrationConfig(), settings)
            manifest = calibrate(
                source, Path(scratch) / "run", calibration, dtype=dtype, on_progress=on_progress
            )
            statistics = Statistics.open(Path(scratch) / "run")
            watch.seconds |= manifest["seconds"]
            watch.restart()
        statistics.check_model(source.fingerprint(), source.description)
        statistics.check_layers(source.config)
        settings = within(settings, statistics)
        with writing(output, overwrite=overwrite) as writer:
            outer = source.outer(dtype)
            refuse_packed(source, outer)
            watch.lap("load")
            stored_outer = _store_outer(outer, settings)
            del outer
            stored_bytes = _nbytes(stored_outer)
            watch.lap("quantize")
            if isinstance(config, Plan):
                plan = config
            else:
                plan = plan_model(
                    source, statistics, settings, recipe=recipe, dtype=dtype, on_progress=on_progress
                )
            watch.lap("plan")
            errors: dict[str, float] = {}
            predicted, linear_bytes = 0.0, 0
            held_back: list[dict[str, Any]] = []
            for index in range(source.config.num_layers):
                parameters = source.layer(index, dtype)
                watch.lap("load")
                stored, layer_errors, layer_nats = _quantize_layer(parameters, statistics, index, plan)
                watch.lap("quantize")
                if settings.polish:
                    held_back.append(stored)
                else:
                    writer.layer(index, stored, layer_errors)
                watch.lap("write")
                errors |= {f"layers.{index}.{name}": error for name, error in layer_errors.items()}
                predicted += layer_nats
                linear_bytes += sum(stored[f"{name}.weight"].nbytes for name in QUANTIZED_LINEARS)
                stored_bytes += _nbytes(stored)
                if on_progress:
                    mean = geometric_mean(list(errors.values()))
                    layers = source.config.num_layers
                    on_progress(Progress(stage="quantize", layer=index + 1, layers=layers, error=mean))
            if settings.polish:
                polished = polish(source, held_back, statistics.tokens(), settings.polish, dtype, on_progress)
                for index, stored in enumerate(polished):
                    layer_errors = _layer_errors(source.layer(index, dtype), stored, statistics.layer(index))
                    errors |= {f"layers.{index}.{name}": error for name, error in layer_errors.items()}
                    writer.layer(index, stored, layer_errors)
                watch.lap("polish")
            actual = dataclasses.replace(budget, linear_bytes=linear_bytes, total_bytes=stored_bytes)
            metadata = {
                "recipe": recipe,
                "quant_config": dataclasses.asdict(settings),
                "calibration": dict(statistics.manifest["text"]),
                "bits": {"decoder_linears": actual.linear_bits, "whole_file": actual.total_bits},
                "bytes": {"decoder_linears": actual.linear_bytes, "whole_file": actual.total_bytes},
                **origin(source),
            }
            writer.outer(stored_outer, source, metadata)
            watch.lap("write")
    known = statistics.has_sensitivity and settings.needs_sensitivity
    return QuantizeResult(
        output=output,
        budget=actual,
        errors=errors,
        predicted_nats=predicted if known else None,
        seconds=watch.seconds,
    )


def _existing_parent(output: Path) -> Path:
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    return parent


def _only_what_is_needed(calibration: CalibrationConfig, config: QuantConfig) -> CalibrationConfig:
    """Leave out what the recipe would not look at."""
    if not config.needs_full_moments:
        return dataclasses.replace(calibration, moments="diagonal", fisher="off")
    if not config.needs_sensitivity:
        return dataclasses.replace(calibration, fisher="off")
    return calibration


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


def _quantize_layer(
    parameters: Mapping[str, Any], statistics: Statistics, index: int, plan: Plan
) -> tuple[dict[str, Any], dict[str, float], float]:
    """The stored parameters of a layer, the layer error of each of its linears, and their predicted nats."""
    linears = {f"{name}.weight": name for name in QUANTIZED_LINEARS}
    stored: dict[str, Any] = {
        path: jnp.asarray(value, jnp.float32) for path, value in parameters.items() if path not in linears
    }
    moments = statistics.layer(index)
    strong = plan.config.scales == "two_level"
    metrics = layer_metrics(statistics, index, parameters, plan.config) if strong else {}
    errors: dict[str, float] = {}
    predicted = 0.0
    for path, name in linears.items():
        dense = check_weight(jnp.asarray(parameters[path], jnp.float32), f"layers.{index}.{path}")
        moment = moments[LINEAR_INPUTS[name]]
        if strong:
            result = quantize_joint(
                dense, *metrics[name], plan.tensors[f"layers.{index}.{name}"], plan.config
            )
            stored[path], restored = result.weight, result.restored
            predicted += result.nats
        else:
            stored[path] = quantize_linear(dense, moment, plan.config)
            restored = dequantize(stored[path])
        errors[name] = float(layer_error(dense, restored, moment))
    return stored, errors, predicted


def _layer_errors(
    parameters: Mapping[str, Any], stored: Mapping[str, Any], moments: Moments
) -> dict[str, float]:
    """The layer error of each linear of a stored layer."""
    return {
        name: float(
            layer_error(
                jnp.asarray(parameters[f"{name}.weight"], jnp.float32),
                dequantize(stored[f"{name}.weight"]),
                moments[LINEAR_INPUTS[name]],
            )
        )
        for name in QUANTIZED_LINEARS
    }


def quantize_embedding(W: Any) -> Int8Weight:
    """int8 form of an embedding or head [vocabulary, hidden], a slab of rows at a time to bound memory."""
    slabs = [
        quantize_int8(jnp.asarray(W[start : start + EMBEDDING_SLAB]))
        for start in range(0, len(W), EMBEDDING_SLAB)
    ]
    return Int8Weight(
        values=jnp.concatenate([slab.values for slab in slabs]),
        scales=jnp.concatenate([slab.scales for slab in slabs]),
        shape=(W.shape[0], W.shape[1]),
    )


def _store_outer(outer: dict[str, Any], config: QuantConfig) -> dict[str, Any]:
    def form(path: str, value: Any) -> Any:
        if value.ndim == 1:
            return jnp.asarray(value, jnp.float32)
        check_weight(value, path)
        return quantize_embedding(value) if config.embedding == "int8" else jnp.asarray(value, jnp.bfloat16)

    return {path: form(path, value) for path, value in outer.items()}


def _nbytes(parameters: dict[str, Any]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
