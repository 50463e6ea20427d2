"""What the files of statistics hold, by their headers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from svsk_jax.calibration.stored_arrays import AGAIN
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import HEAD_INPUT, input_widths, layer_linears
from svsk_jax.quant.half_moment import half_size
from svsk_jax.quant.types import SENSITIVITY_TILE

Form = tuple[str, tuple[int, ...]]
"""The dtype of a safetensors file, and a shape; a side of -1 may be any."""


def moment_forms(config: ModelConfig, index: int, full: bool) -> dict[str, Form]:
    """What the file of moments of layer `index` holds."""
    widths = input_widths(config, index)
    totals = {name: ("F32", (half_size(width) if full else width,)) for name, width in widths.items()}
    return totals | {f"{name}.tokens": ("I32", (1,)) for name in widths}


def head_forms(config: ModelConfig, full: bool) -> dict[str, Form]:
    """What the file of the head's moment holds."""
    width = config.hidden_size
    return {
        HEAD_INPUT: ("F32", (half_size(width) if full else width,)),
        f"{HEAD_INPUT}.tokens": ("I32", (1,)),
    }


def sensitivity_forms(config: ModelConfig, index: int, prefix: str) -> dict[str, Form]:
    """What the file of sensitivities of layer `index` holds; `prefix` heads the names of its weighted
    moments."""
    forms = {f"{prefix}{name}": form for name, form in moment_forms(config, index, True).items()}
    for name, (rows, _) in layer_linears(config, index).items():
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
