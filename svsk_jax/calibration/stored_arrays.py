"""Arrays of statistics on disk, with digests; read without trust: types, shapes and values are checked.

Arrays are written, hashed, read and looked at in pieces, several at once: hashing takes longest, and most of
a layer's bytes are in one array. The digest of an array is the SHA-256 over its dtype, its shape and the
SHA-256 of each piece.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from svsk_jax.json_data import parse_json
from svsk_jax.storage.durable import durable_file

AGAIN = "run `svsk calibrate` again"
PIECE = 1 << 22
"""Bytes of a piece; a digest hangs on it."""
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Pieces that are worked on at once."""
NOTE = "svsk"
"""Key of digests, and what else is told of the arrays, in the metadata of a file."""
DIFFERS = "its SHA-256 is not the one stored with it"
DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}
"""Of statistics and tokens."""
T = TypeVar("T")
R = TypeVar("R")


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
        value, differs, finite = self._read(name)
        if differs:
            raise ValueError(f"{self.path}: {name}: {DIFFERS}; {AGAIN}")
        if not finite:
            raise ValueError(f"{self.path}: {name} holds NaN or Inf; {AGAIN}")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def differs(self, name: str) -> bool:
        """Whether an array is not what was written."""
        return self._read(name)[1]

    def _read(self, name: str) -> tuple[np.ndarray, bool, bool]:
        """An array, whether it is not what was written, and whether it is finite."""
        entry = self._entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{self.path}: {name} is {entry['dtype']}, expected F32 or I32; {AGAIN}")
        try:
            value = np.empty(entry["shape"], dtype)
        except ValueError as error:
            raise self._damaged(error) from error

        def read(piece: _Piece) -> tuple[bytes, bool]:
            left, place = piece.bytes, piece.place
            while left:
                count = os.preadv(self._stream.fileno(), [left], place)
                if not count:
                    raise OSError("it is shorter than its header says")
                left, place = left[count:], place + count
            finite = dtype.kind != "f" or bool(np.isfinite(piece.values).all())
            return hashlib.sha256(piece.bytes).digest(), finite

        try:
            found = _several_at_once(read, _pieces(value, self._start + entry["data_offsets"][0]))
        except OSError as error:
            raise self._damaged(error) from error
        differs = _digest(value, [digest for digest, _ in found]) != self._digests[name]
        return value, differs, all(finite for _, finite in found)

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: cannot be read ({error}); {AGAIN}")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], **note: Any) -> None:
    """Store f32 and int32 arrays in a safetensors file with a digest of each, durable once written.

    Args:
        path: of the file.
        arrays: by name.
        note: JSON data to be stored beside the digests, `StoredArrays.note`.

    Raises:
        TypeError: an array of another dtype, by name. Nothing is written.
    """
    other = {name: str(value.dtype) for name, value in arrays.items() if value.dtype not in DTYPES.values()}
    if other:
        raise TypeError(f"{path}: arrays are stored as float32 or int32, not {other}: convert them")
    whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    # Digests have one length: that of the header is known before they are.
    start = len(_header(whole, dict.fromkeys(whole, _digest(np.empty(0), [])), note))
    pieces = {}
    for name, value in whole.items():
        pieces[name] = _pieces(value, start)
        start += value.nbytes
    with durable_file(path) as partial, partial.open("wb", buffering=0) as file:

        def write(piece: _Piece) -> bytes:
            _write(file.fileno(), piece.bytes, piece.place)
            return hashlib.sha256(piece.bytes).digest()

        found = iter(_several_at_once(write, [piece for each in pieces.values() for piece in each]))
        digests = {name: _digest(whole[name], [next(found) for _ in each]) for name, each in pieces.items()}
        _write(file.fileno(), memoryview(_header(whole, digests, note)), 0)


class _Piece(NamedTuple):
    values: np.ndarray
    place: int
    """In the file."""

    @property
    def bytes(self) -> memoryview:
        """The same memory."""
        return self.values.view(np.uint8).data


def _pieces(value: np.ndarray, place: int) -> list[_Piece]:
    """The pieces of an array that begins at `place`."""
    flat, count = value.reshape(-1), PIECE // value.itemsize
    starts = range(0, len(flat), count)
    return [_Piece(flat[start : start + count], place + start * value.itemsize) for start in starts]


def _several_at_once(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `work` gives for each of the items; none is at work any more when this returns or raises."""
    if len(items) == 1:
        return [work(items[0])]
    with ThreadPoolExecutor(max_workers=THREADS) as threads:
        return list(threads.map(work, items))


def _digest(value: np.ndarray, of_pieces: Sequence[bytes]) -> str:
    kind = f"{value.dtype.name} {value.shape}".encode()
    return hashlib.sha256(b"".join((kind, *of_pieces))).hexdigest()


def _header(arrays: Mapping[str, np.ndarray], digests: Mapping[str, str], note: Mapping[str, Any]) -> bytes:
    """The length and the JSON that begin a safetensors file."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {NOTE: json.dumps({"sha256": digests, **note})}}
    place = 0
    for name, value in arrays.items():
        offsets = [place, place := place + value.nbytes]
        entries[name] = {
            "dtype": kinds[value.dtype],
            "shape": list(value.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(descriptor: int, data: memoryview, place: int) -> None:
    # One call writes 2 GB at most.
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count
