"""Arrays of statistics on disk, with digests; read without trust: types, shapes and values are checked."""

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from svsk_jax.json_data import parse_json
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import input_widths, layer_linears
from svsk_jax.quant.types import SENSITIVITY_TILE
from svsk_jax.storage.arrays import sha256
from svsk_jax.storage.durable import durable_file

AGAIN = "run `svsk calibrate` again"
LOOKED_AT = 1 << 18
"""Numbers that are looked at together, so that they stay in a processor's cache."""
NOTE = "svsk"
"""Key of digests, and what else is told of the arrays, in the metadata of a file."""
DIFFERS = "its SHA-256 is not the one stored with it"
DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}
"""Of statistics and tokens."""

Form = tuple[str, tuple[int, ...]]
"""The dtype of a safetensors file, and a shape; a side of -1 may be any."""


class StoredArrays(Mapping[str, np.ndarray]):
    """The arrays that `write_arrays` stored, each read when it is asked for, compared with its digest and its
    floats checked finite: a layer of experts has gigabytes of them. The file is opened once, and may be read
    by several threads. It is not mapped, which would count what was read of it as memory of the process.

    Raises:
        ValueError: names the file, and the array.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="numpy") as file:  # checks the header against the file's size
                self.note: dict[str, Any] = parse_json((file.metadata() or {})[NOTE])
            digests = self.note["sha256"]
            self._stream = path.open("rb", buffering=0)
            weakref.finalize(self, self._stream.close)
            size = int.from_bytes(self._stream.read(8), "little")
            self._entries: dict[str, Any] = json.loads(self._stream.read(size))
            del self._entries["__metadata__"]
            self._start = 8 + size
            self._digests = {name: digests[name] for name in self._entries}
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: has no digests of its arrays; {AGAIN}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._read(name)
        if sha256(value) != self._digests[name]:
            raise ValueError(f"{self.path}: {name}: {DIFFERS}; {AGAIN}")
        if value.dtype.kind == "f" and not _is_finite(value):
            raise ValueError(f"{self.path}: {name} holds NaN or Inf; {AGAIN}")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def differs(self, name: str) -> bool:
        """Whether an array is not what was written."""
        return sha256(self._read(name)) != self._digests[name]

    def _read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{self.path}: {name} is {entry['dtype']}, expected F32 or I32; {AGAIN}")
        value = np.empty(entry["shape"], dtype)
        left = value.reshape(-1).view(np.uint8).data
        place = self._start + entry["data_offsets"][0]
        try:
            # One call reads 2 GB at most.
            while left:
                count = os.preadv(self._stream.fileno(), [left], place)
                if not count:
                    raise OSError("it is shorter than its header says")
                left, place = left[count:], place + count
        except OSError as error:
            raise self._damaged(error) from error
        return value

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: cannot be read ({error}); {AGAIN}")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], **note: Any) -> None:
    """Store f32 and int32 arrays with the SHA-256 of each, durable once written.

    Args:
        path: of the safetensors file.
        arrays: by name.
        note: JSON data to be stored beside the digests, `StoredArrays.note`.
    """
    whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    digests = {name: sha256(value) for name, value in whole.items()}
    with durable_file(path) as partial:
        # One entry: safetensors writes several in any order.
        save_file(whole, partial, metadata={NOTE: json.dumps({"sha256": digests, **note})})


def _is_finite(value: np.ndarray) -> bool:
    flat = value.reshape(-1)
    starts = range(0, len(flat), LOOKED_AT)
    return all(np.isfinite(flat[start : start + LOOKED_AT]).all() for start in starts)


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
