"""ggml's own quantizers, through ctypes, so that its formats are judged by its own code."""

import ctypes
import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

Kind = Literal["Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]

LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
FOLDER_VARIABLE = "SVSK_GGML_LIB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A matrix after quantization and back, and what it takes to store."""

    values: np.ndarray
    """f32 [N, K]."""
    nbytes: int
    """Bytes stored, padding included."""
    padding: int = 0
    """How many of these belong to columns that W does not have and the format's blocks need."""


def library_path() -> Path:
    """ggml's base library: in the folder $SVSK_GGML_LIB, else in the installed llama_cpp package.

    Raises:
        ImportError: it is in neither.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        folder = Path(chosen).expanduser()
    else:
        # Importing the package would load all of llama.cpp.
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                "ggml's quantizers come with llama-cpp-python: `pip install 'svsk-jax[peers]'`, or give the "
                f"folder that holds {LIBRARIES[0]} in ${FOLDER_VARIABLE}"
            )
        folder = Path(spec.submodule_search_locations[0]) / "lib"
    for name in LIBRARIES:
        if (folder / name).is_file():
            return folder / name
    raise ImportError(
        f"{folder}: none of {', '.join(LIBRARIES)} there; set ${FOLDER_VARIABLE} to their folder"
    )


class Quantizers:
    """The opened library. Quantizing lets go of the interpreter lock, so threads do work in parallel."""

    def __init__(self) -> None:
        self.path = library_path()
        library = ctypes.CDLL(str(self.path))
        self._quantize = library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        floats = ctypes.c_void_p
        self._quantize.argtypes = [
            ctypes.c_int,
            floats,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            floats,
        ]
        library.ggml_version.restype = ctypes.c_char_p
        self.version: str = library.ggml_version().decode()

    def quantize(self, W: np.ndarray, kind: Kind, importance: np.ndarray | None) -> Restored:
        """Quantize and restore W [N, K].

        Rows are padded with zeros, of importance zero, to whole blocks.

        Args:
            W: the matrix.
            kind: ggml's type.
            importance: E[x²] of each column's input, [K], as in an importance matrix; None for the quantizer
                that does without.

        Raises:
            ValueError: shapes that do not match, or values that are not finite, before or after.
        """
        if W.ndim != 2 or (importance is not None and importance.shape != W.shape[1:]):
            shape = None if importance is None else importance.shape
            raise ValueError(f"expected a matrix [N, K] and importances [K], got {W.shape} and {shape}")
        if not np.isfinite(W).all() or (importance is not None and not np.isfinite(importance).all()):
            raise ValueError("weights or importances are NaN or Inf")
        code = GGMLQuantizationType[kind]
        block, block_bytes = GGML_QUANT_SIZES[code]
        rows, columns = W.shape
        padded = -(-columns // block) * block
        source = np.zeros((rows, padded), np.float32)
        source[:, :columns] = W
        packed = np.empty((rows, padded // block * block_bytes), np.uint8)
        weights = None
        if importance is not None:
            weights = np.zeros(padded, np.float32)
            weights[:columns] = importance
        pointer = None if weights is None else weights.ctypes.data
        written = self._quantize(code, source.ctypes.data, packed.ctypes.data, 0, rows, padded, pointer)
        if written != packed.nbytes:
            raise ValueError(f"ggml wrote {written} bytes of {kind}, expected {packed.nbytes}")
        values = dequantize(packed, code)[:, :columns]
        if not np.isfinite(values).all():
            raise ValueError(f"ggml's {kind} gave NaN or Inf")
        padding = rows * (padded - columns) * block_bytes // block
        return Restored(values=np.ascontiguousarray(values), nbytes=packed.nbytes, padding=padding)


@functools.cache
def quantizers() -> Quantizers:
    """The library, opened on first use. Raises ImportError where there is none."""
    return Quantizers()
