"""Arrays of statistics on disk, read without trust: their types, shapes and values are checked."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import LINEAR_INPUTS, layer_shapes
from svsk_jax.quant.types import SENSITIVITY_TILE

AGAIN = "run `svsk calibrate` again"
ROWS = 4096
"""Looked at together, which bounds the memory of it."""

Form = tuple[str, tuple[int, ...]]
"""The dtype of a safetensors file, and a shape; a side of -1 may be any."""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of a safetensors file, its floats checked finite.

    Raises:
        ValueError: names the file, and the array.
    """
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {AGAIN}") from error
    for name, value in arrays.items():
        if value.dtype.kind == "f" and not _is_finite(value):
            raise ValueError(f"{path}: {name} holds NaN or Inf; {AGAIN}")
    return arrays


def _is_finite(value: np.ndarray) -> bool:
    rows = value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
    return all(np.isfinite(rows[start : start + ROWS]).all() for start in range(0, len(rows), ROWS))


def moment_forms(config: ModelConfig, full: bool) -> dict[str, Form]:
    """What a layer's file of moments holds."""
    shapes = layer_shapes(config)
    widths = {LINEAR_INPUTS[name]: shapes[f"{name}.weight"][1] for name in LINEAR_INPUTS}
    totals = {name: ("F32", (width, width) if full else (width,)) for name, width in widths.items()}
    return totals | {f"{name}.tokens": ("I32", (1,)) for name in widths}


def sensitivity_forms(config: ModelConfig, prefix: str) -> dict[str, Form]:
    """What a layer's file of sensitivities holds; `prefix` heads the names of its weighted moments."""
    forms = {f"{prefix}{name}": form for name, form in moment_forms(config, True).items()}
    for name in LINEAR_INPUTS:
        rows = layer_shapes(config)[f"{name}.weight"][0]
        height = min(rows, SENSITIVITY_TILE)
        forms[f"{name}.blocks"] = ("F32", (-(-rows // height), height, height))
        forms[f"{name}.weights"] = ("F32", (-1, -1))
        forms[f"{name}.tokens"] = ("I32", (1,))
    return forms


def check_file(path: Path, forms: Mapping[str, Form]) -> None:
    """ValueError, which names file and array, unless the file's header has all of these; reads no values."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {AGAIN}") from error
    for name, (dtype, shape) in forms.items():
        if name not in found:
            raise ValueError(f"{path}: lacks {name}; {AGAIN}")
        if found[name][0] != dtype or not _fits(found[name][1], shape):
            raise ValueError(
                f"{path}: {name} is {found[name][0]} {list(found[name][1])}, expected {dtype} "
                f"{list(shape)}; {AGAIN}"
            )


def _fits(found: tuple[int, ...], expected: Iterable[int]) -> bool:
    sides = tuple(expected)
    return len(found) == len(sides) and all(b in (-1, a) for a, b in zip(found, sides, strict=True))


def check_tokens(ids: Any, config: ModelConfig, path: Path) -> None:
    """ValueError unless the chunks are of tokens that the model has."""
    if ids is None or ids.dtype != np.int32 or ids.ndim != 2 or not ids.size:
        raise ValueError(f"{path}: expected `ids`, int32 [chunks, length]; {AGAIN}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"{path}: tokens {ids.min()} to {ids.max()}, the model has {config.vocab_size}; {AGAIN}"
        )
