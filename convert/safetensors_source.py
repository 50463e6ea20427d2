"""Safetensors files: header checked against the file, values by plain file reads so nothing stays mapped."""

import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.tensors import RawTensor
from svsk_jax.json_data import parse_json, shown

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64} | {
    name: 8 * np.dtype(dtype).itemsize for name, dtype in FLOATS.items()
}
MAX_HEADER = 100 << 20
MAX_DIMENSIONS = 8


def read_safetensors(path: Path) -> list[RawTensor]:
    """Every tensor that the file's header declares.

    Raises:
        ValueError: the file is truncated or its header does not fit it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER, size - 8):
            raise _corrupt(path, f"its header claims {length} bytes, the file has {size}")
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise _corrupt(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return [
        _tensor(path, name, entry, 8 + length, size)
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def _tensor(path: Path, name: str, entry: Any, origin: int, size: int) -> RawTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"the entry of tensor {shown(name)} is malformed") from error
    sizes = (*shape, start, stop)
    whole = all(type(number) is int and 0 <= number < 1 << 63 for number in sizes)
    if not isinstance(dtype, str) or not whole or len(shape) > MAX_DIMENSIONS:
        raise _corrupt(path, f"the entry of tensor {shown(name)} is malformed: {shown(entry)}")
    if stop < start or origin + stop > size:
        raise _corrupt(path, f"tensor {name!r} ends at byte {origin + stop}, the file at byte {size}")
    # A dtype that is unknown here is refused when it is read, so its size need not be known.
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (stop - start):
        raise _corrupt(
            path, f"tensor {name!r} of shape {list(shape)} and type {dtype} has {stop - start} bytes"
        )

    def read(first: int, last: int) -> np.ndarray:
        kind = np.dtype(FLOATS[dtype])
        row = math.prod(shape[1:])
        offset = origin + start + first * row * kind.itemsize
        values = np.fromfile(path, kind, count=(last - first) * row, offset=offset)
        return values.reshape(last - first, *shape[1:])

    return RawTensor(name=name, shape=shape, dtype=dtype, read=read, readable=dtype in FLOATS)


def _corrupt(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: truncated or corrupt safetensors file: {reason}; download it again")
