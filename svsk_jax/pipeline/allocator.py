"""What the C library does with the memory of arrays that were freed."""

import ctypes
import os

LARGE = 1 << 20
"""Bytes from which an array's memory goes back to the system as soon as the array is freed."""
M_MMAP_THRESHOLD = -3
"""As malloc.h has it."""
VARIABLE = "MALLOC_MMAP_THRESHOLD_"
TUNABLES = "GLIBC_TUNABLES"


def give_back_freed_arrays() -> bool:
    """Have glibc give the memory of large arrays back when they are freed; whether it was told so.

    By itself it moves the bound up to 32 MB as such arrays are freed, and from then on cuts them out of
    heaps, whose gaps grow from layer to layer: by the last one they are most of the process
    (docs/decisions/0008). Other C libraries are left alone, and what the user set in the environment is.
    """
    if VARIABLE in os.environ or "glibc.malloc.mmap_threshold" in os.environ.get(TUNABLES, ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE))
