"""GGUF files (versions 2 and 3): metadata and tensors, every length checked against the file.

Source: the GGUF specification of ggml. The gguf package's own reader makes one object per vocabulary
entry; this one is tens of times faster.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from convert.tensors import RawTensor

SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "|b1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
INTEGERS = {"I8", "I16", "I32", "I64"}
MAX_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """Metadata as Python values, by key, and tensors with rows first (the reverse of GGUF's order)."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[RawTensor]


class _Cursor:
    """Reads forward through the file; past its end is an error that says so."""

    def __init__(self, data: mmap.mmap):
        self.data, self.offset = data, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.offset + count > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, inside its header")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.integer(8)).decode("utf-8")

    def value(self, depth: int = 0) -> Any:
        return self.typed(GGUFValueType(self.integer(4)), depth)

    def typed(self, kind: GGUFValueType, depth: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()
        if depth > 1:
            raise ValueError("its metadata nests arrays too deep")
        item, count = GGUFValueType(self.integer(4)), self.integer(8)
        if item in SCALARS:
            return np.frombuffer(self.take(count * np.dtype(SCALARS[item]).itemsize), SCALARS[item]).tolist()
        if count > len(self.data) - self.offset:
            raise ValueError(
                f"it claims {count} strings in its remaining {len(self.data) - self.offset} bytes"
            )
        return [self.typed(item, depth + 1) for _ in range(count)]


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file; values are read and dequantized when asked for.

    Raises:
        ValueError: not a GGUF file, an unsupported version, one part of a split file, truncated or corrupt.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except (ValueError, OverflowError, struct.error, MemoryError) as error:
        raise ValueError(f"{path}: cannot be read as GGUF: {error}; download it again") from error


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version = cursor.integer(4)
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, supported are 2 and 3 (little-endian)")
    tensor_count, field_count = cursor.integer(8), cursor.integer(8)
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text()
        metadata[key] = cursor.value()
    if metadata.get("split.count", 0) not in (0, 1):
        raise ValueError("it is one part of a split file: merge the parts with `llama-gguf-split --merge`")
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {alignment!r}")
    origin = -(-cursor.offset // alignment) * alignment
    size = len(cursor.data)
    tensors = [
        _tensor(path, name, shape, kind, origin + offset, size) for name, shape, kind, offset in entries
    ]
    return GGUFFile(path=path, metadata=metadata, tensors=tensors)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.text(), cursor.integer(4)
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.integer(8) for _ in range(dimensions))[::-1]
    return name, shape, cursor.integer(4), cursor.integer(8)


def _tensor(path: Path, name: str, shape: tuple[int, ...], code: int, start: int, size: int) -> RawTensor:
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise ValueError(f"tensor {name!r} has the unknown type {code}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(
            f"tensor {name!r} of shape {list(shape)} does not divide into {kind.name} blocks of {block}"
        )
    row_bytes = shape[-1] // block * block_bytes
    end = start + math.prod(shape[:-1]) * row_bytes
    if end > size:
        raise ValueError(f"it is truncated: tensor {name!r} ends at byte {end}, the file at byte {size}")

    def read(first: int, last: int) -> np.ndarray:
        if len(shape) == 1:
            # A vector has one row: a slab of it is a slab of that row, whole blocks only.
            first, last, rest = first // block, -(-last // block), ()
            step = block_bytes
        else:
            rest, step = shape[1:], math.prod(shape[1:-1]) * row_bytes
        raw = np.fromfile(path, np.uint8, count=(last - first) * step, offset=start + first * step)
        if kind == GGMLQuantizationType.F64:
            return raw.view(np.float64).reshape(-1, *rest)
        rows = raw.reshape(-1, row_bytes if rest else step)
        return _dequantize(name, rows, kind).reshape(-1, *rest)

    return RawTensor(name=name, shape=shape, dtype=kind.name, read=read, readable=kind.name not in INTEGERS)


def _dequantize(name: str, rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    try:
        # Damaged or extreme scales show up as NaN or Inf in the result, which the caller counts.
        with np.errstate(over="ignore", invalid="ignore"):
            return dequantize(rows, kind)
    except NotImplementedError as error:
        raise ValueError(
            f"{name}: tensor type {kind.name} cannot be dequantized; use a GGUF file of another type, "
            "or the safetensors"
        ) from error
