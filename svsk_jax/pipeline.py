"""The driver: decoder layers stream through load → calibrate → quantize → store, one at a time.

Activations come from the unquantized model, so that a layer's statistics do not depend on the recipe and
can be saved and used again.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.svsk_matmul import Int8Weight
from svsk_jax.calibration import store
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.statistics import Moments, advance, data_mesh, embed_batches
from svsk_jax.calibration.text import cut_chunks, read_texts, tokenize
from svsk_jax.model.decoder import DecoderLayer
from svsk_jax.model.parameters import LINEAR_INPUTS, QUANTIZED_LINEARS, parameter_shapes
from svsk_jax.model.source import ModelSource
from svsk_jax.quant.budget import Budget, predict
from svsk_jax.quant.error import layer_error
from svsk_jax.quant.int8 import quantize_int8
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.types import QuantConfig
from svsk_jax.storage.atomic import check_output, output_folder
from svsk_jax.storage.checkpoint import MARKER, writing

EMBEDDING_SLAB = 16384
"""Rows of an embedding that are quantized at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """One finished layer of a run."""

    layer: int
    layers: int
    error: float | None
    """Geometric mean of the layer errors so far."""


OnProgress = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What a quantization run made."""

    output: Path
    budget: Budget
    errors: dict[str, float]
    """Layer error of each decoder linear by path."""
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
            "seconds": self.seconds,
        }


def geometric_mean(values: list[float]) -> float | None:
    """exp of the mean logarithm of the positive values; None if there are none."""
    positive = [value for value in values if value > 0]
    return float(np.exp(np.mean(np.log(positive)))) if positive else None


class Stopwatch:
    """Wall seconds by stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._mark
        self._mark = now


def default_dtype() -> DTypeLike:
    """Dtype of activations and dense weights: f32 on CPU, whose matrix products have no faster form, bf16
    elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _calibrated_layers(
    source: ModelSource,
    outer: dict[str, Any],
    calibration: CalibrationConfig,
    ids: np.ndarray,
    dtype: DTypeLike,
    watch: Stopwatch,
) -> Iterator[tuple[int, dict[str, Any], Moments]]:
    """(index, dense parameters, moments) of each layer in turn; only one layer and the activations are
    held."""
    mesh = data_mesh()
    embedding = np.asarray(outer["embedding.weight"]).astype(jnp.dtype(dtype))
    streams, masks = embed_batches(embedding, ids, calibration.batch_tokens, mesh)
    del embedding
    watch.lap("calibrate")
    for index in range(source.config.num_layers):
        parameters = source.layer(index, dtype)
        watch.lap("load")
        layer = DecoderLayer(source.config, {path: jnp.asarray(value) for path, value in parameters.items()})
        moments = advance(layer, streams, masks, mesh, calibration.moments == "full")
        jax.block_until_ready((streams, moments))
        del layer
        watch.lap("calibrate")
        yield index, parameters, moments


def _refuse_packed(source: ModelSource, outer: dict[str, Any]) -> None:
    if (
        not isinstance(outer["embedding.weight"], (np.ndarray, jax.Array))
        or getattr(source, "metadata", {}).get("recipe", "dense") != "dense"
    ):
        raise ValueError(f"--model {source.description}: already quantized; give the unquantized checkpoint")


def _calibration_ids(
    source: ModelSource, calibration: CalibrationConfig
) -> tuple[np.ndarray, dict[str, Any]]:
    texts = read_texts(calibration.calib, "calibration")
    chunks = cut_chunks(
        tokenize(source.tokenizer(), texts),
        calibration.chunks,
        calibration.chunk_length,
        source.config.max_position_embeddings,
    )
    text = {
        "calib": calibration.calib
        if calibration.calib in ("builtin", "wikitext")
        else Path(calibration.calib).name,
        "chunks": chunks.ids.shape[0],
        "chunk_length": chunks.ids.shape[1],
        "moments": calibration.moments,
    }
    return chunks.ids, text


def calibrate(
    source: ModelSource,
    output: Path,
    calibration: CalibrationConfig,
    *,
    overwrite: bool = False,
    dtype: DTypeLike | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure the second moments of every linear's input and store them under `output` for `quantize`.

    Returns:
        The manifest: model, text, chunks and wall time by stage.

    Raises:
        ValueError: text too short, model already quantized.
        FileExistsError: `output` exists.
    """
    watch = Stopwatch()
    dtype = default_dtype() if dtype is None else dtype
    with output_folder(output, overwrite=overwrite, marker=store.MANIFEST) as folder:
        ids, text = _calibration_ids(source, calibration)
        outer = source.outer(dtype)
        _refuse_packed(source, outer)
        watch.lap("load")
        for index, _, moments in _calibrated_layers(source, outer, calibration, ids, dtype, watch):
            store.write_layer(folder, index, moments)
            watch.lap("write")
            if on_progress:
                on_progress(Progress(layer=index + 1, layers=source.config.num_layers, error=None))
        manifest = {
            "model": source.description,
            "fingerprint": source.fingerprint(),
            "text": text,
            "seconds": watch.seconds,
        }
        store.finish(folder, manifest)
    return manifest


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
    def form(value: Any) -> Any:
        if value.ndim == 1:
            return jnp.asarray(value, jnp.float32)
        return quantize_embedding(value) if config.embedding == "int8" else jnp.asarray(value, jnp.bfloat16)

    return {path: form(value) for path, value in outer.items()}


def _quantize_layer(
    parameters: dict[str, Any], moments: Moments, config: QuantConfig
) -> tuple[dict[str, Any], dict[str, float]]:
    """The stored parameters of a layer and the layer error of each of its linears."""
    stored: dict[str, Any] = {}
    errors: dict[str, float] = {}
    linears = {f"{name}.weight": moments[LINEAR_INPUTS[name]] for name in QUANTIZED_LINEARS}
    for path, value in parameters.items():
        if path not in linears:
            stored[path] = jnp.asarray(value, jnp.float32)
            continue
        dense = jnp.asarray(value, jnp.float32)
        stored[path] = quantize_linear(dense, linears[path], config)
        errors[path.removesuffix(".weight")] = float(layer_error(dense, stored[path], linears[path]))
    return stored, errors


def quantize(
    source: ModelSource,
    output: Path,
    config: QuantConfig,
    *,
    recipe: str,
    calibration: CalibrationConfig | None = None,
    statistics: store.Statistics | None = None,
    overwrite: bool = False,
    dtype: DTypeLike | None = None,
    on_progress: OnProgress | None = None,
) -> QuantizeResult:
    """Quantize a model into the folder `output`, layer by layer.

    Args:
        source: the unquantized model.
        output: folder to make; it appears only when whole.
        config: the recipe's configuration.
        recipe: its name, for the metadata.
        calibration: text to calibrate on, unless `statistics` of an earlier run are given.
        statistics: from `calibrate` on the same model.
        overwrite: replace a model that svsk wrote.
        dtype: of the calibration forward pass; default f32 on CPU, bf16 elsewhere.
        on_progress: called after each layer.

    Raises:
        ValueError: text too short, statistics of another model, model already quantized, bad weights.
        FileExistsError: `output` exists.
        OSError: too little disk space.
    """
    watch = Stopwatch()
    dtype = default_dtype() if dtype is None else dtype
    check_output(output, overwrite, MARKER)
    budget = predict(parameter_shapes(source.config), QUANTIZED_LINEARS, config)
    _require_space(output, budget.total_bytes)
    ids = None
    if statistics is None:
        calibration = calibration or CalibrationConfig()
        ids, text = _calibration_ids(source, calibration)
    else:
        statistics.check_model(source.fingerprint(), source.description)
        text = dict(statistics.manifest["text"])
    with writing(output, overwrite=overwrite) as writer:
        outer = source.outer(dtype)
        _refuse_packed(source, outer)
        watch.lap("load")
        if statistics is not None:
            layers = _measured_layers(source, statistics, dtype, watch)
        else:
            assert calibration is not None
            assert ids is not None
            layers = _calibrated_layers(source, outer, calibration, ids, dtype, watch)
        stored_outer = _store_outer(outer, config)
        stored_bytes = _nbytes(stored_outer)
        watch.lap("quantize")
        errors: dict[str, float] = {}
        linear_bytes = 0
        for index, parameters, moments in layers:
            outer = None
            stored, layer_errors = _quantize_layer(parameters, moments, config)
            watch.lap("quantize")
            writer.layer(index, stored, layer_errors)
            watch.lap("write")
            errors |= {f"layers.{index}.{name}": error for name, error in layer_errors.items()}
            packed = sum(stored[f"{name}.weight"].nbytes for name in QUANTIZED_LINEARS)
            linear_bytes += packed
            stored_bytes += _nbytes(stored)
            if on_progress:
                mean = geometric_mean(list(errors.values()))
                on_progress(Progress(layer=index + 1, layers=source.config.num_layers, error=mean))
        actual = dataclasses.replace(budget, linear_bytes=linear_bytes, total_bytes=stored_bytes)
        metadata = {
            "recipe": recipe,
            "quant_config": dataclasses.asdict(config),
            "calibration": text,
            "source": source.description,
            "source_fingerprint": source.fingerprint(),
            "bits": {"decoder_linears": actual.linear_bits, "whole_file": actual.total_bits},
            "bytes": {"decoder_linears": actual.linear_bytes, "whole_file": actual.total_bytes},
            "versions": {name: version(name) for name in ("svsk-jax", "jax")},
        }
        writer.outer(stored_outer, source, metadata)
        watch.lap("write")
    return QuantizeResult(output=output, budget=actual, errors=errors, seconds=watch.seconds)


def _measured_layers(
    source: ModelSource, statistics: store.Statistics, dtype: DTypeLike, watch: Stopwatch
) -> Iterator[tuple[int, dict[str, Any], Moments]]:
    for index in range(source.config.num_layers):
        parameters, moments = source.layer(index, dtype), statistics.layer(index)
        watch.lap("load")
        yield index, parameters, moments


def convert(
    source: ModelSource,
    output: Path,
    *,
    dtype: DTypeLike,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Store a model unquantized in our format, layer by layer, every parameter in `dtype`; returns its
    metadata.

    Raises:
        ValueError: a tensor is damaged, missing or of the wrong shape.
        FileExistsError: `output` exists.
    """
    weights = sum(int(np.prod(shape)) for shape in parameter_shapes(source.config).values())
    check_output(output, overwrite, MARKER)
    _require_space(output, weights * jnp.dtype(dtype).itemsize)
    with writing(output, overwrite=overwrite) as writer:
        for index in range(source.config.num_layers):
            parameters = source.layer(index, dtype)
            writer.layer(index, {path: jnp.asarray(value) for path, value in parameters.items()})
            if on_progress:
                on_progress(Progress(layer=index + 1, layers=source.config.num_layers, error=None))
        outer = {path: jnp.asarray(value) for path, value in source.outer(dtype).items()}
        _refuse_packed(source, outer)
        metadata = {
            "recipe": "dense",
            "dtype": jnp.dtype(dtype).name,
            "source": source.description,
            "source_fingerprint": source.fingerprint(),
            "versions": {name: version(name) for name in ("svsk-jax", "jax")},
        }
        writer.outer(outer, source, metadata)
    return metadata


def _nbytes(parameters: dict[str, Any]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))


def _require_space(output: Path, needed: int) -> None:
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"output {output}: needs {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free; "
            "free some space or give another --output"
        )
