"""The quantizers that are compared, by name, and their restored weights on disk.

FOLDER/ROW/row.json              what was quantized and its bytes; written last
FOLDER/ROW/layer-00000.safetensors   the linears of one decoder layer, restored, in f16
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.quality.ggml import Restored, quantizers
from benchmarks.quality.mixes import MIXES, Mix, tensor_type
from svsk_jax import ModelSource, open_model
from svsk_jax.calibration.store import Statistics
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.linear import to_dense
from svsk_jax.model.parameters import LINEAR_INPUTS, QUANTIZED_LINEARS
from svsk_jax.quant.codebook import LINEAR, decode
from svsk_jax.quant.error_feedback import feedback
from svsk_jax.quant.half_moment import whole_moment
from svsk_jax.quant.metric import inverse_factor
from svsk_jax.quant.types import InputMoment
from svsk_jax.storage.atomic import output_folder, write_json
from svsk_jax.storage.checkpoint import SavedModel

BASELINE = "Q4_K_M+im"
MARKER = "row.json"

Quantizer = Callable[[str, np.ndarray, InputMoment], Restored]
"""Called with a linear's full path, its f32 matrix [N, K] and the second moment of its input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A quantized model: its decoder linears, restored, layer by layer, and its size."""

    name: str
    layer: Callable[[int], Mapping[str, Any]]
    """The f32 matrices of a layer by path within it, such as `mlp.up.weight`."""
    linear_bytes: int
    """Bytes of the decoder linears, without `padding`."""
    padding: int
    """Further bytes for columns that the matrices lack and the format's blocks need."""
    made_from: str
    """Fingerprint of the unquantized model."""
    notes: Mapping[str, Any]
    """What else is known of it."""


def registry(config: ModelConfig) -> dict[str, Quantizer]:
    """Every row that `quantize_rows` can make, by name; `+im` is with an importance matrix."""
    rows: dict[str, Quantizer] = {}
    for mix in MIXES:
        rows[f"{mix}+im"] = partial(_mix, config, mix, True)
        rows[mix] = partial(_mix, config, mix, False)
    for group in (32, 64):
        rows[f"RTN-g{group}"] = partial(_round_to_nearest, group)
    rows["GPTQ-g128"] = partial(_gptq, 128)
    return rows


def _mix(
    config: ModelConfig,
    mix: Mix,
    importance: bool,
    path: str,
    W: np.ndarray,
    moment: InputMoment,
) -> Restored:
    _, layer, linear = path.split(".", 2)
    gqa = config.num_heads // config.num_kv_heads
    kind = tensor_type(mix, linear, int(layer), config.num_layers, importance=importance, gqa=gqa)
    return quantizers().quantize(W, kind, np.asarray(moment.diagonal) if importance else None)


def _flat_scales(W: np.ndarray, group: int) -> tuple[np.ndarray, int]:
    """max |w| / 7.5 of each group along K, rounded to f16, for each weight [N, K]; and the bytes of codes and
    scales. The last group may be shorter.

    Source: the symmetric grid in the code of Frantar et al., "GPTQ" (2022).
    """
    rows, columns = W.shape
    groups = -(-columns // group)
    grouped = np.pad(W, ((0, 0), (0, groups * group - columns))).reshape(rows, groups, group)
    scales = (np.abs(grouped).max(axis=2) / 7.5).astype(np.float16).astype(np.float32)
    return np.repeat(scales, group, axis=1)[:, :columns], rows * (-(-columns // 2) + 2 * groups)


def _round_to_nearest(group: int, path: str, W: np.ndarray, moment: InputMoment) -> Restored:
    """Codes -8 … 7, each weight to its nearest."""
    scales, nbytes = _flat_scales(W, group)
    codes = np.clip(np.rint(W / np.where(scales > 0, scales, 1)), -8, 7)
    return Restored(values=codes * scales, nbytes=nbytes)


def _gptq(group: int, path: str, W: np.ndarray, moment: InputMoment) -> Restored:
    """Codes -8 … 7 by error feedback, columns by falling activation; the scales are those of rounding to
    nearest ("static groups"). H is damped by 1 % of its mean diagonal.

    Source: Frantar et al., "GPTQ" (2022).
    """
    scales, nbytes = _flat_scales(W, group)
    level = jnp.asarray(LINEAR, jnp.float32)
    codes = feedback(jnp.asarray(W), jnp.asarray(scales), level, inverse_factor(moment.mean, 0.01))
    return Restored(values=np.asarray(scales * decode(codes, level)), nbytes=nbytes)


def quantize_rows(
    source: ModelSource,
    statistics: Statistics,
    output: Path,
    names: Iterable[str],
    say: Callable[[str], None],
) -> None:
    """Quantize every decoder linear by each named row and store the results under `output`.

    Raises:
        ValueError: statistics of another model, or values that a quantizer cannot take.
        ImportError: a row needs ggml and it is not there.
    """
    statistics.check_model(source.fingerprint(), source.description)
    known = registry(source.config)
    for name in names:
        with output_folder(output / name, overwrite=True, marker=MARKER) as folder:
            total = padding = 0
            for index in range(source.config.num_layers):
                parameters = source.layer(index, np.float32)
                moments = {name: whole_moment(each) for name, each in statistics.layer(index).items()}
                restored: dict[str, np.ndarray] = {}
                for linear in QUANTIZED_LINEARS:
                    W = np.asarray(parameters[f"{linear}.weight"], np.float32)
                    try:
                        result = known[name](f"layers.{index}.{linear}", W, moments[LINEAR_INPUTS[linear]])
                    except ValueError as error:
                        raise ValueError(f"{name}, layers.{index}.{linear}: {error}") from error
                    restored[f"{linear}.weight"] = result.values.astype(np.float16)
                    total, padding = total + result.nbytes, padding + result.padding
                save_file(restored, _layer_file(folder, index))
            notes: dict[str, Any] = {"calibration": dict(statistics.manifest["text"])}
            if name.removesuffix("+im") in MIXES:
                notes["ggml"] = quantizers().version
            record = {
                "linear_bytes": total - padding,
                "padding": padding,
                "made_from": source.fingerprint(),
                "notes": notes,
            }
            write_json(folder / MARKER, record)
        say(f"{name}: {total - padding:,} bytes, and {padding:,} of padding")


def _layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def stored_rows(folder: Path) -> list[Row]:
    """The rows under `folder`, by name.

    Raises:
        ValueError: none there, or one is damaged.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{MARKER}"))
    if not found:
        raise ValueError(
            f"{folder}: no rows there; make them with `python -m benchmarks.quality.peers quantize`"
        )
    return [_stored_row(path) for path in found]


def _stored_row(folder: Path) -> Row:
    try:
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return Row(name=folder.name, layer=lambda index: load_file(_layer_file(folder, index)), **record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / MARKER}: damaged ({error}); quantize this row again") from error


def saved_row(name: str, folder: str) -> Row:
    """A model that `svsk quantize` saved.

    Raises:
        ValueError: there is none in `folder`, or it is not quantized.
    """
    source = open_model(folder)
    if not isinstance(source, SavedModel) or "bytes" not in source.metadata:
        raise ValueError(f"--svsk {name}={folder}: expected a folder that `svsk quantize` wrote")
    linears = [f"{linear}.weight" for linear in QUANTIZED_LINEARS]

    def layer(index: int) -> dict[str, Any]:
        parameters = source.layer(index, jnp.float32)
        return {path: to_dense(parameters[path], jnp.float32) for path in linears}

    return Row(
        name=name,
        layer=layer,
        linear_bytes=source.metadata["bytes"]["decoder_linears"],
        padding=0,
        made_from=source.metadata["source_fingerprint"],
        notes={key: source.metadata[key] for key in ("recipe", "calibration")},
    )
