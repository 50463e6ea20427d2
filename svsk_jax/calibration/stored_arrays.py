"""Arrays of statistics on disk, read without trust: their types, shapes and values are checked."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import input_widths, layer_linears
from svsk_jax.quant.types import SENSITIVITY_TILE

AGAIN = "run `svsk calibrate` again"
ROWS = 4096
"""Looked at together, which bounds the memory of it."""

Form = tuple[str, tuple[int, ...]]
"""The dtype of a safetensors file, and a shape; a side of -1 may be any."""


class StoredArrays(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file, each read when it is asked for and its floats checked finite: a layer
    of experts has gigabytes of them.

    Raises:
        ValueError: names the file, and the array.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            self.names = dict.fromkeys(file.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        try:
            with self._open() as file:
                value = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        if value.dtype.kind == "f" and not _is_finite(value):
            raise ValueError(f"{self.path}: {name} holds NaN or Inf; {AGAIN}")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: cannot be read ({error}); {AGAIN}")


def _is_finite(value: np.ndarray) -> bool:
    if not value.size:
        return True
    rows = value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
    return all(np.isfinite(rows[start : start + ROWS]).all() for start in range(0, len(rows), ROWS))


def moment_forms(config: ModelConfig, index: int, full: bool) -> dict[str, Form]:
    """What the file of moments of layer `index` holds."""
    widths = input_widths(config, index)
    totals = {name: ("F32", (width, width) if full else (width,)) for name, width in widths.items()}
    return totals | {f"{name}.tokens": ("I32", (1,)) for name in widths}


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
